"""Random JSON schemas of the kinds that people send: objects with a few properties, arrays, enums, numbers with bounds, short patterns."""

import random
from typing import Any

NAMES = ("name", "colour", "count", "size", "place", "tags", "is_red", "score", "objects", "note")
WORDS = ("red", "green", "blue", "circle", "square", "left", "right", "top", "small", "large")
PATTERNS = ("^[a-z]{2,8}$", "^[A-Z]{3}-[0-9]{2}$", r"^\d{4}$")


def random_schema(seed: int) -> dict[str, Any]:
    """The schema of one seed: always an object."""
    return _object(random.Random(seed), depth=2)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randrange(1, 5))
    required = [name for name in names if rng.random() < 0.7]
    properties = {name: _value(rng, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    flat = (_integer, _number, _boolean, _enum, _pattern, _string, _nullable)
    return rng.choice(flat if depth <= 0 else (_integer, _enum, _string, _array, _object))(rng, depth)


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(-100, 100)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1000)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "number", "minimum": 0, "maximum": rng.choice((1, 10, 99.5))}


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(WORDS, rng.randrange(1, 5))}


def _pattern(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "pattern": rng.choice(PATTERNS)}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": rng.choice((5, 20, 40))}


def _nullable(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [{"type": "null"}, _enum(rng, depth)]}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "array", "items": _value(rng, depth - 1), "minItems": rng.randrange(2), "maxItems": rng.randrange(1, 4)}
