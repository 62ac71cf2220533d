"""`Server-Timing` and `return_timings`: what each answer says about where its time went."""

import json
import re
from typing import Any

import pytest
import requests

from tests.contract.fake_engine import FIRST_TOKEN_S, PREPARATION_S
from tests.contract.running import RunningServer, fake_config, running_server
from vlm_server.examples import RED_CIRCLE
from vlm_server.stage_timings import StageSpan, StageTimings

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
    timings = StageTimings(iter((0.0, 0.0, 1.0, 5.0, 7.0)).__next__)
    timings.add_slowest("picture", {"fetch": 0.25, "decode": 0.125})
    timings.add_slowest("picture", {"fetch": 0.5})
    for _ in range(2):
        with timings.stage("tokenize"):
            pass

    assert timings.header() == "picture-fetch;dur=500.0, picture-decode;dur=125.0, tokenize;dur=3000.0"


PICTURE = [{"type": "image_url", "image_url": {"url": RED_CIRCLE}}, {"type": "text", "text": "x"}]
ANTHROPIC_PICTURE = [{"type": "image", "source": {"type": "url", "url": "http://a.example/x.png"}}]
EVENT = re.compile(r"^data: (\{.*\})$|^(\{.*\})$", re.MULTILINE)

# Route → a request with one picture, as far as the route takes any, and where the timings are in its answer.
ROUTES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": PICTURE}], "max_tokens": 3}, ()),
    "/v1/completions": ({"prompt": ["x", "y"], "max_tokens": 3}, ()),
    "/generate": ({"prompt": "x", "max_tokens": 3}, ("meta_info",)),
    "/v1/responses": ({"input": "x", "max_output_tokens": 3}, ()),
    "/v1/messages": ({"messages": [{"role": "user", "content": ANTHROPIC_PICTURE}], "max_tokens": 3}, ()),
    "/v1/chat/interactive": ({"prompt": "x", "request_output_len": 3}, ()),
}
ROUTES_WITH_PICTURES = ("/v1/chat/completions", "/v1/messages")


def post(server: RunningServer, route: str, **fields: Any) -> requests.Response:
    body = {"model": server.model, **ROUTES[route][0], **fields}
    response = requests.post(
        server.url + route, json=body, headers={"anthropic-version": "2023-06-01"} if "messages" in route else {}, timeout=10
    )
    assert response.status_code == 200, response.text
    return response


def timings_in(answer: dict[str, Any], route: str) -> dict[str, Any] | None:
    for name in ROUTES[route][1]:
        answer = answer[name]
    return answer.get("timings")


def chunks_of(response: requests.Response, route: str) -> list[dict[str, Any]]:
    """The objects that may hold timings, in their order."""
    found = [json.loads(one or other) for one, other in EVENT.findall(response.text)]
    return [chunk.get("response", chunk) for chunk in found] if route == "/v1/responses" else found


@pytest.mark.parametrize("route", ROUTES)
def test_who_asks_for_timings_gets_them_beside_the_usage(server: RunningServer, route: str) -> None:
    timings = timings_in(post(server, route, return_timings=True).json(), route)

    assert timings is not None
    expected = {"tokenize_ms", *(f"{name}_ms" for name in FIRST_TOKEN_S), "generate_ms", "first_token_ms", "total_ms"}
    assert expected <= set(timings)
    assert {f"{name}_ms": timings[f"{name}_ms"] for name in FIRST_TOKEN_S} == {
        f"{name}_ms": 1000 * seconds for name, seconds in FIRST_TOKEN_S.items()
    }
    assert 0 <= timings["first_token_ms"] <= timings["total_ms"] < 10_000
    assert timings.get("per_picture") == ([{"fetch_ms": 250.0}] if route in ROUTES_WITH_PICTURES else None)


@pytest.mark.parametrize("route", ROUTES)
def test_of_a_stream_the_last_chunk_that_says_anything_has_the_timings_and_no_other(server: RunningServer, route: str) -> None:
    chunks = chunks_of(post(server, route, return_timings=True, stream=True), route)

    found = [timings_in(chunk, route) for chunk in chunks if chunk.get("type") != "message_stop"]
    assert found[-1] is not None
    assert found[:-1] == [None] * (len(found) - 1)
    assert {"prefill_ms", "generate_ms", "first_token_ms", "total_ms"} <= set(found[-1])


@pytest.mark.parametrize("fields", [{}, {"return_timings": False}, {"return_timings": None}], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_who_does_not_ask_gets_no_timings(server: RunningServer, route: str, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        assert '"timings"' not in post(server, route, stream=stream, **fields).text


@pytest.mark.parametrize("route", ROUTES)
def test_the_field_is_true_or_false(server: RunningServer, route: str) -> None:
    body = {"model": server.model, **ROUTES[route][0], "return_timings": "perhaps"}

    response = requests.post(
        server.url + route, json=body, headers={"anthropic-version": "2023-06-01"} if "messages" in route else {}, timeout=10
    )

    assert response.status_code == 400
    assert "return_timings" in response.json()["error"]["message"]


def test_usage_and_timings_share_the_last_chunk_of_a_stream(server: RunningServer) -> None:
    for route in ("/v1/chat/completions", "/v1/completions"):
        last = chunks_of(post(server, route, stream=True, return_timings=True, stream_options={"include_usage": True}), route)[-1]
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] > 0
        assert last["timings"]["total_ms"] > 0


def test_a_kept_response_has_the_timings_that_it_was_sent_with(server: RunningServer) -> None:
    sent = post(server, "/v1/responses", return_timings=True).json()

    kept = requests.get(f"{server.url}/v1/responses/{sent['id']}", timeout=10).json()

    assert kept["timings"] == sent["timings"]


def test_a_turn_of_a_session_says_where_its_time_went_too(server: RunningServer) -> None:
    found = stages(post(server, "/v1/chat/interactive"))

    assert list(found) == [*BEFORE_THE_FIRST_TOKEN, "generate"]


def test_alpacas_routes_answer_the_field_as_the_others() -> None:
    with running_server(fake_config(compat="alpaca")) as server:
        for route, fields in (("/v1/chat/completions", {"messages": "x"}), ("/v1/completions", {"prompt": "x"})):
            body = {**fields, "return_timings": True, "max_tokens": 2}
            assert requests.post(server.url + route, json=body, timeout=10).json()["timings"]["total_ms"] > 0
            streamed = requests.post(server.url + route, json={**body, "stream": True}, timeout=10)
            assert chunks_of(streamed, route)[-1]["timings"]["total_ms"] > 0


def test_what_others_measured_is_put_behind_each_other_until_it_ended() -> None:
    timings = StageTimings(iter((10.0,)).__next__)

    timings.add_until(20.0, {"queue": 1.0, "prefill": 3.0})

    assert list(timings.spans.values()) == [StageSpan("queue", 16.0, 17.0), StageSpan("prefill", 17.0, 20.0)]
    assert timings.seconds == {"queue": 1.0, "prefill": 3.0}


def test_the_report_has_the_pictures_one_by_one_in_place_of_the_slowest() -> None:
    timings = StageTimings(iter((1.0, 3.0)).__next__)
    timings.add_slowest("picture", {"fetch": 0.25})
    timings.add_slowest("picture", {"fetch": 0.125, "decode": 0.5})

    assert timings.report() == {
        "timings": {"total_ms": 2000.0, "per_picture": [{"fetch_ms": 250.0}, {"fetch_ms": 125.0, "decode_ms": 500.0}]}
    }
