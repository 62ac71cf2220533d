"""Drawn scenes: what is in a picture, and the first renderer (Pillow).

`sample_scene(seed)` decides everything that a question may ask about; `render(scene)` paints it.
Both depend on the seed alone (and on the fonts that are installed, see `requirements.txt`).
Coordinates are fractions of the picture's side, x to the right, y downward; angles are in degrees.
Knows nothing of questions, tokens or models.
"""

import io
import math
import random
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
RADII = {"small": (0.065, 0.09), "large": (0.13, 0.175)}

# Words that the model may meet. It reads characters but it can only spell what it has learned to spell.
WORDS = tuple(
    """ART BALL BANK BAR BIG BIRD BLUE BOAT BOOK BOX BUS BYE CAFE CAR CARD CAT CITY CLUB COLD CUP DAY DOG DOOR DOWN
    EAST EAT END EXIT FAST FILE FIRE FISH FIVE FOOD FOUR FREE FUN GAME GATE GIFT GO GOLD GOOD GREEN HAT HELLO HELP HERE HI
    HOME HOT HOTEL HOUSE ICE INFO JAM JAZZ KEY KING LAKE LEFT LIFE LIGHT LOVE MAP MARS MENU MILK MOON MUSIC NEW NINE NO NORTH
    OFF OK ON ONE OPEN PARK PAY PEN PIZZA PLAY QUIZ RAIN RED ROAD ROOM RUN SALE SEA SHOP SIX SKY SNOW SOUTH STAR STOP SUN TAXI
    TEA TEN TIME TOP TREE TWO UP VAN WAIT WATER WAY WEST WIN WOOD WORLD YES YOU ZERO ZOO""".split()  # noqa: SIM905
)

# Hue in degrees, saturation and value in per cent: (from, to) each. Training draws anywhere in these boxes.
COLOUR_BOXES = {
    "red": ((-10, 7), (75, 100), (65, 100)),
    "orange": ((21, 37), (80, 100), (85, 100)),
    "yellow": ((47, 60), (65, 100), (85, 100)),
    "green": ((92, 150), (45, 100), (38, 90)),
    "blue": ((203, 245), (60, 100), (45, 100)),
    "purple": ((264, 296), (40, 100), (38, 88)),
    "black": ((0, 360), (0, 30), (0, 13)),
    "white": ((0, 360), (0, 3), (94, 100)),
}
FONT_PACKAGES = (
    *("font-roboto", "font-source-sans-pro", "font-source-serif-pro", "font-manrope", "font-hanken-grotesk"),
    *("font-caladea", "font-fredoka-one", "font-lato"),
)
PYMUPDF_FONTS = ("figo", "figbo", "notos", "notosbo", "ubuntu", "ubuntubo", "ubuntm", "ubuntmbo")
FONT_WEIGHTS = ("Regular", "Medium", "Semibold", "SemiBold", "Bold", "ExtraBold", "Black")
SIDES_PX = (224, 224, 224, 288, 384)

DIGITS, LETTERS = "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHARACTERS = DIGITS + LETTERS
MAX_TEXTS = 5

# Two characters must not share one patch (1/8 of the side) of the vision tower.
MIN_ADVANCE = 0.15
STRETCHES, SLANTS, STROKES_PX = (0.75, 1.3), (-0.1, 0.3), (0, 0, 1, 2)
PLACE_MARGIN = 0.03
MIN_CONTRAST = 190.0
MAX_TILT = 25.0  # a square stays a square, not a diamond


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn object. `x`, `y` and `radius` are fractions of the side; no two things overlap."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)


