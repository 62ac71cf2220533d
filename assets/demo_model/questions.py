"""Questions about a scene, each with its one canonical answer, and the checker that decides whether an answer is right.

Every task has several phrasings; the last two of each are used in evaluation only.
Knows nothing of pixels, tokens or models.
"""

import random
import re
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import permutations

from assets.demo_model.scenes import COLOURS, SHAPES, Scene, Thing

TASKS = ("describe", "colour", "shape", "count", "place", "relation", "text")
NUM_EVALUATION_PHRASINGS = 2

PHRASINGS = {
    "describe": (
        "Describe the image please",
        "Describe the image please.",
        "Describe this picture.",
        "What do you see?",
        "What is in the picture?",
        "What does the image show?",
        "Tell me what is in this image.",
        "What's in this image?",
        "Please describe what you see in the picture.",
        "What can be seen in this image?",
    ),
    "colour": (
        "What colour is the {0}?",
        "What color is the {0}?",
        "Which colour does the {0} have?",
        "What is the color of the {0}?",
        "Tell me the colour of the {0}.",
        "The {0}: what colour is it?",
        "Name the colour of the {0}.",
        "In which color is the {0} drawn?",
    ),
    "shape": (
        "What shape is the {0}?",
        "Which shape does the {0} have?",
        "What is the shape of the {0}?",
        "Tell me the shape of the {0}.",
        "What kind of shape is the {0}?",
        "The {0}: what shape is it?",
        "Name the shape of the {0}.",
        "Which shape is the {0}?",
    ),
    "count": (
        "How many objects are there?",
        "How many objects are in the picture?",
        "Count the objects.",
        "How many shapes are there?",
        "How many shapes do you see?",
        "What is the number of objects?",
        "Tell me how many objects there are.",
        "How many objects does the image show?",
        "How many shapes can you count in the picture?",
    ),
    "place": (
        "Where is the {0}?",
        "Where in the picture is the {0}?",
        "Where do you see the {0}?",
        "In which part of the image is the {0}?",
        "Tell me where the {0} is.",
        "What is the position of the {0}?",
        "Where can the {0} be found?",
        "In which place of the picture is the {0}?",
    ),
    "relation": (
        "Where is the {0} relative to the {1}?",
        "Where is the {0} compared to the {1}?",
        "Where is the {0} as seen from the {1}?",
        "How is the {0} placed relative to the {1}?",
        "Is the {0} left of, right of, above or below the {1}?",
        "What is the position of the {0} relative to the {1}?",
        "Seen from the {1}, where is the {0}?",
        "Which way from the {1} is the {0}?",
        "Relative to the {1}, where is the {0}?",
        "Tell me where the {0} is relative to the {1}.",
        "To which side of the {1} is the {0} drawn?",
        "In which direction from the {1} does the {0} lie?",
        "On which side of the {1} is the {0}?",
        "Where is the {0} with respect to the {1}?",
    ),
    "text": (
        "What does the text say?",
        "What is written in the picture?",
        "Read the text.",
        "What text is in the image?",
        "Which word or number is printed?",
        "What is printed in the picture?",
        "Please read what is written.",
        "What does it say in the image?",
    ),
}

PLACE_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}

# A relation is asked about only where it is clear: this far apart along one axis, and at most half as far along the other.
MIN_DISTANCE = 0.25
MAX_SLANT = 0.5

