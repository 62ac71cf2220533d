"""Pictures of many sizes, and what a served model says that they take: before they are sent, and when it answers."""

import io
import random
from dataclasses import dataclass
from typing import Any

import requests
from PIL import Image

from tests.image_fixtures import picture
from tests.server_process import data_url

DETAILS = ("auto", "low", "high")
_ORIENTATION = 0x0112
_ON_ITS_SIDE = 6  # as a camera that was held upright writes it
_ODD = [(1, 1), (1, 2), (2, 1), (1, 190), (190, 1), (1, 900), (900, 1), (7, 1300), (1300, 7), (3, 500), (32, 32), (33, 31), (512, 512)]
_ODD += [(513, 512), (224, 224), (1024, 1024), (2000, 1500), (300, 900), (900, 300)]


@dataclass(frozen=True)
class Counted:
    """One picture's sizes as stored, and the answers of both routes: token counts, or the error's status and code."""

    size: tuple[int, int]
    is_on_its_side: bool
    detail: str
    before: int | tuple[int, str]
    charged: int | tuple[int, str]


def sizes(count: int) -> list[tuple[int, int]]:
    """Heights and widths: odd ones first, then drawn ones of all magnitudes."""
    rng = random.Random(0)
    drawn = ((int(2 ** rng.uniform(0, 10.5)), int(2 ** rng.uniform(0, 10.5))) for _ in range(count))
    return [*_ODD, *drawn][:count]


def file_of(size: tuple[int, int], *, is_on_its_side: bool) -> bytes:
    """A JPEG; where it is on its side, it is shown turned."""
    exif = Image.Exif()
    if is_on_its_side:
        exif[_ORIENTATION] = _ON_ITS_SIDE
    buffer = io.BytesIO()
    Image.fromarray(picture(size, seed=size[0])).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def chat(file: bytes, **fields: Any) -> list[dict[str, Any]]:
    """One picture between two texts. Fields: those of its part; `detail` stands inside `image_url`."""
    image = {"url": data_url(file, "image/jpeg"), "detail": fields.pop("detail", None)}
    parts = [
        {"type": "text", "text": "Look: "},
        {"type": "image_url", "image_url": image, **fields},
        {"type": "text", "text": " What is it?"},
    ]
    return [{"role": "user", "content": parts}]


def counted(url: str, size: tuple[int, int], detail: str, *, is_on_its_side: bool) -> Counted:
    messages = chat(file_of(size, is_on_its_side=is_on_its_side), detail=detail)
    return Counted(size, is_on_its_side, detail, tokens_before(url, messages), tokens_charged(url, messages))


def tokens_before(url: str, messages: list[dict[str, Any]], **fields: Any) -> int | tuple[int, str]:
    answer = requests.post(f"{url}/tokenize", json={"messages": messages, **fields}, timeout=60)
    return answer.json()["count"] if answer.ok else (answer.status_code, answer.json()["error"]["code"])


def tokens_of(url: str, messages: list[dict[str, Any]]) -> list[int]:
    answer = requests.post(f"{url}/tokenize", json={"messages": messages}, timeout=60)
    answer.raise_for_status()
    tokens: list[int] = answer.json()["tokens"]
    return tokens


def tokens_charged(url: str, messages: list[dict[str, Any]], **fields: Any) -> int | tuple[int, str]:
    model = requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    body = {"model": model, "messages": messages, "max_tokens": 1, **fields}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    return answer.json()["usage"]["prompt_tokens"] if answer.ok else (answer.status_code, answer.json()["error"]["code"])
