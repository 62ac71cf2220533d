"""How deeply JSON of a client may be nested, so that no recursion over it can be too deep. Knows nothing of what it means."""

MAX_DEPTH = 64


def is_too_deep(value: object) -> bool:
    """Whether `value` has more than MAX_DEPTH levels of lists and objects."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for container in level for item in _items(container)]
        if not level:
            return False
    return True


def _items(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
