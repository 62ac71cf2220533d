"""The second renderer, for evaluation only: the same scenes through matplotlib, with its fonts and other colour values.

Never used in training or to choose a checkpoint; it shows how much the model learned about pictures and how much about Pillow.
"""

import io
import math
import random

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, PathPatch, Polygon
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from PIL import Image

from assets.demo_model.scenes import Scene, Text, Thing, contrast, outline

# Named values of matplotlib and the web; none is drawn from the boxes that the first renderer draws from.
COLOUR_VALUES = {
    "red": ("#d62728", "#ff0000", "#e3242b", "#c1121f"),
    "green": ("#2ca02c", "#008000", "#228b22", "#3cb043"),
    "blue": ("#1f77b4", "#0000ff", "#4169e1", "#1e50c8"),
    "yellow": ("#ffff00", "#ffd700", "#fee12b", "#f9e814"),
    "orange": ("#ff7f0e", "#ff8c00", "#fb8b24", "#f77f00"),
    "purple": ("#800080", "#7b2cbf", "#9467bd", "#663399"),
    "black": ("#000000", "#1a1a1a", "#14121e", "#111111"),
    "white": ("#ffffff", "#fafafa", "#fffdf7", "#f5f5f5"),
}
BACKGROUND_VALUES = (
    "#ffffff", "#f0f0f0", "#d9e2ec", "#fdf1dc", "#e8f5e9", "#fce4ec", "#c5cae9", "#b0bec5", "#9e9e9e", "#bcaaa4",
    "#607d8b", "#455a64", "#37474f", "#212121", "#263238", "#3e2723", "#80cbc4", "#ffccbc", "#d1c4e9", "#a5d6a7",
)  # fmt: skip
FONTS = (
    FontProperties(family="DejaVu Sans"),
    FontProperties(family="DejaVu Sans", weight="bold"),
    FontProperties(family="DejaVu Serif"),
    FontProperties(family="STIXGeneral", weight="bold"),
    FontProperties(family="cmss10"),
)
SIDES_PX = (224, 256, 320, 448)
MIN_CONTRAST = 190.0


def render_second(scene: Scene) -> Image.Image:
    """Paint the scene with matplotlib: an RGB picture of 224 to 448 pixels a side, most with JPEG artefacts."""
    rng = random.Random(scene.seed ^ 0xA66)
    side_px = rng.choice(SIDES_PX)
    paints, background = _choose_values(rng, scene)
    figure = Figure(figsize=(side_px / 100, side_px / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(1, 0))
    axes.axis("off")
    axes.imshow(_background(rng, background), extent=(0, 1, 1, 0), interpolation="bicubic", aspect="auto")
    axes.set(xlim=(0, 1), ylim=(1, 0))
    for thing, paint in zip(scene.things, paints, strict=False):
        axes.add_patch(_thing_patch(thing, paint))
    if scene.text:
        font = rng.choice(FONTS)
        for patch in _text_patches(scene.text, font, paints[-1]):
            axes.add_patch(patch)
    canvas.draw()
    return _finish(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()), rng)


def _choose_values(rng: random.Random, scene: Scene) -> tuple[list[str], tuple[str, str]]:
    """Colours of the things and the text, and a background that they stand out from."""
    names = [t.colour for t in scene.things] + ([scene.text.colour] if scene.text else [])
    floor = MIN_CONTRAST
    while True:
        paints = [rng.choice(COLOUR_VALUES[name]) for name in names]
        first = rng.choice(BACKGROUND_VALUES)
        second = first if rng.random() < 0.5 else rng.choice(BACKGROUND_VALUES)
        if all(contrast(_rgb(p), _rgb(end)) >= floor for p in paints for end in (first, second)):
            return paints, (first, second)
        floor -= 1.0


def _rgb(value: str) -> tuple[int, int, int]:
    return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)


def _background(rng: random.Random, ends: tuple[str, str]) -> np.ndarray:
    """Plain or a gradient between two corners, one time in two with noise. Returns (64, 64, 3) uint8."""
    low, high = (np.array(_rgb(end), dtype=np.float32) for end in ends)
    ramp = np.linspace(0, 1, 64, dtype=np.float32)
    weight = {0: ramp[:, None], 1: ramp[None], 2: (ramp[:, None] + ramp[None]) / 2}[rng.randrange(3)]
    pixels = low + (high - low) * np.broadcast_to(weight, (64, 64))[..., None]
    if rng.random() < 0.5:
        pixels = pixels + np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 10), (64, 64, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _thing_patch(thing: Thing, paint: str) -> PathPatch | Circle | Polygon:
    if thing.shape == "circle":
        return Circle((thing.x, thing.y), thing.radius, facecolor=paint, linewidth=0)
    turn = Affine2D().scale(thing.radius).rotate(math.radians(thing.angle)).translate(thing.x, thing.y)
    return Polygon(turn.transform(outline(thing.shape)), closed=True, facecolor=paint, linewidth=0)


def _text_patches(text: Text, font: FontProperties, paint: str) -> list[PathPatch]:
    """Each character's outline, centred on its own place. `TextPath` has y upward, the picture downward."""
    patches = []
    for character, (x, y) in zip(text.string, text.centres(), strict=True):
        glyph = TextPath((0, 0), character, size=1, prop=font)
        box = glyph.get_extents()
        place = Affine2D().translate(-(box.x0 + box.x1) / 2, -0.36).scale(text.height, -text.height)
        place = place.rotate(math.radians(text.angle)).translate(x, y)
        patches.append(PathPatch(Outline(place.transform(glyph.vertices), glyph.codes), facecolor=paint, linewidth=0))
    return patches


def _finish(picture: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() > 0.7:
        return picture
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=rng.randrange(60, 96))
    return Image.open(buffer).convert("RGB")
