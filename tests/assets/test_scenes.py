"""The drawn scenes: all of it follows from the seed, and what a scene says is where it says it is."""

import math

from PIL import Image, ImageChops

from assets.demo_model.labels import GRID, HEADS, patch_labels
from assets.demo_model.scenes import (
    CHARACTERS,
    COLOURS,
    MAX_TEXTS,
    PLACES,
    SHAPES,
    SIZES,
    place_of,
    reading_order,
    render,
    sample_printed_scene,
    sample_scene,
)


def test_a_seed_always_gives_the_same_scene_and_the_same_pixels() -> None:
    for seed in range(8):
        assert sample_scene(seed) == sample_scene(seed)
        assert ImageChops.difference(render(sample_scene(seed)), render(sample_scene(seed))).getbbox() is None


def test_different_seeds_give_different_pictures() -> None:
    assert render(sample_scene(1)).tobytes() != render(sample_scene(2)).tobytes()


def test_scenes_use_every_shape_colour_size_and_place() -> None:
    things = [thing for seed in range(400) for thing in sample_scene(seed).things]

    assert {t.shape for t in things} == set(SHAPES)
    assert {t.colour for t in things} == set(COLOURS)
    assert {t.size for t in things} == set(SIZES)
    assert {t.place for t in things} == set(PLACES)


def test_a_scene_holds_one_to_four_things_that_do_not_touch_or_repeat() -> None:
    for seed in range(200):
        scene = sample_scene(seed)
        names = [(t.shape, t.colour) for t in scene.things]
        assert (0 if scene.text else 1) <= len(names) <= 4
        assert len(set(names)) == len(names)
        for i, a in enumerate(scene.things):
            assert all(math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius for b in scene.things[:i])


def test_things_stand_in_reading_order_and_keep_off_the_lines_between_the_places() -> None:
    for seed in range(200):
        things = sample_scene(seed).things
        assert list(things) == sorted(things, key=reading_order)
        assert all(abs(value - line) > 0.02 for t in things for value in (t.x, t.y) for line in (1 / 3, 2 / 3))


def test_places_are_named_row_by_row() -> None:
    assert place_of(0.1, 0.1) == "top left"
    assert place_of(0.5, 0.5) == "middle"
    assert place_of(0.9, 0.5) == "right"
    assert place_of(0.5, 0.99) == "bottom"


def test_a_picture_is_square_rgb_of_a_usual_size() -> None:
    pictures = [render(sample_scene(seed)) for seed in range(12)]

    assert all(isinstance(p, Image.Image) and p.mode == "RGB" and p.width == p.height and 224 <= p.width <= 384 for p in pictures)


def test_a_printed_scene_holds_several_texts_whose_characters_keep_to_patches_of_their_own() -> None:
    scenes = [sample_printed_scene(seed) for seed in range(100)]

    assert max(len(scene.texts) for scene in scenes) > 2
    assert all(0 < len(scene.texts) <= MAX_TEXTS for scene in scenes)
    assert {character for scene in scenes for text in scene.texts for character in text.string} == set(CHARACTERS)
    for scene in scenes:
        patches = [(int(x * GRID), int(y * GRID)) for text in scene.texts for x, y in text.centres()]
        assert len(set(patches)) == len(patches)


def test_labels_name_the_character_whose_centre_lies_in_the_patch() -> None:
    scene = sample_printed_scene(3)
    column = list(HEADS).index("character")
    labels = patch_labels(scene).classes[:, column].reshape(GRID, GRID)

    for text in scene.texts:
        for character, (x, y) in zip(text.string, text.centres(), strict=True):
            assert CHARACTERS[int(labels[int(y * GRID), int(x * GRID)])] == character
    assert int((labels >= 0).sum()) == sum(len(text.string) for text in scene.texts)
