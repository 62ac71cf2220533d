"""`/v1/responses` with the embedded model: conversations that go on from kept responses pay for their new text alone."""

from pathlib import Path
from typing import Any, Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.end_to_end.pictures import drawn
from tests.server_process import ServerProcess, data_url, server_process

pytestmark = pytest.mark.full

BLOCK_SIZE = 16


def client_of(server: ServerProcess) -> OpenAI:
    return OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0, _strict_response_validation=True)


def picture_and(text: str) -> Any:
    return [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": text}, {"type": "input_image", "image_url": data_url(drawn(3)), "detail": "auto"}],
        }
    ]


def asked(client: OpenAI, input: Any, **fields: Any) -> Any:
    return client.responses.create(**{"model": "vlm-demo", "input": input, "temperature": 0, "max_output_tokens": 24, **fields})


class Seen(BaseModel):
    colour: Literal["red", "green", "blue", "yellow", "black"]


def test_a_conversation_goes_on_from_the_prefix_cache_and_over_a_restart(tmp_path: Path) -> None:
    store = ("--session-store", str(tmp_path / "sessions.sqlite3"))
    with server_process(None, *store) as server, client_of(server) as client:
        first = asked(client, picture_and("Describe the image please"))
        second = asked(client, "Which colour has the shape?", previous_response_id=first.id)
        streamed = list(asked(client, "Which colour has the shape?", previous_response_id=first.id, stream=True))[-1].response
        parsed = client.responses.parse(model="vlm-demo", input=picture_and("Which colour has the shape?"), text_format=Seen)

    known = first.usage.input_tokens
    assert second.usage.input_tokens > known
    assert second.usage.input_tokens_details.cached_tokens >= known - 2 * BLOCK_SIZE > 0
    assert streamed.output_text == second.output_text
    assert parsed.output_parsed is not None

    with server_process(None, *store) as server, client_of(server) as client:
        again = asked(client, "Which colour has the shape?", previous_response_id=first.id)
        assert again.output_text == second.output_text
        assert client.responses.retrieve(second.id).model_dump() == second.model_dump()