NUMBER_WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "a single": "1"}
SAME_PLACE = {"upper": "top", "lower": "bottom", "center": "middle", "centre": "middle", "central": "middle"}
NO_TEXT = "There is no text."


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the canonical answer."""

    task: str
    prompt: str
    answer: str


def phrasings(task: str, *, is_evaluation: bool) -> tuple[str, ...]:
    """The phrasings of a task that one side may use."""
    every = PHRASINGS[task]
    return every[-NUM_EVALUATION_PHRASINGS:] if is_evaluation else every[:-NUM_EVALUATION_PHRASINGS]


def questions_about(scene: Scene, rng: random.Random, *, is_evaluation: bool) -> list[Question]:
    """All that can be asked about a scene, each fact once, in a random phrasing and order."""
    facts = [("describe", (), description(scene)), *_text_facts(scene, rng), *_thing_facts(scene, rng), *_relation_facts(scene, rng)]
    rng.shuffle(facts)
    return [
        Question(task, rng.choice(phrasings(task, is_evaluation=is_evaluation)).format(*names), answer) for task, names, answer in facts
    ]


def description(scene: Scene) -> str:
    """One sentence that names everything in reading order, the text last."""
    parts = [f"a {thing.size} {thing.colour} {thing.shape} {place_phrase(thing.place)}" for thing in scene.things]
    if scene.text:
        parts.append(f"the text {scene.text.string} {place_phrase(scene.text.place)}")
    return f"There is {_joined(parts)}."


def place_phrase(place: str) -> str:
    return PLACE_WORDS.get(place, f"at the {place}")


def is_right(task: str, answer: str, canonical: str) -> bool:
    """Whether an answer states the same facts as the canonical one, in whatever words around them."""
    return stated(task, answer) == stated(task, canonical)


def stated(task: str, answer: str) -> Hashable:
    """The facts of an answer that matter for its task, in a form that can be compared."""
    if task == "describe":
        pairs = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?\b", answer)
        return tuple(sorted(pairs)), len(_words(answer, SHAPES)), tuple(_printed(answer))
    if task == "colour":
        return frozenset(_words(answer, COLOURS))
    if task == "shape":
        return frozenset(_words(answer, SHAPES))
    if task == "count":
        return frozenset(re.findall(r"\d+", _replaced(answer.lower(), NUMBER_WORDS)))
    if task == "place":
        return frozenset(_words(_replaced(answer.lower(), SAME_PLACE), ("top", "bottom", "left", "right", "middle")))
    if task == "relation":
        return frozenset(_words(answer.lower(), ("left", "right", "above", "below")))
    return tuple(_printed(answer))


def relation(thing: Thing, other: Thing) -> str | None:
    """ "left", "right", "above" or "below" where `thing` clearly is so from `other`, else None."""
    across, down = thing.x - other.x, thing.y - other.y
    if max(abs(across), abs(down)) < MIN_DISTANCE or min(abs(across), abs(down)) > MAX_SLANT * max(abs(across), abs(down)):
        return None
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def _text_facts(scene: Scene, rng: random.Random) -> list[tuple[str, tuple[str, ...], str]]:
    if scene.text:
        return [("text", (), f"The text says {scene.text.string}.")]
    return [("text", (), NO_TEXT)] if rng.random() < 0.1 else []


def _thing_facts(scene: Scene, rng: random.Random) -> list[tuple[str, tuple[str, ...], str]]:
    if not scene.things:
        return []
    count = len(scene.things)
    facts = [("count", (), "There is 1 object." if count == 1 else f"There are {count} objects.")]
    for thing in scene.things:
        alone = count == 1 and rng.random() < 0.5
        if _is_only(scene, "shape", thing):
            facts.append(("colour", ("object" if alone else thing.shape,), f"It is {thing.colour}."))
        if _is_only(scene, "colour", thing):
            facts.append(("shape", ("object" if alone else f"{thing.colour} object",), f"It is a {thing.shape}."))
        facts.append(("place", (_name(scene, thing, rng),), f"It is {place_phrase(thing.place)}."))
    return facts


def _relation_facts(scene: Scene, rng: random.Random) -> list[tuple[str, tuple[str, ...], str]]:
    """The answer names both things, in one order whatever the question's: a small model compares what it has just named."""
    facts = []
    for thing, other in permutations(scene.things, 2):
        side = relation(thing, other)
        if side:
            name = _name(scene, other, rng)
            phrase = f"to the {side}" if side in ("left", "right") else side
            subject = _name(scene, thing, rng)
            facts.append(("relation", (subject, name), f"Seen from the {name}, the {subject} is {phrase}."))
    return facts


def _name(scene: Scene, thing: Thing, rng: random.Random) -> str:
    """A name that only this thing has: colour and shape, or one time in four the shape alone where that is enough."""
    if _is_only(scene, "shape", thing) and rng.random() < 0.25:
        return thing.shape
    return f"{thing.colour} {thing.shape}"


def _is_only(scene: Scene, attribute: str, thing: Thing) -> bool:
    return sum(getattr(t, attribute) == getattr(thing, attribute) for t in scene.things) == 1


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _words(answer: str, vocabulary: tuple[str, ...]) -> list[str]:
    """The words of the vocabulary in the answer, in lower case or capitalised; capitals throughout are printed text."""
    return [word.lower() for word in re.findall(rf"\b({'|'.join((*vocabulary, *map(str.capitalize, vocabulary)))})s?\b", answer)]


def _printed(answer: str) -> list[str]:
    """Numbers and words in capitals: what the answer quotes from the picture."""
    return re.findall(r"\b(?:[A-Z]{2,}|\d+)\b", answer)


def _replaced(answer: str, same: dict[str, str]) -> str:
    for word, canonical in same.items():
        answer = re.sub(rf"\b{word}\b", canonical, answer)
    return answer
