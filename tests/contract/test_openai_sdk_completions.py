"""The official SDK's text completions: echoes, their log-probabilities, the best of several. Nothing here knows which engine answers."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.contract.running import RunningServer

PROMPT = "two steps to build a house:"


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(api_key="YOUR_API_KEY", base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def model(client: OpenAI) -> str:
    return client.models.list().data[0].id


def complete(client: OpenAI, model: str, **fields: Any) -> Any:
    return client.completions.create(**{"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, **fields})


def test_an_echoed_prompt_stands_before_the_same_answer(client: OpenAI, model: str) -> None:
    alone, echoed = (complete(client, model, echo=echo).choices[0].text for echo in (False, True))

    assert echoed == PROMPT + alone


def test_a_prompt_is_scored_without_an_answer(client: OpenAI, model: str) -> None:
    completion = complete(client, model, echo=True, logprobs=2, max_tokens=0)

    [choice] = completion.choices
    logprobs = choice.logprobs
    assert (choice.text, choice.finish_reason, completion.usage.completion_tokens) == (PROMPT, "length", 0)
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == completion.usage.prompt_tokens
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])
    assert all(len(top) >= 2 for top in logprobs.top_logprobs[1:])


def test_offsets_cut_prompt_and_answer_into_their_tokens(client: OpenAI, model: str) -> None:
    choice = complete(client, model, echo=True, logprobs=0).choices[0]

    offsets, tokens = choice.logprobs.text_offset, choice.logprobs.tokens
    assert offsets == sorted(offsets)
    for token, start, end in zip(tokens, offsets, [*offsets[1:], len(choice.text)], strict=True):
        assert choice.text[start:end] == token or token.startswith("bytes:") or start == end


@pytest.mark.parametrize("n", [1, 2])
def test_streamed_echoes_equal_the_whole_ones(client: OpenAI, model: str, n: int) -> None:
    fields: dict[str, Any] = {"prompt": [PROMPT, "hi"], "echo": True, "logprobs": 1, "n": n}
    whole = complete(client, model, **fields).choices

    chunks = [chunk.choices[0] for chunk in complete(client, model, stream=True, **fields)]

    assert len(whole) == 2 * n
    for choice in whole:
        pieces = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        for name in ("tokens", "text_offset", "token_logprobs"):
            streamed = [value for piece in pieces if piece.logprobs for value in getattr(piece.logprobs, name)]
            assert close(streamed, getattr(choice.logprobs, name))


def close(ours: list[Any], theirs: list[Any]) -> bool:
    """Equal, but for the last digits of numbers that were computed in other batches."""
    return len(ours) == len(theirs) and all(
        one == other or (isinstance(one, float) and abs(one - other) < 1e-3) for one, other in zip(ours, theirs, strict=True)
    )


def test_token_ids_are_echoed_as_their_text(client: OpenAI, model: str) -> None:
    ids = [72, 73, 74]
    alone, echoed = (complete(client, model, prompt=ids, echo=echo) for echo in (False, True))

    assert echoed.choices[0].text.endswith(alone.choices[0].text)
    assert len(echoed.choices[0].text) > len(alone.choices[0].text)
    assert echoed.usage.prompt_tokens == 3


def test_the_best_of_several_is_one_and_all_are_counted(client: OpenAI, model: str) -> None:
    completion = complete(client, model, best_of=3, temperature=1, seed=1, extra_body={"ignore_eos": True})
    two = complete(client, model, best_of=3, n=2, temperature=1, seed=1, extra_body={"ignore_eos": True})

    assert [choice.index for choice in completion.choices] == [0]
    assert completion.choices[0].logprobs is None
    assert completion.usage.completion_tokens == two.usage.completion_tokens == 3 * 6
    assert two.choices[0].text == completion.choices[0].text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_what_cannot_be_had_is_named(client: OpenAI, model: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, model, **fields)

    assert caught.value.param == param
