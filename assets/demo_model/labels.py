"""What the patches of a scene hold, as numbers: the labels that teach the vision tower, and the pixels that they belong to.

A patch is marked when the centre of a thing or of a character lies in it. Knows nothing of networks.
"""

from dataclasses import dataclass

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor, resize

from assets.demo_model.assemble import VISION
from assets.demo_model.scenes import CHARACTERS, COLOURS, PLACES, SHAPES, SIZES, Scene, render

GRID = VISION["image_size"] // VISION["patch_size"]

# Name and number of classes of each head. Ignored where a patch has no such label (-1).
HEADS = {
    "kind": 3,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "place": len(PLACES),
    "rank": 4,
    "count": 4,
    "character": len(CHARACTERS),
    "index": 6,
}


@dataclass(frozen=True, slots=True)
class PatchLabels:
    """`classes`: (num_patches, num_heads) int64, -1 where a head does not apply. `centre`: (num_patches, 2) float32 in 0..1."""

    classes: torch.Tensor
    centre: torch.Tensor


def patch_labels(scene: Scene) -> PatchLabels:
    """The labels of the patches of one scene."""
    classes = torch.full((GRID * GRID, len(HEADS)), -1)
    classes[:, 0] = 0
    centre = torch.zeros(GRID * GRID, 2)
    columns = {name: i for i, name in enumerate(HEADS)}

    def put(x: float, y: float, **labels: int) -> None:
        patch = int(y * GRID) * GRID + int(x * GRID)
        for name, value in labels.items():
            classes[patch, columns[name]] = value
        centre[patch] = torch.tensor([x, y])

    for rank, thing in enumerate(scene.things):
        put(
            thing.x,
            thing.y,
            kind=1,
            shape=SHAPES.index(thing.shape),
            colour=COLOURS.index(thing.colour),
            size=SIZES.index(thing.size),
            place=PLACES.index(thing.place),
            rank=rank,
            count=len(scene.things) - 1,
        )
    for text in scene.texts:
        place = PLACES.index(text.place)
        for index, (x, y) in enumerate(text.centres()):
            put(x, y, kind=2, character=CHARACTERS.index(text.string[index]), index=index, place=place)
    return PatchLabels(classes, centre)


def pixels_of(scene: Scene) -> torch.Tensor:
    """The rendered scene at the tower's size: (3, side, side) uint8."""
    picture = pil_to_tensor(render(scene))
    if picture.shape[-1] == VISION["image_size"]:
        return picture
    return resize(picture, [VISION["image_size"]] * 2, interpolation=InterpolationMode.BICUBIC, antialias=True)
