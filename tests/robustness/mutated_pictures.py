"""Hostile files: pictures of the seven formats with damage, bombs that claim or unfold to more than they weigh, and what only poses as one.

All from a seed, so that a file that does harm can be made again. Sends nothing and decodes nothing.
"""

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms

Named = tuple[str, bytes]  # what it is, the file


def pictures() -> dict[str, bytes]:
    """Good pictures, small, of every format in several of its kinds."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels)
    rgb, gray, palette = rgba.convert("RGB"), rgba.convert("L"), rgba.convert("RGB").quantize(16)
    frames = [rgb, rgb.rotate(90), rgb.rotate(180)]
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # when it was made: equal seeds give equal files
    exif = Image.Exif()
    exif[0x0112] = 6
    gray16 = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    made = {
        "jpeg": (rgb, "JPEG", {"exif": exif.tobytes(), "icc_profile": bytes(profile)}),
        "jpeg progressive": (rgb, "JPEG", {"progressive": True, "quality": 30}),
        "jpeg cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "jpeg gray": (gray, "JPEG", {"restart_marker_blocks": 1}),
        "png": (rgba, "PNG", {"icc_profile": bytes(profile)}),
        "png 16": (gray16, "PNG", {}),
        "png palette": (palette, "PNG", {"transparency": 0}),
        "png animated": (rgb, "PNG", {"save_all": True, "append_images": frames}),
        "gif": (palette, "GIF", {"transparency": 1}),
        "gif animated": (rgb, "GIF", {"save_all": True, "append_images": frames, "duration": 10}),
        "webp": (rgb, "WEBP", {"quality": 50, "exif": exif.tobytes()}),
        "webp lossless": (rgba, "WEBP", {"lossless": True}),
        "webp animated": (rgb, "WEBP", {"save_all": True, "append_images": frames}),
        "avif": (rgb, "AVIF", {}),
        "avif alpha": (rgba, "AVIF", {"quality": 40}),
        "bmp": (rgb, "BMP", {}),
        "bmp palette": (palette, "BMP", {}),
        "tiff": (rgb, "TIFF", {}),
        "tiff deflate": (rgba, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff lzw": (gray16, "TIFF", {"compression": "tiff_lzw"}),
        "tiff jpeg": (rgb, "TIFF", {"compression": "jpeg"}),
        "tiff pages": (rgb, "TIFF", {"save_all": True, "append_images": frames}),
    }
    return {name: _saved(image, form, options) for name, (image, form, options) in made.items()}


def _saved(image: Image.Image, form: str, options: dict[str, object]) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)  # type: ignore[arg-type]
    return file.getvalue()


_TELLING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutated(seed: int) -> Iterator[Named]:
    """Damaged pictures without end, the same for the same seed."""
    chance = random.Random(seed)
    good = pictures()
    names = list(good)
    while True:
        name = chance.choice(names)
        data = bytearray(good[name])
        steps = [chance.choice(_DAMAGES) for _ in range(chance.choice((1, 1, 1, 2, 4)))]
        for damage in steps:
            if data:
                damage(chance, data, good[chance.choice(names)])
        yield f"{name}: {', '.join(damage.__name__[1:] for damage in steps)}", bytes(data)


def _flip_bits(chance: random.Random, data: bytearray, other: bytes) -> None:
    for _ in range(chance.choice((1, 2, 8, 32))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set_bytes(chance: random.Random, data: bytearray, other: bytes) -> None:
    start = chance.randrange(len(data))
    for place in range(start, min(start + chance.choice((1, 2, 4, 16)), len(data))):
        data[place] = chance.randrange(256)


def _set_number(chance: random.Random, data: bytearray, other: bytes) -> None:
    """A telling number of either byte order, mostly near the beginning, where sizes and offsets stand."""
    number, width = chance.choice(_TELLING), chance.choice((2, 4))
    place = min(int(chance.expovariate(1 / 40)), len(data) - 1)
    order = ">" if chance.random() < 0.5 else "<"
    data[place : place + width] = struct.pack(f"{order}I", number)[-width:] if order == ">" else struct.pack("<I", number)[:width]


def _cut(chance: random.Random, data: bytearray, other: bytes) -> None:
    del data[chance.randrange(len(data)) :]


def _take_out(chance: random.Random, data: bytearray, other: bytes) -> None:
    start = chance.randrange(len(data))
    del data[start : start + chance.choice((1, 4, 64))]


def _repeat(chance: random.Random, data: bytearray, other: bytes) -> None:
    start = chance.randrange(len(data))
    data[start:start] = data[start : start + chance.choice((4, 64, 256))] * chance.choice((1, 3, 50))


def _splice(chance: random.Random, data: bytearray, other: bytes) -> None:
    data[chance.randrange(len(data)) :] = other[chance.randrange(len(other)) :]


_DAMAGES = (_flip_bits, _set_bytes, _set_number, _set_number, _cut, _take_out, _repeat, _splice)


def bombs() -> dict[str, bytes]:
    """Files that claim gigapixels, unfold to more memory than is allowed, or are of no format that is read."""
    huge = 60_000
    zeros = zlib.compress(bytes(64 << 20), 9)
    profile_bomb = b"bomb\0\0" + zlib.compress(bytes(256 << 20), 9)
    made = {
        "png claims gigapixels": _png(huge, huge, zlib.compress(b"\0" * 1000)),
        "png claims all there is": _png(0x7FFFFFFF, 0x7FFFFFFF, b""),
        "png unfolds beyond its size": _png(8, 8, zeros),
        "png wide": _png(50_000_000, 1, zlib.compress(b"\0" * 1000)),
        "png with a text that unfolds": _png(8, 8, zlib.compress(bytes(8 * 25)), (b"zTXt", b"a\0\0" + zeros)),
        "png with a profile that unfolds": _png(8, 8, zlib.compress(bytes(8 * 25)), (b"iCCP", profile_bomb)),
        "png with a thousand chunks": _png(8, 8, zlib.compress(bytes(8 * 25)), *((b"tEXt", b"a\0b") for _ in range(1000))),
        "gif claims gigapixels": _gif(65535, 65535, _gif_frame(0, 0, 65535, 65535)),
        "gif frame outside": _gif(8, 8, _gif_frame(60000, 60000, 60000, 60000)),
        "gif of ten thousand frames": _gif(1, 1, _gif_frame(0, 0, 1, 1) * 10_000),
        "webp claims the most": _webp(0xFFFFFF, 0xFFFFFF),
        "webp of no frames": _webp(7, 7, b"ANIM" + struct.pack("<I", 6) + bytes(6)),
        "tiff claims gigapixels": _tiff({256: huge, 257: huge, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: huge, 279: 0xFFFFFFF0}),
        "tiff of endless strips": _tiff({256: 8, 257: 8, 258: 8, 259: 5, 262: 1, 273: 0xFFFFFFF0, 277: 1, 278: 1, 279: 0xFFFFFFFF}),
        "tiff whose pages turn in a circle": _tiff({256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}, following=8),
        "tiff of 65535 samples": _tiff({256: 8, 257: 8, 258: 8, 259: 1, 262: 2, 273: 8, 277: 65535, 278: 8, 279: 64}),
        "avif claims gigapixels": _avif_claiming(65535, 65535),
        "bmp claims gigapixels": _bmp(huge, huge),
        "bmp upside down": _bmp(huge, -huge),
        "bmp of negative width": _bmp(-8, 8),
        "jpeg claims the most": _jpeg_claiming(65535, 65535),
    }
    return made | _impostors()


def _impostors() -> dict[str, bytes]:
    """Files of formats that Pillow knows and this server does not open, and of none."""
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    forms = ("PPM", "ICO", "PCX", "TGA", "SGI", "PDF", "EPS", "ICNS", "DDS", "SPIDER", "MSP", "XBM", "JPEG2000")
    found = {}
    for form in forms:
        mode = {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(form, "RGB")
        image = picture.resize((16, 16)).convert(mode)
        file = io.BytesIO()
        try:
            image.save(file, form)
        except (OSError, KeyError, ValueError):  # this Pillow was built without it
            continue
        found[f"{form.lower()} in disguise"] = file.getvalue()
    return found | {
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>1</script></svg>',
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
        "html": b"<html><img src=x></html>",
        "nothing": b"",
        "one byte": b"\x89",
        "zeros": bytes(4096),
    }


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, data: bytes, *before: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), *(_chunk(kind, body) for kind, body in before), _chunk(b"IDAT", data), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _gif(width: int, height: int, frames: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frames + b"\x3b"


def _gif_frame(left: int, top: int, width: int, height: int) -> bytes:
    return b"\x2c" + struct.pack("<HHHHB", left, top, width, height, 0) + b"\x02\x02\x44\x01\x00"


def _webp(width: int, height: int, more: bytes = b"") -> bytes:
    """An animation's canvas. width, height: less one, as they are written."""
    canvas = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas + more
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(tags: dict[int, int], *, following: int = 0) -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", following) + bytes(64)


def _bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def _avif_claiming(width: int, height: int) -> bytes:
    data = bytearray(pictures()["avif"])
    place = data.index(b"ispe")
    data[place + 8 : place + 16] = struct.pack(">II", width, height)
    return bytes(data)


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(pictures()["jpeg cmyk"])
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)
