"""The questions about drawn scenes: every canonical answer passes its own check, another one does not, and no phrasing is shared."""

import random
import re

import pytest

from assets.demo_model.questions import PHRASINGS, TASKS, is_right, phrasings, questions_about
from assets.demo_model.scenes import Scene, Thing, sample_scene


def thing(shape: str, colour: str, x: float, y: float) -> Thing:
    return Thing(shape, colour, "small", x, y, 0.08, 0.0)


def all_questions(num_scenes: int = 60) -> list:
    return [q for seed in range(num_scenes) for q in questions_about(sample_scene(seed), random.Random(seed), is_evaluation=False)]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_at_least_six_phrasings_and_two_of_them_for_evaluation_only(task: str) -> None:
    training, evaluation = phrasings(task, is_evaluation=False), phrasings(task, is_evaluation=True)

    assert len(PHRASINGS[task]) >= 6
    assert len(evaluation) == 2
    assert not set(training) & set(evaluation)


def test_training_questions_never_use_an_evaluation_phrasing() -> None:
    prompts = {q.prompt for q in all_questions()}
    openings = {p.split("{")[0] for task in TASKS for p in phrasings(task, is_evaluation=True) if "{" in p and not p.startswith("{")}
    whole = {p for task in TASKS for p in phrasings(task, is_evaluation=True) if "{" not in p}

    used_openings = {p.split("{")[0] for task in TASKS for p in phrasings(task, is_evaluation=False)}
    assert not prompts & whole
    assert not any(prompt.startswith(tuple(openings - used_openings)) for prompt in prompts)


def test_a_relation_is_asked_about_where_it_is_clear_and_answered_from_the_other_thing() -> None:
    scene = Scene(0, (thing("circle", "red", 0.2, 0.5), thing("star", "blue", 0.8, 0.55), thing("heart", "black", 0.5, 0.2)), ())
    questions = [q for q in questions_about(scene, random.Random(0), is_evaluation=False) if q.task == "relation"]

    assert len(questions) == 2  # the heart stands askew from both
    assert {q.answer.rpartition(" is ")[2] for q in questions} == {"to the left.", "to the right."}
    assert all(
        re.fullmatch(r"Seen from the (.*star, the .*circle is to the left|.*circle, the .*star is to the right)\.", q.answer)
        for q in questions
    )


def test_every_canonical_answer_is_accepted() -> None:
    assert all(is_right(q.task, q.answer, q.answer) for q in all_questions())


@pytest.mark.parametrize(
    ("task", "answer", "canonical"),
    [
        ("colour", "It is blue.", "It is red."),
        ("colour", "It is red or blue.", "It is red."),
        ("shape", "It is a star.", "It is a circle."),
        ("count", "There are 3 objects.", "There are 2 objects."),
        ("place", "It is at the top.", "It is at the top left."),
        ("place", "It is at the bottom left.", "It is at the top left."),
        ("relation", "Seen from the star, the heart is to the right.", "Seen from the star, the heart is to the left."),
        ("relation", "Seen from the star, the heart is.", "Seen from the star, the heart is above."),
        ("text", "The text says 427.", "The text says 472."),
        ("text", "There is no text.", "The text says STOP."),
        ("describe", "There is a small red star in the middle.", "There is a small red circle in the middle."),
        ("describe", "There is a red star on the left and a blue star on the right.", "There is a large red star on the left."),
        ("describe", "There is a large red star on the left.", "There is a large red star on the left and the text GO at the top."),
        ("describe", "I see something.", "There is a large red star on the left."),
    ],
)
def test_a_wrong_answer_is_refused(task: str, answer: str, canonical: str) -> None:
    assert not is_right(task, answer, canonical)


@pytest.mark.parametrize(
    ("task", "answer", "canonical"),
    [
        ("colour", "Red.", "It is red."),
        ("count", "I see two objects.", "There are 2 objects."),
        ("place", "In the upper left part.", "It is at the top left."),
        ("place", "It is in the centre.", "It is in the middle."),
        ("relation", "The circle is above the star.", "Seen from the star, the circle is above."),
        ("relation", "It is to the left of the star.", "Seen from the star, the circle is to the left."),
        ("text", "It says 472", "The text says 472."),
        ("describe", "A blue star and a red circle.", "There is a large red circle on the left and a small blue star on the right."),
    ],
)
def test_other_words_for_the_same_facts_are_accepted(task: str, answer: str, canonical: str) -> None:
    assert is_right(task, answer, canonical)
