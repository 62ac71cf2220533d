"""Formats over HTTP with a real engine process: several choices, streams, and the prefix cache follow the grammar all the same."""

import re
from typing import Literal

import openai
import pydantic
import pytest

from tests.server_process import server_process
from tests.tiny_models import write_tiny

EXPRESSION = "(yes|no|perhaps), [0-9]{2}"


class Thing(pydantic.BaseModel):
    shape: Literal["circle", "square"]
    count: Literal[1, 2, 3]


@pytest.mark.full
def test_choices_streams_and_cached_prompts_follow_the_format(tmp_path):
    with server_process(write_tiny("llama", tmp_path / "llama")) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        request = {
            "model": client.models.list().data[0].id,
            "messages": [{"role": "user", "content": "Is it red? " * 20}],
            "temperature": 1.0,
            "seed": 3,
            "n": 3,
            "max_tokens": 60,
            "extra_body": {"response_format": {"type": "regex_schema", "regex_schema": EXPRESSION}},
        }
        whole = client.chat.completions.create(**request)
        texts = [choice.message.content for choice in whole.choices]
        streamed = ["", "", ""]
        for chunk in client.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        again = client.chat.completions.create(**request)
        thing = client.chat.completions.parse(**{**request, "n": 1, "extra_body": {}, "temperature": 0}, response_format=Thing)

    assert all(re.fullmatch(EXPRESSION, text) for text in texts)
    assert [choice.finish_reason for choice in whole.choices] == ["stop"] * 3
    assert streamed == texts
    assert [choice.message.content for choice in again.choices] == texts
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert isinstance(thing.choices[0].message.parsed, Thing)