@dataclass(frozen=True, slots=True)
class Text:
    """One printed word or number. `advance` is the distance between characters, `height` the font size, as fractions of the side."""

    string: str
    colour: str
    x: float
    y: float
    advance: float
    height: float
    angle: float

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)

    def centres(self) -> list[tuple[float, float]]:
        """The middle of each character, in reading order."""
        turn = math.radians(self.angle)
        offsets = [(i - (len(self.string) - 1) / 2) * self.advance for i in range(len(self.string))]
        return [(self.x + d * math.cos(turn), self.y + d * math.sin(turn)) for d in offsets]


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a picture shows: things in reading order, texts, and the seed that fixes how it is painted.

    Only the scenes that teach the tower to read hold more than one text; nothing is asked about them.
    """

    seed: int
    things: tuple[Thing, ...]
    texts: tuple[Text, ...]

    @property
    def text(self) -> Text | None:
        return self.texts[0] if self.texts else None


def place_of(x: float, y: float) -> str:
    """The name of the ninth of the picture that holds (x, y)."""
    return PLACES[min(int(y * 3), 2) * 3 + min(int(x * 3), 2)]


def reading_order(thing: Thing) -> tuple[int, int]:
    """Row, then column, of the patch (of 8 × 8) that holds the centre."""
    return int(thing.y * 8), int(thing.x * 8)


def sample_scene(seed: int, *, num_things: int | None = None, with_text: bool | None = None) -> Scene:
    """Draw a scene: 1 to 4 things, or (one time in four) a text with 0 to 2 things."""
    rng = random.Random(seed)
    with_text = rng.random() < 0.25 if with_text is None else with_text
    text = _sample_text(rng) if with_text else None
    if num_things is None:
        num_things = rng.choice((0, 0, 1, 2)) if with_text else rng.choice((1, 1, 2, 2, 3, 4))
    things: list[Thing] = []
    while len(things) < num_things:
        thing = _sample_thing(rng)
        if _is_free(thing, things, text):
            things.append(thing)
    return Scene(seed, tuple(sorted(things, key=reading_order)), (text,) if text else ())


def sample_printed_scene(seed: int) -> Scene:
    """A page of up to `MAX_TEXTS` texts of random characters in one colour: many characters to learn from at once."""
    rng = random.Random(seed)
    colour = rng.choice(COLOURS)
    texts: list[Text] = []
    for _ in range(3 * MAX_TEXTS):
        alphabet = rng.choice((DIGITS, LETTERS))
        text = _set_text(rng, "".join(rng.choices(alphabet, k=rng.randrange(1, 6))), colour)
        if len(texts) < MAX_TEXTS and all(_is_apart(text, other) for other in texts):
            texts.append(text)
    return Scene(seed, (), tuple(texts))


def render(scene: Scene) -> Image.Image:
    """Paint the scene with Pillow: an RGB picture of 224 to 384 pixels a side, most with JPEG artefacts."""
    rng = random.Random(scene.seed ^ 0x5EED)
    side_px = rng.choice(SIDES_PX)
    paints, ends = _choose_paints(rng, scene)
    canvas = _background(rng, ends, side_px)
    for thing, paint in zip(scene.things, paints, strict=False):
        _paint_thing(canvas, rng, thing, paint)
    for text in scene.texts:
        _paint_text(canvas, rng, text, paints[-1])
    return _finish(canvas, rng)


def colour_value(rng: random.Random, colour: str) -> tuple[int, int, int]:
    """An RGB value that goes by the name `colour`."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in COLOUR_BOXES[colour])
    return _from_hsv(hue, saturation / 100, value / 100)


def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """How far apart two RGB values look, 0 to 765 (the 'redmean' distance)."""
    mean = (a[0] + b[0]) / 2
    red, green, blue = (p - q for p, q in zip(a, b, strict=True))
    return math.sqrt((2 + mean / 256) * red**2 + 4 * green**2 + (2 + (255 - mean) / 256) * blue**2)


def outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape in the unit circle, y downward; curves have many corners."""
    turns = [2 * math.pi * i / 48 for i in range(48)]
    if shape == "circle":
        return [(math.cos(t), math.sin(t)) for t in turns]
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(math.sin(t), -math.cos(t)) for t in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    if shape == "star":
        return [((1, 0.42)[i % 2] * math.sin(i * math.pi / 5), -(1, 0.42)[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]
    if shape == "heart":
        return [(math.sin(t) ** 3, (-13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t)) / 16.5) for t in turns]
    arm = 0.32
    corner = [(arm, -0.95), (arm, -arm), (0.95, -arm)]
    return [p for k in range(4) for p in _quarter_turns(corner, k)]


def _quarter_turns(points: list[tuple[float, float]], times: int) -> list[tuple[float, float]]:
    for _ in range(times):
        points = [(-y, x) for x, y in points]
    return points


def _sample_thing(rng: random.Random) -> Thing:
    size = rng.choice(SIZES)
    radius = rng.uniform(*RADII[size])
    x, y = (_sample_position(rng, radius) for _ in range(2))
    angle = 0.0 if rng.random() < 0.3 else rng.uniform(-MAX_TILT, MAX_TILT)
    return Thing(rng.choice(SHAPES), rng.choice(COLOURS), size, x, y, radius, angle)


def _sample_position(rng: random.Random, radius: float) -> float:
    """A coordinate that keeps off the border and off the lines between the thirds; each third is as likely."""
    third = rng.randrange(3)
    low = max(third / 3 + (PLACE_MARGIN if third else 0), radius + 0.01)
    high = min((third + 1) / 3 - (PLACE_MARGIN if third < 2 else 0), 1 - radius - 0.01)
    return rng.uniform(low, high)


def _sample_text(rng: random.Random) -> Text:
    if rng.random() < 0.55:
        num_digits = rng.choice((1, 2, 3, 3, 3, 4))
        string = str(rng.randrange(10 ** (num_digits - 1), 10**num_digits))
    else:
        string = rng.choice(WORDS)
    return _set_text(rng, string, rng.choice(COLOURS))


def _set_text(rng: random.Random, string: str, colour: str) -> Text:
    """Choose size and position of a text."""
    advance = rng.uniform(MIN_ADVANCE, min(0.2, 0.92 / len(string)))
    height = advance * rng.uniform(1.15, 1.5)
    half = len(string) * advance / 2
    x, y = _text_position(rng, half), _text_position(rng, height * 0.6)
    return Text(string, colour, x, y, advance, height, rng.uniform(-4, 4))


def _text_position(rng: random.Random, half: float) -> float:
    """A coordinate whose third is clear; the middle third is where a long word has to be."""
    while True:
        value = rng.uniform(min(half + 0.01, 0.5), max(1 - half - 0.01, 0.5))
        if abs(value - 1 / 3) > PLACE_MARGIN and abs(value - 2 / 3) > PLACE_MARGIN:
            return value


def _is_free(thing: Thing, things: list[Thing], text: Text | None) -> bool:
    for other in things:
        if (other.shape, other.colour) == (thing.shape, thing.colour):
            return False
        if math.hypot(other.x - thing.x, other.y - thing.y) < other.radius + thing.radius + 0.02:
            return False
    if text is None:
        return True
    half_width = len(text.string) * text.advance / 2 + thing.radius
    return abs(thing.x - text.x) > half_width or abs(thing.y - text.y) > text.height * 0.65 + thing.radius


def _is_apart(text: Text, other: Text) -> bool:
    """Whether the lines' boxes keep off each other."""
    half_widths = (len(text.string) * text.advance + len(other.string) * other.advance) / 2
    return abs(text.x - other.x) > half_widths or abs(text.y - other.y) > 0.55 * (text.height + other.height)


