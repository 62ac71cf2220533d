"""`on_media_error` and `return_image_sizes` on every route that takes pictures, over a scripted engine.

There a URL with `bad` cannot be used, and each other picture has 8 × 6 pixels.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.byte_tokenizer import IMAGE
from vlm_server.anthropic.response_schema import MessageResponse
from vlm_server.response_schema import ChatCompletionResponse, GenerateReqOutput, InteractiveResponse
from vlm_server.responses.schema import Response

GOOD, BAD = "https://example.org/cat.png", "https://example.org/bad.png"
Content = list[str]  # URLs are pictures
BOTH = ["Look:", BAD, GOOD, "What is it?"]
SIZE = {"width": 8, "height": 6, "seen": None, "tiles": []}


def chat_part(text: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": text}} if text.startswith("https") else {"type": "text", "text": text}


def message_block(text: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "url", "url": text}} if text.startswith("https") else {"type": "text", "text": text}


def response_part(text: str) -> dict[str, Any]:
    return {"type": "input_image", "image_url": text} if text.startswith("https") else {"type": "input_text", "text": text}


def chat(content: Content) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(map(chat_part, content))}]}


def generate(content: Content) -> dict[str, Any]:
    urls = [text for text in content if text.startswith("https")]
    return {"prompt": "".join(text for text in content if text not in urls), "image_data": urls or None}


@dataclass(frozen=True)
class Route:
    path: str
    body: Callable[[Content], dict[str, Any]]
    field: Callable[[int], str]  # what it calls the picture that is part number n of BOTH
    schema: Any = None  # of an answer; None: it counts, and answers nothing
    headers: tuple[tuple[str, str], ...] = ()


ROUTES = {
    "chat": Route(
        "/v1/chat/completions",
        lambda content: {"model": "org/tiny-vlm", **chat(content)},
        lambda n: f"messages[0].content[{n}].image_url",
        ChatCompletionResponse,
    ),
    "responses": Route(
        "/v1/responses",
        lambda content: {"input": [{"role": "user", "content": list(map(response_part, content))}]},
        lambda n: f"input[0].content[{n}].image_url",
        Response,
    ),
    "messages": Route(
        "/v1/messages",
        lambda content: {
            "model": "org/tiny-vlm",
            "max_tokens": 99,
            "messages": [{"role": "user", "content": list(map(message_block, content))}],
        },
        lambda n: f"messages[0].content[{n}].source.url",
        MessageResponse,
        (("anthropic-version", "2023-06-01"),),
    ),
    "interactive": Route(
        "/v1/chat/interactive",
        lambda content: {"prompt": chat(content)["messages"]},
        lambda n: f"prompt[0].content[{n}].image_url",
        InteractiveResponse,
    ),
    "generate": Route("/generate", generate, lambda n: f"image_data[{n - 1}]", GenerateReqOutput),
    "tokenize": Route("/tokenize", chat, lambda n: f"messages[0].content[{n}].image_url"),
    "count_tokens": Route(
        "/v1/messages/count_tokens",
        lambda content: {"model": "org/tiny-vlm", "messages": [{"role": "user", "content": list(map(message_block, content))}]},
        lambda n: f"messages[0].content[{n}].source.url",
        None,
        (("anthropic-version", "2023-06-01"),),
    ),
}
ANSWERING = [name for name, route in ROUTES.items() if route.schema is not None]


def post(server: RunningServer, name: str, content: Content, **fields: Any) -> requests.Response:
    route = ROUTES[name]
    body = {**route.body(content), **fields}
    return requests.post(server.url + route.path, json=body, headers=dict(route.headers), timeout=10)


def events(response: requests.Response) -> list[dict[str, Any]]:
    """Of a stream, whichever way the route writes them."""
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith(("data: ", "{"))]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def prompt_of(server: RunningServer) -> list[int]:
    return list(server.backend.engine.requests[-1][0].token_ids)


def warning(name: str, code: str = "image_decode_failed") -> str:
    return f"{ROUTES[name].field(1)}: {code}: not a picture; the picture is left out"


def param_of(answer: dict[str, Any]) -> Any:
    error = answer["error"]
    return error.get("param") or error["details"]["param"]


@pytest.mark.parametrize("name", ANSWERING)
def test_a_picture_that_fails_is_left_out_and_named_in_a_warning(server: RunningServer, name: str) -> None:
    response = post(server, name, BOTH, on_media_error="skip")

    assert response.status_code == 200, response.text
    assert response.json()["warnings"] == [warning(name)]
    ROUTES[name].schema.model_validate(response.json())
    prompt = prompt_of(server)
    assert post(server, name, [text for text in BOTH if text != BAD]).status_code == 200
    assert prompt == prompt_of(server)
    assert IMAGE in prompt


@pytest.mark.parametrize("name", ["tokenize", "count_tokens"])
def test_counting_leaves_it_out_too(server: RunningServer, name: str) -> None:
    counted = post(server, name, BOTH, on_media_error="skip").json()
    without = post(server, name, [text for text in BOTH if text != BAD]).json()

    assert counted.pop("warnings") == [warning(name)]
    assert counted == without


@pytest.mark.parametrize("name", ANSWERING)
def test_streams_carry_the_warning_where_they_carry_warnings(server: RunningServer, name: str) -> None:
    found = events(post(server, name, BOTH, on_media_error="skip", stream=True))

    holders = [event.get("message") or event.get("response") or event for event in found]
    assert [holder["warnings"] for holder in holders if "warnings" in holder][-1] == [warning(name)]


@pytest.mark.parametrize("fields", [{}, {"on_media_error": None}, {"on_media_error": "fail"}], ids=str)
@pytest.mark.parametrize("name", ROUTES)
def test_by_default_the_request_fails(server: RunningServer, name: str, fields: dict[str, Any]) -> None:
    response = post(server, name, BOTH, **fields)

    assert (response.status_code, param_of(response.json())) == (400, ROUTES[name].field(1))
    assert not server.backend.engine.requests


@pytest.mark.parametrize("name", ROUTES)
def test_only_fail_and_skip_are_allowed(server: RunningServer, name: str) -> None:
    response = post(server, name, BOTH, on_media_error="ignore")

    assert (response.status_code, param_of(response.json())) == (400, "on_media_error")


@pytest.mark.parametrize("name", ["chat", "interactive", "tokenize"])
def test_an_uploaded_file_that_is_gone_is_left_out_too(server: RunningServer, name: str) -> None:
    body = ROUTES[name].body(BOTH)
    [message] = body.get("messages") or body["prompt"]
    message["content"][1]["image_url"] = {"file_id": f"file-{'0' * 32}"}

    skipped, refused = (
        requests.post(server.url + ROUTES[name].path, json=body | {"on_media_error": policy}, timeout=10) for policy in ("skip", "fail")
    )

    assert skipped.status_code == 200, skipped.text
    [told] = skipped.json()["warnings"]
    assert told == warning(name, code="file_not_found")
    assert (refused.status_code, param_of(refused.json())) == (404, f"{ROUTES[name].field(1)}.file_id")


@pytest.mark.parametrize("name", ANSWERING)
def test_sizes_of_pictures_stand_beside_the_usage(server: RunningServer, name: str) -> None:
    response = post(server, name, [GOOD, "and", GOOD], return_image_sizes=True)

    places = (1, 2) if name == "generate" else (0, 2)
    assert response.json()["image_sizes"] == [{"param": ROUTES[name].field(place), **SIZE} for place in places]
    ROUTES[name].schema.model_validate(response.json())
    for fields in ({}, {"return_image_sizes": None}, {"return_image_sizes": False}):
        assert "image_sizes" not in post(server, name, [GOOD, "and", GOOD], **fields).json()


@pytest.mark.parametrize("name", ANSWERING)
def test_streams_carry_the_sizes_at_their_end(server: RunningServer, name: str) -> None:
    found = events(post(server, name, [GOOD, "What?"], return_image_sizes=True, stream=True))

    last = next(event for event in reversed(found) if event.get("type") != "message_stop")
    holder = last.get("response") or last
    assert holder["image_sizes"] == [{"param": ROUTES[name].field(1 if name == "generate" else 0), **SIZE}]
    assert not any("image_sizes" in (event.get("response") or event) for event in found[: found.index(last)])


def test_the_chunk_with_the_usage_has_the_sizes_too(server: RunningServer) -> None:
    fields = {"return_image_sizes": True, "stream": True, "stream_options": {"include_usage": True}}

    found = events(post(server, "chat", [GOOD, "What?"], **fields))

    assert found[-1]["usage"]
    assert found[-1]["image_sizes"] == [{"param": "messages[0].content[0].image_url", **SIZE}]


@pytest.mark.parametrize("name", ANSWERING)
def test_without_pictures_there_are_no_sizes(server: RunningServer, name: str) -> None:
    assert post(server, name, ["What?"], return_image_sizes=True).json()["image_sizes"] == []


def test_sizes_and_left_out_pictures_go_together(server: RunningServer) -> None:
    response = post(server, "chat", BOTH, on_media_error="skip", return_image_sizes=True).json()

    assert [size["param"] for size in response["image_sizes"]] == ["messages[0].content[2].image_url"]
    assert response["warnings"] == [warning("chat")]


@pytest.fixture
def alpaca() -> Iterator[RunningServer]:
    with running_server(fake_config(compat="alpaca")) as server:
        yield server


@pytest.mark.parametrize(("field", "value", "no_op"), [("on_media_error", "skip", "fail"), ("return_image_sizes", True, False)])
def test_routes_without_pictures_refuse_both_by_name(
    server: RunningServer, alpaca: RunningServer, field: str, value: Any, no_op: Any
) -> None:
    plain = [
        (server, "/v1/completions", {"model": server.model, "prompt": "Hi"}),
        (server, "/v1/embeddings", {"input": "Hi"}),
        (alpaca, "/v1/chat/completions", {"messages": "Hi"}),
        (alpaca, "/v1/completions", {"prompt": "Hi"}),
    ]
    for asked, path, body in plain:
        refused, taken = (requests.post(asked.url + path, json=body | {field: given}, timeout=10) for given in (value, no_op))

        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
        assert taken.status_code == 200, taken.text
        assert "warnings" not in taken.json()


def test_a_session_forgets_a_picture_that_was_left_out(server: RunningServer) -> None:
    def turn(prompt: Any, **fields: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "session_id": 4711, "interactive_mode": True, **fields}
        return dict(requests.post(f"{server.url}/v1/chat/interactive", json=body, timeout=10).json())

    first = turn(chat(BOTH)["messages"], on_media_error="skip", return_image_sizes=True)
    second = turn("And now?", return_image_sizes=True)

    assert first["warnings"] == [warning("interactive")]
    assert [size["param"] for size in first["image_sizes"]] == ["prompt[0].content[2].image_url"]
    assert "warnings" not in second
    assert second["image_sizes"] == []  # of this turn's request
    messages, files = server.backend.pipeline.turns[-1]
    kinds = [part["type"] for part in messages[0]["content"]]
    assert kinds == ["text", "image_url", "text"]
    assert len(files) == 1


def test_a_session_keeps_a_turn_whose_only_picture_failed(server: RunningServer) -> None:
    body = {"prompt": "", "image_url": BAD, "session_id": 4712, "interactive_mode": True, "on_media_error": "skip"}

    answer = requests.post(f"{server.url}/v1/chat/interactive", json=body, timeout=10).json()
    requests.post(f"{server.url}/v1/chat/interactive", json={"prompt": "So?", "session_id": 4712, "interactive_mode": True}, timeout=10)

    assert answer["warnings"] == ["image_url: image_decode_failed: not a picture; the picture is left out"]
    messages, files = server.backend.pipeline.turns[-1]
    assert messages[0]["content"] == [{"type": "text", "text": ""}]
    assert not files


def test_a_kept_response_has_its_warnings_and_sizes(server: RunningServer) -> None:
    created = post(server, "responses", BOTH, on_media_error="skip", return_image_sizes=True).json()

    kept = requests.get(f"{server.url}/v1/responses/{created['id']}", timeout=10).json()

    assert (kept["warnings"], kept["image_sizes"]) == (created["warnings"], created["image_sizes"])
    assert kept["image_sizes"][0]["param"] == "input[0].content[2].image_url"


def test_a_response_goes_on_without_a_picture_that_an_earlier_one_had(server: RunningServer) -> None:
    first = post(server, "responses", BOTH, on_media_error="skip").json()

    skipped, refused = (
        post(server, "responses", ["And now?"], previous_response_id=first["id"], on_media_error=policy) for policy in ("skip", "fail")
    )

    assert skipped.json()["warnings"] == ["previous_response_id: image_decode_failed: not a picture; the picture is left out"]
    assert (refused.status_code, param_of(refused.json())) == (400, "previous_response_id")
