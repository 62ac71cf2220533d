"""Small drawn pictures as files."""

import io

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")


def drawn(number: int, *, side_px: int = 96) -> bytes:
    """A PNG of one disc, different for each number below 512."""
    colour, x, y = COLOURS[number % 8], number // 8 % 8, number // 64
    image = Image.new("RGB", (side_px, side_px), "gray")
    left, top = 4 + x * side_px // 12, 4 + y * side_px // 12
    ImageDraw.Draw(image).ellipse((left, top, left + side_px // 3, top + side_px // 3), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
