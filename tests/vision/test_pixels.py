import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps, TiffImagePlugin

from tests.vision.pictures import encoded, noise, png
from vision.image import MediaError
from vision.pixels import decode_picture, measure_picture
from vision.shared_array import SharedArray

MAX_PIXELS = 1_000_000
ORIENTATION = 0x0112
FORMATS = {"JPEG": {}, "PNG": {}, "GIF": {}, "WEBP": {"lossless": True}, "AVIF": {}, "BMP": {}, "TIFF": {}}


def decoded(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray[Any, Any]:
    """The pixels, whose size is what the header says, whatever the picture."""
    target = SharedArray.create((0,), "uint8")
    decode_picture(data, target, max_pixels=max_pixels)
    pixels = target.numpy()
    assert measure_picture(data, max_pixels=max_pixels) == pixels.shape[:2]
    return pixels


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def on_white(image: Image.Image) -> np.ndarray[Any, Any]:
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(white)


def smooth(width: int = 40, height: int = 24) -> Image.Image:
    """No symmetry, so that every turn and mirroring shows."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) * 255 // (width + 2 * height)], axis=2).astype(np.uint8)
    )


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(width: int, height: int, *, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [(40, 24), (1, 1), (3, 500), (500, 1)])
def test_each_format_gives_pillows_own_rgb(form: str, size: tuple[int, int]) -> None:
    data = encoded(smooth(*size), form, **FORMATS[form])

    pixels = decoded(data)

    assert pixels.shape == (size[1], size[0], 3)
    assert np.array_equal(pixels, np.asarray(opened(data).convert("RGB")))


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"progressive": True, "quality": 80}),
        ("JPEG", {"subsampling": 2}),
        ("JPEG", {"subsampling": 0, "quality": 100}),
        ("WEBP", {"quality": 60}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", {"compression": "jpeg"}),
    ],
)
def test_encodings_of_a_format_give_pillows_own_rgb(form: str, options: dict[str, Any]) -> None:
    data = encoded(smooth(), form, **options)

    assert np.array_equal(decoded(data), np.asarray(opened(data).convert("RGB")))


def test_pictures_of_several_strips_are_put_together_exactly() -> None:
    data = encoded(Image.fromarray(noise(1500, 1500)), "BMP")

    pixels = decoded(data, max_pixels=3_000_000)

    assert np.array_equal(pixels, noise(1500, 1500))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_opaque_modes_give_pillows_own_rgb(mode: str) -> None:
    data = encoded(smooth().convert(mode), "TIFF")
    assert opened(data).mode == mode

    assert np.array_equal(decoded(data), np.asarray(opened(data).convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_in_gray_and_in_inverted_cmyk_gives_pillows_own_rgb(mode: str) -> None:
    data = encoded(smooth().convert(mode), "JPEG", quality=95)
    assert opened(data).mode == mode

    pixels = decoded(data)

    assert np.array_equal(pixels, np.asarray(opened(data).convert("RGB")))
    if mode == "CMYK":
        assert abs(pixels.astype(int) - np.asarray(smooth()).astype(int)).mean() < 30, "the colours are not inverted"


def test_lab_becomes_rgb() -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    data = encoded(ImageCms.applyTransform(smooth(), to_lab), "TIFF")
    assert opened(data).mode == "LAB"

    assert abs(decoded(data).astype(int) - np.asarray(smooth()).astype(int)).mean() < 3


@pytest.mark.parametrize(
    ("mode", "form"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "AVIF"), ("RGBA", "TIFF"), ("LA", "TIFF")]
)
def test_alpha_lies_over_white(mode: str, form: str) -> None:
    image = Image.fromarray(noise(20, 12, channels=4), "RGBA").convert(mode)
    data = encoded(image, form, **FORMATS[form])
    assert opened(data).mode == mode or form != "PNG"

    assert np.array_equal(decoded(data), on_white(opened(data)))


def test_clear_pixels_are_white_whatever_colour_they_hide() -> None:
    clear = np.zeros((4, 4, 4), np.uint8)

    assert (decoded(encoded(Image.fromarray(clear, "RGBA"), "PNG")) == 255).all()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [3, bytes([255, 128, 0, 7])])
def test_palettes_with_transparency_lie_over_white(transparency: int | bytes) -> None:
    image = smooth().quantize(16)
    data = encoded(image, "PNG", transparency=transparency)
    assert opened(data).mode == "P"

    pixels = decoded(data)

    assert np.array_equal(pixels, on_white(opened(data)))
    assert not np.array_equal(pixels, np.asarray(opened(data).convert("RGB")))


def test_a_gifs_transparent_colour_is_white() -> None:
    data = encoded(smooth().quantize(8), "GIF", transparency=2)

    pixels = decoded(data)

    assert np.array_equal(pixels, on_white(opened(data)))
    assert (pixels[np.asarray(opened(data)) == opened(data).info["transparency"]] == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_a_pngs_transparent_colour_is_white(mode: str) -> None:
    image = Image.new(mode, (4, 2), 0)
    image.putpixel((1, 1), {"RGB": (10, 20, 30), "L": 99, "1": 255}[mode])
    data = encoded(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)

    pixels = decoded(data)

    expected = {"RGB": (10, 20, 30), "L": (99, 99, 99), "1": (255, 255, 255)}[mode]
    assert tuple(pixels[1, 1]) == expected
    assert (pixels[0] == 255).all()


def test_sixteen_bit_gray_keeps_its_high_byte() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (5, 7), dtype=np.uint16)
    data = encoded(Image.fromarray(values), "PNG")

    assert np.array_equal(decoded(data), np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_sixteen_bit_gray_in_tiff_of_either_byte_order_keeps_its_high_byte() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (5, 7), dtype=np.uint16)

    for mode in ("I;16", "I;16B"):
        raw = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        data = encoded(Image.frombytes(mode, (7, 5), raw), "TIFF")

        assert np.array_equal(decoded(data)[:, :, 0], (values >> 8).astype(np.uint8)), mode


def test_sixteen_bit_gray_with_a_transparent_value_is_white_there() -> None:
    rows = b"\x00" + struct.pack(">3H", 0x1234, 0x1235, 0xFF00)
    data = raw_png(3, 1, depth=16, colour=0, rows=rows, extra=png_chunk(b"tRNS", struct.pack(">H", 0x1234)))

    assert decoded(data)[0, :, 0].tolist() == [255, 0x12, 0xFF]


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_sixteen_bit_colour_and_alpha_keep_their_high_bytes(colour: int, channels: int) -> None:
    values = np.random.default_rng(2).integers(0, 65536, (4, 5, channels), dtype=np.uint16)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    high = (values >> 8).astype(np.uint8)
    mode = {2: "LA", 3: "RGB", 4: "RGBA"}[channels]

    pixels = decoded(raw_png(5, 4, depth=16, colour=colour, rows=rows))

    assert np.array_equal(pixels, on_white(Image.frombytes(mode, (5, 4), high.tobytes())))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[0, 256, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 127, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 127, 255]),
        (np.array([[0.0, 2.0, 200.0]], np.float32), [0, 2, 200]),
        (np.array([[1e6, 3e6, 2e6]], np.float32), [0, 255, 127]),
        (np.array([[np.nan, 0.5, np.inf]], np.float32), [0, 127, 255]),
    ],
)
def test_numbers_without_an_agreed_range_are_scaled(values: np.ndarray[Any, Any], expected: list[int]) -> None:
    data = encoded(Image.fromarray(values), "TIFF")
    assert opened(data).mode in ("I", "F")

    assert decoded(data)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(smooth(), form, **FORMATS[form], exif=exif)
    expected = ImageOps.exif_transpose(opened(data)).convert("RGB")

    pixels = decoded(data)

    assert pixels.shape[:2] == ((40, 24) if orientation >= 5 else (24, 40))
    assert np.array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_png_may_name_its_orientation_behind_its_pixels(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    plain = encoded(smooth(), "PNG")
    start_of_end = plain.rindex(b"IEND") - 4

    pixels = decoded(plain[:start_of_end] + png_chunk(b"eXIf", exif.tobytes()[6:]) + plain[start_of_end:])

    assert pixels.shape[:2] == ((40, 24) if orientation >= 5 else (24, 40))


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_is_measured_without_its_pixels(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(smooth(), form)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))

    assert measure_picture(data, max_pixels=MAX_PIXELS) == (24, 40)


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff"]
)
def test_a_broken_exif_block_is_ignored(exif: bytes) -> None:
    data = encoded(smooth(), "JPEG", exif=exif)

    assert decoded(data).shape == (24, 40, 3)


def test_an_impossible_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 9

    assert decoded(encoded(smooth(), "JPEG", exif=exif)).shape == (24, 40, 3)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_of_several_frames_the_first_is_taken(form: str) -> None:
    red, blue = Image.new("RGB", (6, 4), (255, 0, 0)), Image.new("RGB", (6, 4), (0, 0, 255))
    options = {} if form == "TIFF" else {"duration": 100}
    data = encoded(red, form, save_all=True, append_images=[blue], **options)
    assert opened(data).n_frames == 2

    pixels = decoded(data).astype(int)

    assert pixels[..., 0].min() > 245
    assert pixels[..., 2].max() < 10


def test_an_embedded_profile_becomes_srgb() -> None:
    wide = wide_profile()
    data = encoded(Image.new("RGB", (4, 4), (0, 200, 0)), "PNG", icc_profile=wide)

    pixels = decoded(data)

    expected = ImageCms.profileToProfile(opened(data), ImageCms.ImageCmsProfile(io.BytesIO(wide)), ImageCms.createProfile("sRGB"))
    assert np.array_equal(pixels, np.asarray(expected))
    assert tuple(pixels[0, 0]) != (0, 200, 0)


@pytest.mark.parametrize("profile", [b"not a profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_broken_profiles_and_srgb_itself_change_nothing(profile: bytes) -> None:
    data = encoded(smooth(), "PNG", icc_profile=profile)

    assert np.array_equal(decoded(data), np.asarray(smooth()))


def wide_profile() -> bytes:
    """The sRGB profile with its green and red primaries exchanged and another description."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ", 128), profile.index(b"gXYZ", 128)
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "xxxx".encode("utf-16-be")).replace(b"sRGB built", b"xxxx built")


