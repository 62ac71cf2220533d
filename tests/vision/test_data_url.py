import base64
import tracemalloc
from contextlib import suppress
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vision.data_url import _unquoted, decode_data_url
from vision.image import MediaError

DATA = bytes(range(256)) * 3


async def read(url: str, limit_bytes: int = 10_000) -> bytes:
    return await decode_data_url(url, limit_bytes=limit_bytes)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(DATA).decode(),
        "data:text/html;base64," + base64.b64encode(DATA).decode(),
        "data:;base64," + base64.b64encode(DATA).decode().rstrip("="),
        "data:image/png;charset=x;BASE64," + base64.urlsafe_b64encode(DATA).decode(),
        "DATA:image/png;base64," + base64.encodebytes(DATA).decode(),
        "data:image/png;base64," + base64.b64encode(DATA).decode().replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in DATA),
        "data:," + "".join(chr(byte) if chr(byte).isalnum() and byte < 128 else f"%{byte:02X}" for byte in DATA),
    ],
)
async def test_every_way_of_writing_the_bytes_is_read(url: str) -> None:
    assert await read(url) == DATA


@pytest.mark.parametrize("num_bytes", [0, 1, 2, 3, 100_000, 3_000_001])
async def test_every_length_is_read_whole(num_bytes: int) -> None:
    data = bytes(num_bytes)

    assert await read("data:image/png;base64," + base64.b64encode(data).decode(), num_bytes) == data


@pytest.mark.parametrize(
    "url", ["data:", "data:image/png;base64", "data:;base64,a", "data:;base64,ab!d", "data:;base64,a=bc", "data:;base64,äöü?"]
)
async def test_what_is_not_a_data_url_is_refused(url: str) -> None:
    with pytest.raises(MediaError) as caught:
        await read(url)

    assert caught.value.code == "url_invalid"


@pytest.mark.parametrize("prefix", ["data:image/png;base64,", "data:image/png,"])
async def test_one_byte_too_many_is_refused(prefix: str) -> None:
    def url(num_bytes: int) -> str:
        return prefix + (base64.b64encode(b"a" * num_bytes).decode() if "base64" in prefix else "a" * num_bytes)

    assert await read(url(99), 99) == b"a" * 99
    with pytest.raises(MediaError, match="more than the allowed 99 bytes") as caught:
        await read(url(100), 99)
    assert caught.value.code == "image_too_large"


async def test_a_huge_payload_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(MediaError) as caught:
        await read("data:;base64," + "!" * 10_000, 100)

    assert caught.value.code == "image_too_large", "its invalid letters were never looked at"


@given(st.text(st.sampled_from("%%%%04aFgü€😀")), st.text(st.sampled_from("%4a"), max_size=5), st.integers(3, 9))
def test_escapes_are_read_piece_by_piece_as_they_are_at_once(text: str, begun: str, slice_length: int) -> None:
    payload = (text + begun) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vision.data_url._ESCAPED_SLICE", slice_length)

        assert b"".join(_unquoted(payload)) == unquote_to_bytes(payload)


@pytest.mark.parametrize("prefix", ["data:,", "data:;base64,"])
@pytest.mark.parametrize("payload", ["%41" * 400_000, "%" * 1_200_000, "A%41%4" * 200_000, "A" * 1_200_000])
async def test_escapes_take_a_few_times_their_size_in_memory(prefix: str, payload: str) -> None:
    url = prefix + payload
    tracemalloc.start()
    with suppress(MediaError):  # what is no base64
        assert len(await read(url, 4 << 20)) >= 300_000
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak_bytes < 5 * len(url) + (2 << 20)
