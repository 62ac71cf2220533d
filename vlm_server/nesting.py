"""How deeply JSON of a client may be nested, so that no recursion over it can be too deep. Knows nothing of what it means."""

from collections.abc import Iterator, Sequence
from itertools import islice

MAX_DEPTH = 64


def is_too_deep(value: object, limit: int = MAX_DEPTH) -> bool:
    """Whether `value` has more than `limit` levels of lists and objects."""
    return any(islice(levels(value), limit, None))


def levels(value: object) -> Iterator[Sequence[object]]:
    """The lists and objects of each level, the outermost one first."""
    level = [value] if isinstance(value, dict | list) else []
    while level:
        yield level
        level = [item for container in level for item in _items(container) if isinstance(item, dict | list)]


def _items(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
