"""One picture's bytes → RGB pixels, for every mode that the seven formats have. Runs in the decode worker.

Pillow's own `Image.open` is never called: it imports plugins for some forty other formats. Knows nothing of sockets and processes.
"""

import contextlib
import io
import struct
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vision.image import MediaError
from vision.shared_array import SharedArray

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (height, width, 3)
ToRGB = Callable[[Image.Image], Image.Image | Pixels]

_ORIENTATION_TAG = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_STRIP_PIXELS = 1 << 20  # what is converted at a time, so that a large picture is never held three times
_SIGNATURES: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (_PNG, PngImageFile),
    (b"GIF87a", GifImageFile),
    (b"GIF89a", GifImageFile),
    (b"BM", BmpImageFile),
    (b"II*\x00", TiffImageFile),
    (b"MM\x00*", TiffImageFile),
    (b"II+\x00", TiffImageFile),
    (b"MM\x00+", TiffImageFile),
)
_INTEGER_RANGES = ((255.0, 1.0), (65535.0, 1 / 256))  # largest value, factor to 8 bits
_FLOAT_RANGES = ((1.0, 255.0), *_INTEGER_RANGES)
_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")


def decode_picture(data: bytes, target: SharedArray, *, max_pixels: int) -> None:
    """First frame, upright, alpha over white, in sRGB where the picture says what else it is in.

    target: uint8; it becomes (height, width, 3). Raises MediaError: image_decode_failed, image_too_large. Blocks.
    """
    with _opened(data, max_pixels) as image:
        image.load()
        _write_upright_rgb(image, target)


def measure_picture(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """(height, width) of what `decode_picture` gives, from the header alone. Raises as it does, save for damage behind the header."""
    with _opened(_without_pixels(data) if data.startswith(_PNG) else data, max_pixels) as image:
        width, height = image.size
        is_turned = _orientation(image) >= 5 and not isinstance(image, TiffImageFile)  # a TIFF's size is that of the upright picture
        return (width, height) if is_turned else (height, width)


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The picture, its header read and its size allowed. Every error becomes a MediaError, in the block too."""
    try:
        with warnings.catch_warnings(action="ignore"), _open(data, max_pixels) as image:  # Pillow warns of metadata that we don't use
            _check_size(*image.size, max_pixels)
            yield image
    except MediaError:
        raise
    except MemoryError:
        raise MediaError("image_too_large", "the picture needs more memory to decode than the server allows") from None
    except Exception:  # the decoders raise whatever they like at hostile bytes, and their texts must not leave this process
        raise MediaError("image_decode_failed", "the picture is damaged or incomplete") from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header only."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _check_size(*_webp_size(data), max_pixels)  # Pillow reserves the whole canvas at once
        return WebPImageFile(io.BytesIO(data))
    if data[4:8] == b"ftyp" and data[8:12] in _AVIF_BRANDS:
        return AvifImageFile(io.BytesIO(data))
    for signature, image_file in _SIGNATURES:
        if data.startswith(signature):
            return image_file(io.BytesIO(data))
    raise MediaError("image_decode_failed", "the picture is not a JPEG, PNG, GIF, WebP, AVIF, BMP or TIFF file")


def _without_pixels(data: bytes) -> bytes:
    """A PNG's other chunks, then one for pixels that is empty: Pillow would decode the pixels to read metadata that stand behind them."""
    chunks, start = [_PNG], len(_PNG)
    while len(head := data[start : start + 8]) == 8:
        end = start + 12 + int.from_bytes(head[:4])
        if head[4:] not in (b"IDAT", b"IEND"):
            chunks.append(data[start:end])
        start = end
    return b"".join([*chunks, b"\0\0\0\0IDAT"])


def _webp_size(data: bytes) -> tuple[int, int]:
    kind, content = data[12:16], data[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack("<I", content[1:5])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", content[6:10])
    return width & 0x3FFF, height & 0x3FFF


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise MediaError("image_too_large", f"the picture has {width} × {height} pixels; at most {max_pixels} are allowed")


def _write_upright_rgb(image: Image.Image, target: SharedArray) -> None:
    width, height = image.size
    orientation = _orientation(image)
    target.resize((width, height, 3) if orientation >= 5 else (height, width, 3))
    pixels = _as_stored(target.numpy(), orientation)
    to_rgb = _to_rgb(image)
    num_rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, num_rows):
        strip = image.crop((0, top, width, min(height, top + num_rows)))
        pixels[top : top + num_rows] = np.asarray(to_rgb(strip))


def _orientation(image: Image.Image) -> int:
    try:
        orientation = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)  # that of PNGs would decode them
    except Exception:  # a broken EXIF block makes no picture unusable
        return 1
    return orientation if orientation in range(1, 9) else 1


