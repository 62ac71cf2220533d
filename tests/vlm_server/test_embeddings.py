"""`/v1/embeddings`: shapes of the input, of the answer, and what is refused by name."""

import base64
from typing import Any

import numpy as np
import openai
import pytest
import requests

from tests.contract.fake_engine import HIDDEN_SIZE, TOKENS_PER_IMAGE
from tests.contract.running import RunningServer
from tests.vlm_server.byte_tokenizer import IMAGE, VOCAB_SIZE
from vlm_server.embedding_protocol import MAX_INPUTS

PICTURE = {"type": "image_url", "image_url": {"url": "http://host/picture.png"}}


def post(server: RunningServer, **fields: Any) -> requests.Response:
    return requests.post(f"{server.url}/v1/embeddings", json=fields, timeout=10)


def embedded(server: RunningServer, item: Any) -> list[list[float]]:
    response = post(server, input=item)
    assert response.status_code == 200, response.text
    return [entry["embedding"] for entry in response.json()["data"]]


def unit(*token_ids: int) -> list[float]:
    """What the scripted engine gives for these tokens."""
    vector = np.array((*token_ids, *[0] * HIDDEN_SIZE)[:HIDDEN_SIZE], float)
    return (vector / np.linalg.norm(vector)).astype(np.float32).tolist()


@pytest.mark.parametrize(
    ("item", "token_lists"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
        ([{"type": "text", "text": "ab"}], [b"ab"]),
        ([PICTURE, {"type": "text", "text": "a"}], [[IMAGE] * TOKENS_PER_IMAGE + [97]]),
        (["a", [PICTURE], [98]], [b"a", [IMAGE] * TOKENS_PER_IMAGE, b"b"]),
        ([{"type": "image_url", "image_url": "http://host/picture.png"}], [[IMAGE] * TOKENS_PER_IMAGE]),
    ],
)
def test_every_form_of_input_gives_a_vector_of_length_one_each(server: RunningServer, item: Any, token_lists: list[Any]) -> None:
    vectors = embedded(server, item)

    texts = {bytes(prompt.token_ids) if max(prompt.token_ids) < 256 else prompt.token_ids for prompt, _ in server.backend.engine.requests}
    assert len(texts) == len(token_lists)
    assert len(vectors) == len(token_lists)
    for vector, (prompt, params) in zip(vectors, sorted_requests(server, token_lists), strict=True):
        np.testing.assert_allclose(vector, unit(*prompt.token_ids), atol=1e-6)
        assert (params.max_tokens, params.pools) == (0, True)


def sorted_requests(server: RunningServer, token_lists: list[Any]) -> list[Any]:
    """The engine's requests in the order of the inputs; a text may begin with the token that begins texts."""
    return [
        next(request for request in server.backend.engine.requests if list(request[0].token_ids[-len(tokens) :]) == list(tokens))
        for tokens in token_lists
    ]


def test_the_answer_is_openais_and_base64_holds_the_same_numbers(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    written = client.embeddings.create(model=server.model, input=["ab", "c"], encoding_format="float")
    coded = client.embeddings.create(model=server.model, input=["ab", "c"], dimensions=HIDDEN_SIZE)  # asks for base64
    raw = post(server, input="ab", encoding_format="base64").json()["data"][0]["embedding"]

    assert [entry.index for entry in written.data] == [0, 1]
    assert written.model == server.model
    assert written.usage.prompt_tokens == written.usage.total_tokens > 0
    assert [entry.embedding for entry in coded.data] == [entry.embedding for entry in written.data]
    assert np.frombuffer(base64.b64decode(raw), "<f4").tolist() == written.data[0].embedding


def test_many_inputs_come_back_in_order(server: RunningServer) -> None:
    vectors = embedded(server, [[1 + number % 200, 7] for number in range(300)])

    np.testing.assert_allclose(vectors, [unit(1 + number % 200, 7) for number in range(300)], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["a", 3]}, "input"),
        ({"input": [[1, "a"]]}, "input"),
        ({"input": [VOCAB_SIZE * 10**9]}, "input"),
        (
            {"input": ["a", [{"type": "text", "text": "b"}, {"type": "image_url", "image_url": {"url": "http://host/bad"}}]]},
            "input[1][1].image_url",
        ),
        ({"input": ["a", [{"type": "input_audio"}]]}, "input[1][0]"),
        ({"input": ["a", [5] * 600]}, "input[1]"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
    ],
)
def test_a_bad_input_is_refused_by_its_path(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = post(server, **fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


def test_an_unknown_model_is_not_found_and_an_unknown_field_is_warned_about(server: RunningServer) -> None:
    assert post(server, model="other", input="a").status_code == 404
    assert post(server, model=server.model, input="a", mood="blue").json()["warnings"] == [
        "mood: no API documents this field; it has no effect"
    ]


def test_a_client_that_leaves_ends_what_it_asked_for(server: RunningServer) -> None:
    slow = [{"type": "image_url", "image_url": {"url": "http://host/slow"}}]
    with pytest.raises(requests.ReadTimeout):
        requests.post(f"{server.url}/v1/embeddings", json={"input": ["a", slow]}, timeout=0.5)

    assert server.backend.activity.was_left_within(5)
