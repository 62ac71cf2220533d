"""A message's text under `message`, as Chinese-LLaMA-Alpaca's clients write it, on OpenAI's own routes."""

import requests

from tests.contract.running import RunningServer


def prompt_for(server: RunningServer, message: dict[str, object]) -> bytes:
    fields = {"model": server.model, "messages": [message]}
    response = requests.post(f"{server.url}/v1/chat/completions", json=fields, timeout=10)
    assert response.status_code == 200, response.text
    assert "warnings" not in response.json()
    return bytes(token_id % 256 for token_id in server.backend.engine.requests[-1][0].token_ids)


def test_a_message_is_read_under_either_name(server: RunningServer) -> None:
    assert prompt_for(server, {"role": "user", "message": "Hi"}) == prompt_for(server, {"role": "user", "content": "Hi"})


def test_a_message_with_two_texts_is_refused(server: RunningServer) -> None:
    fields = {"model": server.model, "messages": [{"role": "user", "message": "Hi", "content": "Ho"}]}

    response = requests.post(f"{server.url}/v1/chat/completions", json=fields, timeout=10)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].message"
