"""Where a file's id stands for its picture: chats, `/tokenize`, embeddings and sessions, over a scripted engine."""

import base64
import json
from typing import Any

import pytest

from tests.contract.fake_engine import TOKENS_PER_IMAGE
from tests.contract.running import RunningServer, fake_config, running_server
from tests.vlm_server.byte_tokenizer import EOS, IMAGE
from tests.vlm_server.files_client import PICTURE, UNKNOWN, Client, assert_refused


def seen_pictures(server: RunningServer) -> list[bytes]:
    """What the engine was shown last."""
    return [base64.b64decode(image.content_hash.partition(b",")[2]) for image in server.backend.engine.requests[-1][0].images]


def test_a_file_id_shows_the_model_what_the_picture_as_a_data_url_shows(client: Client, server: RunningServer) -> None:
    file_id = client.uploaded()
    server.backend.engine.script = lambda prompt, params: [*prompt.images[0].content_hash, EOS]

    by_id = client.chat({"file_id": file_id, "detail": "low"}).json()
    data_url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    by_url = client.chat({"url": data_url, "detail": "low"}).json()

    assert by_id["choices"] == by_url["choices"]
    assert by_id["usage"] == by_url["usage"]
    assert by_id["choices"][0]["message"]["content"] == data_url
    assert "warnings" not in by_id


def test_every_role_may_name_files_and_a_file_more_than_once(client: Client, server: RunningServer) -> None:
    one, two = client.uploaded(b"one"), client.uploaded(b"two")
    part_one, part_two = ({"type": "image_url", "image_url": {"file_id": file_id}} for file_id in (one, two))
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [part_one, part_two]},
        {"role": "assistant", "content": [part_two], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}, part_one]},
    ]

    response = client.send("POST", "/v1/chat/completions", json={"model": server.model, "messages": messages})

    assert response.status_code == 200, response.text
    assert seen_pictures(server) == [b"one", b"two", b"two", b"one"]
    assert "files;dur=" in response.headers["server-timing"]


@pytest.mark.parametrize("file_id", [UNKNOWN, "file-abc", "", "../x", "file-" + "A" * 32])
def test_an_unknown_file_id_is_404_by_its_path_on_every_route(client: Client, file_id: str) -> None:
    image = {"type": "image_url", "image_url": {"file_id": file_id}}
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "x"}, image]}]
    for path, fields, param in (
        ("/v1/chat/completions", {"messages": messages}, "messages[1].content[1].image_url.file_id"),
        ("/tokenize", {"messages": messages}, "messages[1].content[1].image_url.file_id"),
        ("/v1/embeddings", {"input": ["x", [image]]}, "input[1][0].image_url.file_id"),
        ("/v1/embeddings", {"input": [image]}, "input[0].image_url.file_id"),
        ("/v1/chat/interactive", {"prompt": messages}, "prompt[1].content[1].image_url.file_id"),
        ("/v1/chat/interactive", {"messages": messages, "stream": True}, "messages[1].content[1].image_url.file_id"),
    ):
        assert_refused(client.send("POST", path, json={"model": client.server.model, **fields}), 404, "file_not_found", param)


@pytest.mark.parametrize(
    ("image", "code", "param"),
    [
        ({"file_id": UNKNOWN, "url": "http://host/x"}, "invalid_value", "url"),
        ({}, "missing_required_parameter", "url"),
        ({"url": None, "file_id": None}, "missing_required_parameter", "url"),
        ({"file_id": 5}, "invalid_value", "file_id"),
        ({"url": "uploaded-file:" + UNKNOWN}, "url_invalid", None),
    ],
)
def test_a_picture_is_named_by_exactly_one_of_url_and_file_id(client: Client, image: Any, code: str, param: str | None) -> None:
    path = "messages[0].content[1].image_url"

    assert_refused(client.chat(image), 400, code, f"{path}.{param}" if param else path)


def test_a_null_beside_the_file_id_is_as_good_as_nothing(client: Client) -> None:
    assert client.chat({"file_id": client.uploaded(), "url": None, "detail": None}).status_code == 200
    assert client.chat({"url": "http://host/x", "file_id": None}).status_code == 200


def test_tokens_and_embeddings_count_an_uploaded_picture_as_any_other(client: Client, server: RunningServer) -> None:
    by_id, by_url = ({"type": "image_url", "image_url": image} for image in ({"file_id": client.uploaded()}, {"url": "http://host/x"}))

    counts = [
        client.send("POST", "/tokenize", json={"messages": [{"role": "user", "content": [part]}]}).json()["count"]
        for part in (by_id, by_url)
    ]
    vectors = client.send("POST", "/v1/embeddings", json={"input": [[by_id], [by_url]]}).json()["data"]

    assert counts[0] == counts[1] > TOKENS_PER_IMAGE
    assert vectors[0]["embedding"] == vectors[1]["embedding"]
    assert server.backend.engine.requests[-1][0].token_ids == (IMAGE,) * TOKENS_PER_IMAGE


def test_a_session_keeps_an_uploaded_picture_after_its_file_is_gone(client: Client, server: RunningServer) -> None:
    file_id = client.uploaded(b"kept")
    turn = {"session_id": 77_001, "interactive_mode": True}
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"file_id": file_id}}]}

    first = client.send("POST", "/v1/chat/interactive", json={**turn, "prompt": [message]})
    client.send("DELETE", f"/v1/files/{file_id}")
    second = client.send("POST", "/v1/chat/interactive", json={**turn, "prompt": "And now?"})

    assert (first.status_code, second.status_code) == (200, 200)
    messages, pictures = server.backend.pipeline.turns[-1]
    assert list(pictures.values()) == [b"kept"]
    assert file_id not in json.dumps(messages)


def test_a_turn_that_is_not_kept_sees_an_uploaded_picture_too(client: Client, server: RunningServer) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"file_id": client.uploaded(b"seen")}}]}

    for fields in ({}, {"session_id": 77_002}):
        assert client.send("POST", "/v1/chat/interactive", json={"prompt": [message], **fields}).status_code == 200
        assert seen_pictures(server) == [b"seen"]


def test_the_files_of_one_request_are_bounded_as_its_body_is() -> None:
    with running_server(fake_config(max_body_bytes=3000)) as server:
        client = Client(server)
        parts = [{"type": "image_url", "image_url": {"file_id": client.uploaded(bytes([number]) * 1200)}} for number in range(3)]

        for content, status in ((parts[:2] * 2, 200), (parts, 400)):
            messages = [{"role": "user", "content": content}]
            response = client.send("POST", "/v1/chat/completions", json={"model": server.model, "messages": messages, "max_tokens": 1})
            assert response.status_code == status
        assert_refused(response, 400, "image_too_large", "messages[0].content[2].image_url.file_id")
