"""`data:` URLs: the bytes that they hold. Their media type is not trusted and not read."""

import asyncio
import base64
import binascii
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from vision.image import MediaError

_IN_PLACE = 64 << 10  # letters; longer ones are decoded beside the event loop
_SLICE = 1 << 20  # letters, a multiple of 4: the interpreter lock is given up between slices
_ESCAPED_SLICE = 16 << 10  # letters; while `unquote_to_bytes` is at work it takes up to 80 times as much
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


async def decode_data_url(url: str, *, limit_bytes: int) -> bytes:
    """Base64 (ordinary or URL-safe, padded or not) or percent-encoded. The size is known before anything is decoded.

    Raises MediaError: url_invalid, image_too_large.
    """
    header, comma, payload = url.partition(",")
    if not comma:
        raise MediaError("url_invalid", "the data: URL has no comma between its header and its data")
    is_base64 = header.lower().rstrip().endswith(";base64")
    if len(payload) > (4 * limit_bytes if is_base64 else 3 * limit_bytes):  # an escape is 3 letters a byte; base64 may be escaped, too
        raise too_many_bytes(limit_bytes)
    decode = _decode_base64 if is_base64 else _decode_percent
    if len(payload) <= _IN_PLACE:
        return decode(payload, limit_bytes)
    return await asyncio.to_thread(decode, payload, limit_bytes)


def _decode_percent(payload: str, limit_bytes: int) -> bytes:
    data = bytearray()
    for piece in _unquoted(payload):
        data += piece
        if len(data) > limit_bytes:
            raise too_many_bytes(limit_bytes)
    return bytes(data)


def _decode_base64(payload: str, limit_bytes: int) -> bytes:
    raw = b"".join(_unquoted(payload)) if "%" in payload else payload.encode("ascii", "replace")
    letters = raw.translate(_FROM_URL_SAFE, b" \t\r\n").rstrip(b"=")
    if len(letters) * 3 // 4 > limit_bytes:
        raise too_many_bytes(limit_bytes)
    letters += b"=" * (-len(letters) % 4)
    try:
        return b"".join(base64.b64decode(letters[at : at + _SLICE], validate=True) for at in range(0, len(letters), _SLICE))
    except binascii.Error:
        raise MediaError("url_invalid", "the data: URL does not hold valid base64") from None


def _unquoted(payload: str) -> Iterator[bytes]:
    """As `unquote_to_bytes` of the whole, piece by piece. No escape (`%41`) is divided."""
    at = 0
    while at < len(payload):
        end = at + _ESCAPED_SLICE
        if end < len(payload):
            begun = payload.rfind("%", end - 2, end)
            end = begun if begun >= 0 else end
        yield unquote_to_bytes(payload[at:end])
        at = end


def too_many_bytes(limit_bytes: int) -> MediaError:
    return MediaError("image_too_large", f"the picture has more than the allowed {limit_bytes} bytes")
