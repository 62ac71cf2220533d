"""`Server-Timing`: what each answer says about where its time went."""

from typing import Any

import requests

from tests.contract.fake_engine import FIRST_TOKEN_S, PREPARATION_S
from tests.contract.running import RunningServer
from vlm_server.examples import RED_CIRCLE
from vlm_server.stage_timings import StageTimings

BEFORE_THE_FIRST_TOKEN = [*PREPARATION_S, *FIRST_TOKEN_S]


def stages(response: requests.Response) -> dict[str, float]:
    """Milliseconds by stage, in the header's order."""
    assert response.status_code == 200, response.text
    entries = [entry.split(";dur=") for entry in response.headers["server-timing"].split(", ")]
    return {name: float(duration) for name, duration in entries}


def ask(server: RunningServer, content: Any = "hello", **fields: Any) -> requests.Response:
    body = {"model": server.model, "messages": [{"role": "user", "content": content}], "max_tokens": 3, **fields}
    return requests.post(f"{server.url}/v1/chat/completions", json=body, headers={"Origin": "http://a.example"}, timeout=10)


def test_a_stream_says_before_its_first_piece_what_came_before_it(server: RunningServer) -> None:
    found = stages(ask(server, stream=True))

    assert found == {name: 1000 * seconds for name, seconds in (PREPARATION_S | FIRST_TOKEN_S).items()}


def test_a_whole_answer_also_says_how_long_it_was_written(server: RunningServer) -> None:
    found = stages(ask(server))

    assert list(found) == [*BEFORE_THE_FIRST_TOKEN, "generate"]
    assert 0 <= found["generate"] < 10_000


def test_pictures_are_a_stage_of_their_own(server: RunningServer) -> None:
    found = stages(ask(server, [{"type": "image_url", "image_url": {"url": RED_CIRCLE}}]))

    assert found["pictures"] == 250


def test_text_completions_have_the_header_too_whatever_the_number_of_answers(server: RunningServer) -> None:
    for fields in ({"prompt": "x"}, {"prompt": ["x", "y"], "n": 2}, {"prompt": ["x", "y"], "stream": True}):
        body = {"model": server.model, "max_tokens": 2, **fields}
        found = stages(requests.post(f"{server.url}/v1/completions", json=body, timeout=10))
        assert [name for name in found if name != "generate"] == ["tokenize", *FIRST_TOKEN_S]


def test_pages_of_other_origins_may_read_the_header_and_other_answers_have_none(server: RunningServer) -> None:
    assert "Server-Timing" in ask(server).headers["access-control-expose-headers"]
    assert "server-timing" not in requests.get(f"{server.url}/v1/models", timeout=10).headers


def test_of_stages_side_by_side_the_slowest_counts_and_of_one_after_the_other_the_sum() -> None:
    timings = StageTimings(iter((0.0, 1.0, 5.0, 7.0)).__next__)
    timings.add_slowest("picture", {"fetch": 0.25, "decode": 0.125})
    timings.add_slowest("picture", {"fetch": 0.5})
    for _ in range(2):
        with timings.stage("tokenize"):
            pass

    assert timings.header() == "picture-fetch;dur=500.0, picture-decode;dur=125.0, tokenize;dur=3000.0"