def test_a_png_that_claims_gigapixels_is_refused_by_its_header() -> None:
    data = raw_png(100_000, 100_000, depth=8, colour=2, rows=b"")

    with pytest.raises(MediaError, match=r"100000 × 100000 pixels; at most 1000000") as caught:
        decoded(data)

    assert caught.value.code == "image_too_large"


def huge_gif() -> bytes:
    return b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02D\x01\x00;"


def huge_webp() -> bytes:
    content = b"VP8X" + struct.pack("<I", 10) + b"\x00" * 4 + (16383).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content


def huge_lossless_webp() -> bytes:
    content = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    return b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content


def huge_bmp() -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)


def huge_tiff() -> bytes:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {256: 60000, 257: 60000, 258: (8, 8, 8), 259: 1, 262: 2, 273: 8, 277: 3, 278: 60000, 279: 8}.items():
        directory[tag] = value
    file = io.BytesIO()
    directory.save(file)
    return file.getvalue()


@pytest.mark.parametrize("bomb", [huge_gif, huge_webp, huge_lossless_webp, huge_bmp, huge_tiff])
def test_small_files_that_claim_gigapixels_are_refused(bomb: Any) -> None:
    for use in (decoded, measure_picture):
        with pytest.raises(MediaError, match="at most 1000000 are allowed") as caught:
            use(bomb(), max_pixels=MAX_PIXELS)
        assert caught.value.code == "image_too_large"