def _choose_paints(rng: random.Random, scene: Scene) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Colour values of the things and the text, and the two ends of a background that all of them stand out from."""
    names = [t.colour for t in scene.things] + ([scene.text.colour] if scene.text else [])
    floor = MIN_CONTRAST
    while True:
        paints = [colour_value(rng, name) for name in names]
        first = _background_value(rng)
        second = first if rng.random() < 0.4 else _background_value(rng)
        if all(contrast(p, end) >= floor for p in paints for end in (first, second)):
            return paints, [first, second]
        floor -= 1.0


def _background_value(rng: random.Random) -> tuple[int, int, int]:
    """Half the backgrounds are pale, a quarter dark, the others of any colour."""
    kind = rng.random()
    if kind < 0.5:
        return _from_hsv(rng.uniform(0, 360), rng.uniform(0, 0.25), rng.uniform(0.75, 1))
    if kind < 0.75:
        return _from_hsv(rng.uniform(0, 360), rng.uniform(0, 0.5), rng.uniform(0.05, 0.5))
    return _from_hsv(rng.uniform(0, 360), rng.uniform(0.1, 0.8), rng.uniform(0.3, 1))


def _from_hsv(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    def channel(n: int) -> int:
        k = (n + hue / 60) % 6
        return round(255 * (value - value * saturation * max(0, min(k, 4 - k, 1))))

    return channel(5), channel(3), channel(1)


def _background(rng: random.Random, ends: list[tuple[int, int, int]], side_px: int) -> Image.Image:
    """Plain where both ends agree, else a gradient in a random direction; half of them noisy."""
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, side_px, dtype=np.float32)
    ramp = np.clip(0.5 + (axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)), 0, 1)[..., None]
    low, high = (np.array(end, dtype=np.float32) for end in ends)
    pixels = low + (high - low) * ramp
    if rng.random() < 0.5:
        pixels = pixels + _noise(rng, side_px)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _noise(rng: random.Random, side_px: int) -> np.ndarray:
    """Zero-mean noise of 2 to 10 levels, grains of 1 to 4 pixels, grey or coloured. Returns (side, side, 1 or 3) float32."""
    grain = rng.choice((1, 1, 2, 4))
    shape = (side_px // grain, side_px // grain, rng.choice((1, 3)))
    values = np.random.default_rng(rng.getrandbits(32)).standard_normal(shape, dtype=np.float32)
    return values.repeat(grain, 0).repeat(grain, 1) * rng.uniform(2, 10)


def _paint_thing(canvas: Image.Image, rng: random.Random, thing: Thing, paint: tuple[int, int, int]) -> None:
    """Fill the shape through a mask that is drawn four times too large, for smooth edges."""
    side_px, scale = canvas.width, 4
    left, top = (int((c - thing.radius) * side_px) - 1 for c in (thing.x, thing.y))
    box_px = int(2 * thing.radius * side_px) + 4
    turn = math.radians(thing.angle)
    points = [
        (
            (thing.x * side_px - left + thing.radius * side_px * (x * math.cos(turn) - y * math.sin(turn))) * scale,
            (thing.y * side_px - top + thing.radius * side_px * (x * math.sin(turn) + y * math.cos(turn))) * scale,
        )
        for x, y in outline(thing.shape)
    ]
    mask = Image.new("L", (box_px * scale, box_px * scale))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    canvas.paste(paint, (left, top), mask.reduce(scale))
    if rng.random() < 0.05:
        _paint_edge(canvas, points, (left, top), box_px, tuple(c // 2 for c in paint))


def _paint_edge(
    canvas: Image.Image, points: list[tuple[float, float]], corner: tuple[int, int], box_px: int, paint: tuple[int, ...]
) -> None:
    mask = Image.new("L", (box_px * 4, box_px * 4))
    ImageDraw.Draw(mask).line([*points, points[0]], fill=255, width=6)
    canvas.paste(paint, corner, mask.reduce(4))


def _paint_text(canvas: Image.Image, rng: random.Random, text: Text, paint: tuple[int, int, int]) -> None:
    """Set each character at its own place on a strip of twice the size, slant and turn the strip, and paint through it.

    Every second text is stretched, slanted and thickened at random: characters are to be learned, not the glyphs of these fonts.
    """
    scale = 2 * canvas.width
    font = _font(rng.randrange(len(fonts())), round(text.height * scale))
    stretch, slant, stroke_px = 1.0, 0.0, 0
    if rng.random() < 0.5:
        stretch, slant, stroke_px = rng.uniform(*STRETCHES), rng.uniform(*SLANTS), rng.choice(STROKES_PX)
    width, height = (2 * round(canvas.width * side) for side in (len(text.string) * text.advance + 0.1, 1.6 * text.height))
    mask = Image.new("L", (width, height))
    corner = [round(text.x * canvas.width) - width // 4, round(text.y * canvas.width) - height // 4]
    baseline = (text.y + 0.36 * text.height) * scale - 2 * corner[1]
    for i, character in enumerate(text.string):
        x = (text.x + (i - (len(text.string) - 1) / 2) * text.advance) * scale - 2 * corner[0]
        glyph = _glyph(font, character, stroke_px, height, baseline)
        glyph = glyph.resize((max(1, round(min(glyph.width * stretch, 0.95 * text.advance * scale))), height))
        mask.paste(255, (round(x - glyph.width / 2), 0), glyph)
    mask = mask.transform(mask.size, Image.Transform.AFFINE, (1, slant, -slant * height / 2, 0, 1, 0), Image.Resampling.BILINEAR)
    canvas.paste(paint, tuple(corner), mask.rotate(-text.angle, Image.Resampling.BILINEAR).reduce(2))


def _glyph(font: ImageFont.FreeTypeFont, character: str, stroke_px: int, height: int, baseline: float) -> Image.Image:
    """A mask as wide as the character."""
    left, _, right, _ = font.getbbox(character, anchor="ls", stroke_width=stroke_px)
    glyph = Image.new("L", (max(1, math.ceil(right - left)), height))
    ImageDraw.Draw(glyph).text((-left, baseline), character, fill=255, font=font, anchor="ls", stroke_width=stroke_px)
    return glyph


@cache
def fonts() -> tuple[Path | bytes | None, ...]:
    """Upright fonts of the installed font packages (files or their contents), in a fixed order; Pillow's own if there is none."""
    found: list[Path | bytes] = []
    for package in FONT_PACKAGES:
        try:
            entries = files(package) or []
        except PackageNotFoundError:
            continue
        wanted = [e for e in entries if e.suffix in (".ttf", ".otf") and e.stem.rpartition("-")[2] in FONT_WEIGHTS]
        unique = {e.stem: e for e in sorted(wanted, key=str)}
        found += [Path(unique[stem].locate()) for stem in sorted(unique)]
    with suppress(ModuleNotFoundError):
        buffers = import_module("pymupdf_fonts").fontbuffers
        found += [buffers[name]() for name in PYMUPDF_FONTS]
    return tuple(found) or (None,)


@lru_cache(maxsize=512)
def _font(index: int, size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    source = fonts()[index]
    if source is None:
        return ImageFont.load_default(size_px)
    return ImageFont.truetype(io.BytesIO(source) if isinstance(source, bytes) else source, size_px)


def _finish(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Four pictures in five went through JPEG once."""
    if rng.random() > 0.8:
        return canvas
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=rng.randrange(55, 96))
    return Image.open(buffer).convert("RGB")