def _as_stored(upright: Pixels, orientation: int) -> Pixels:
    """A view of the upright picture whose rows and columns are those of the stored one."""
    flips_rows, flips_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    view = upright[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1]
    return view.swapaxes(0, 1) if orientation >= 5 else view


def _to_rgb(image: Image.Image) -> ToRGB:
    """How strips of this picture become RGB."""
    if image.mode.startswith("I;16"):
        return _from_16_bits
    if image.mode in ("I", "F"):
        return _from_numbers(np.asarray(image))
    if image.mode == "LAB":
        return _from_profile(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")
    if image.has_transparency_data:
        return _over_white
    return _from_embedded_profile(image) or _plain


def _plain(strip: Image.Image) -> Image.Image:
    return strip if strip.mode == "RGB" else strip.convert("RGB")


def _over_white(strip: Image.Image) -> Image.Image:
    if strip.mode in ("La", "RGBa"):
        strip = strip.convert({"La": "LA", "RGBa": "RGBA"}[strip.mode])
    strip = strip.convert("RGBA")
    white = Image.new("RGB", strip.size, "white")
    white.paste(strip, mask=strip.getchannel("A"))
    return white


def _from_16_bits(strip: Image.Image) -> Pixels:
    """The high byte; what a PNG declares transparent is white."""
    values = np.asarray(strip)
    gray = (values >> 8).astype(np.uint8)
    if isinstance(transparent := strip.info.get("transparency"), int):
        gray[values == transparent] = 255
    return _gray_to_rgb(gray)


def _from_numbers(values: np.ndarray[Any, Any]) -> ToRGB:
    """32-bit integers and floats have no agreed range: the smallest usual one that holds them is taken, else they are stretched."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    usual = _INTEGER_RANGES if values.dtype.kind == "i" else _FLOAT_RANGES
    fitting = [scale for limit, scale in usual if low >= 0 and high <= limit]
    bottom, scale = (0.0, fitting[0]) if fitting else (low, 255.0 / max(high - low, 1e-30))

    def to_rgb(strip: Image.Image) -> Pixels:
        scaled = (np.asarray(strip).astype(np.float64) - bottom) * scale + 1e-6  # the largest value is 255, not 254.99…
        return _gray_to_rgb(np.nan_to_num(scaled, nan=0.0).clip(0, 255).astype(np.uint8))

    return to_rgb


def _gray_to_rgb(gray: Pixels) -> Pixels:
    return np.broadcast_to(gray[:, :, None], (*gray.shape, 3))


def _from_embedded_profile(image: Image.Image) -> ToRGB | None:
    """None where the picture brings no usable ICC profile or that of sRGB."""
    content = image.info.get("icc_profile")
    if not content or image.mode not in ("RGB", "CMYK", "L"):
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return None
        return _from_profile(profile, image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _from_profile(profile: ImageCms.ImageCmsProfile, mode: str) -> ToRGB:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    transform = ImageCms.buildTransform(profile, srgb, mode, "RGB")
    return transform.apply