@pytest.mark.parametrize("form", FORMATS)
def test_the_pixel_limit_itself_is_allowed_in_each_format(form: str) -> None:
    data = encoded(smooth(40, 24), form)

    assert decoded(data, max_pixels=40 * 24).shape == (24, 40, 3)
    with pytest.raises(MediaError, match="at most 959"):
        decoded(data, max_pixels=40 * 24 - 1)


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_files_are_refused(form: str) -> None:
    data = encoded(Image.fromarray(noise(64, 64)), form)

    for kept in (len(data) * 3 // 5, len(data) // 4, 30, 13):
        with pytest.raises(MediaError) as caught:
            decoded(data[:kept])
        assert caught.value.code == "image_decode_failed"


@pytest.mark.parametrize("data", [b"", b"x", b"<svg/>", b"%!PS-Adobe", b"8BPS\x00\x01", b"\x00\x00\x01\x00\x01\x00", b"P6 1 1 255 abc"])
def test_other_formats_are_refused_by_name_of_the_allowed_ones(data: bytes) -> None:
    with pytest.raises(MediaError, match="not a JPEG, PNG, GIF, WebP, AVIF, BMP or TIFF"):
        decoded(data)


def test_no_decoder_text_reaches_the_message() -> None:
    with pytest.raises(MediaError) as caught:
        decoded(png()[:40] + b"\x00" * 40)

    assert caught.value.message == "the picture is damaged or incomplete"
