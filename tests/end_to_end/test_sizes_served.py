"""What a served model says that it saw of a picture, and an answer that does without one that cannot be had."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import requests

from tests.end_to_end.counted import chat, file_of
from tests.image_fixtures import preprocessor, tiny_folder
from tests.server_process import ServerProcess, server_process
from vision.image import ImageOptions

pytestmark = pytest.mark.full


@pytest.fixture(scope="module", params=["qwen2_5_vl", "idefics3", "llava", "gemma3"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, ServerProcess]]:
    with server_process(tiny_folder(request.param), "--session-len", "4096") as server:
        yield request.param, server


def posted(server: ServerProcess, content: list[dict[str, Any]], **fields: Any) -> requests.Response:
    model = requests.get(f"{server.url}/v1/models", timeout=60).json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0, **fields}
    return requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


def asked(server: ServerProcess, content: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    response = posted(server, content, **fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_a_photograph_that_was_taken_upright_is_measured_as_it_is_shown(served: tuple[str, ServerProcess]) -> None:
    """Twice: the second answer comes from the cache of processed pictures."""
    name, server = served
    content = chat(file_of((90, 250), is_on_its_side=True))[0]["content"]
    shown = np.zeros((250, 90, 3), np.uint8)
    arrays, layout, _ = preprocessor(name).process(shown, ImageOptions())
    seen, *tiles = map(asdict, preprocessor(name).views((250, 90), ImageOptions(), arrays["pixel_values"], layout))

    answers = [asked(server, content, return_image_sizes=True) for _ in range(2)]

    expected = {"param": "messages[0].content[1].image_url", "width": 90, "height": 250, "seen": seen, "tiles": tiles}
    assert [answer["image_sizes"] for answer in answers] == [[expected], [expected]]


@pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
def test_a_picture_that_the_request_makes_too_large_for_the_window_is_refused(served: tuple[str, ServerProcess]) -> None:
    _, server = served
    content = chat(file_of((28, 28), is_on_its_side=False))[0]["content"]

    response = posted(server, content, mm_processor_kwargs={"min_pixels": 49_900_000})

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages[0].content[1].image_url")
    assert "at most 4096 fit" in error["message"]


def test_an_answer_without_the_lost_picture_is_the_answer_to_the_rest(served: tuple[str, ServerProcess]) -> None:
    _, server = served
    content = chat(file_of((60, 80), is_on_its_side=False))[0]["content"]
    lost = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/private.png"}}

    skipped = asked(server, [*content, lost], on_media_error="skip")
    without = asked(server, content)

    [warning] = skipped["warnings"]
    assert warning.startswith("messages[0].content[3].image_url: url_blocked: ")
    assert skipped["choices"] == without["choices"]
    assert skipped["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"]
