"""How deeply JSON of a client may be nested, so that no recursion over it can be too deep. Knows nothing of what it means."""

MAX_DEPTH = 64


def is_too_deep(value: object, limit: int = MAX_DEPTH) -> bool:
    """Whether `value` has more than `limit` levels of lists and objects."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [item for container in level for item in _items(container) if isinstance(item, dict | list)]
        if not level:
            return False
    return bool(level)


def _items(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
