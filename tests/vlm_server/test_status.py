"""`GET /status` and what fills it: samples, their history, and the engine's stages in sum."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
import requests

from engine.request import EngineDeadError, EngineStats, FinishReason, Prompt, SamplingParams, StepOutput
from tests.contract.fake_engine import Activity, FakeEngine
from tests.contract.running import RunningServer, fake_config, running_server
from vision.service import VisionStats
from vlm_server.response_schema import StatusResponse
from vlm_server.stage_totals import StageTotal, StageTotals, timed_engine
from vlm_server.status_board import FRESH_S, HISTORY_S, INTERVAL_S, StatusBoard

HELLO = [{"role": "user", "content": "a private question"}]


def get(server: RunningServer, path: str = "/status", **headers: str) -> requests.Response:
    return requests.get(server.url + path, headers=headers, timeout=10)


def chat(server: RunningServer) -> None:
    body = {"model": server.model, "messages": HELLO, "max_tokens": 4}
    assert requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=10).status_code == 200


def test_the_snapshot_has_the_engines_numbers_and_limits() -> None:
    with running_server() as server:
        chat(server)
        while not (body := get(server).json())["sample"]["stages"]["decode"]["num"]:
            pass  # a sample of half a second ago

    StatusResponse.model_validate(body)
    assert (body["model"], body["engine"]["state"], body["readiness"]["status"]) == (server.model, "ready", "ready")
    assert body["limits"]["max_batch_size"] == 64
    assert body["sample"]["engine"]["max_batched_requests"] == 3
    assert set(body["sample"]["vision"]) >= {"num_in_flight", "num_done", "time_s", "num_cache_hits"}
    stages = body["sample"]["stages"]
    assert {name: stages[name]["num"] for name in stages} == {"queue": 1, "encode": 1, "prefill": 1, "decode": 3}
    assert stages["prefill"]["time_s"] == 0.125
    assert body["history"] == []
    assert "private" not in str(body)


def test_what_was_sampled_before_comes_with_the_history() -> None:
    with running_server() as server:
        history = get(server, "/status?history=true").json()["history"]

    assert 1 <= len(history) <= HISTORY_S / INTERVAL_S
    assert history[0]["at_s"] < 10


def test_an_engine_that_is_dead_is_said_to_be_so(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def dead() -> EngineStats:
        raise EngineDeadError("the engine is restarting")

    with running_server() as dying:
        monkeypatch.setattr(dying.backend.engine, "stats", dead)
        dying.backend.engine.state, dying.backend.engine.failure = "failed", "no memory"
        body = get(dying).json()
        while body["sample"]["engine"] is not None:  # one of half a second ago
            body = get(dying).json()

    assert (body["engine"]["state"], body["engine"]["failure"]) == ("failed", "no memory")
    assert body["readiness"]["stage"] == "engine"


def test_with_keys_the_numbers_need_one() -> None:
    with running_server(fake_config(api_keys=("secret",))) as server:
        assert get(server).status_code == 401
        assert get(server, **{"x-api-key": "secret"}).status_code == 200


def test_asking_for_the_numbers_uses_up_no_quota(tmp_path: Any) -> None:
    (tmp_path / "keys.toml").write_text('[[keys]]\nname = "alice"\nkey = "secret"\nrequests_per_minute = 1\n')
    with running_server(fake_config(api_key_files=(str(tmp_path / "keys.toml"),))) as server:
        for _ in range(5):
            assert get(server, **{"x-api-key": "secret"}).status_code == 200
        assert get(server, "/v1/models", **{"x-api-key": "secret"}).status_code == 200
        assert get(server, "/v1/models", **{"x-api-key": "secret"}).status_code == 429
        assert get(server, **{"x-api-key": "secret"}).status_code == 200


def test_without_metrics_there_are_no_numbers_here_either() -> None:
    with running_server(fake_config(enable_metrics=False)) as server:
        assert get(server).status_code == 404


class SlowEngine:
    """Answers when it is let."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.may_answer = asyncio.Event()

    async def stats(self) -> EngineStats:
        self.num_asked += 1
        await self.may_answer.wait()
        return EngineStats(num_running=self.num_asked)


async def test_all_who_look_at_once_cost_the_engine_one_question() -> None:
    engine, board = SlowEngine(), StatusBoard(StageTotals())
    async with board.sampling(engine, VisionStats):  # type: ignore[arg-type]
        looking = [asyncio.create_task(board.sample()) for _ in range(20)]
        await asyncio.sleep(0)
        engine.may_answer.set()
        samples = await asyncio.gather(*looking)
        again = await board.sample()

    assert engine.num_asked == 1
    assert {id(sample) for sample in (*samples, again)} == {id(samples[0])}


async def test_a_sample_is_used_for_half_a_second_and_the_silence_is_counted_from_the_last_answer() -> None:
    now_s, engine = [100.0], SlowEngine()
    engine.may_answer.set()
    board = StatusBoard(StageTotals(), now_s=lambda: now_s[0])
    async with board.sampling(engine, VisionStats):  # type: ignore[arg-type]
        first = await board.sample()
        await asyncio.sleep(0)  # the background's own look at it ends
        now_s[0] += 2 * FRESH_S
        second = await board.sample()
        now_s[0] += 7

        assert (first.at_s, second.at_s, board.silence_s, board.uptime_s) == (0.0, 1.0, 7.0, 8.0)
    assert engine.num_asked == 2


async def test_an_engine_in_a_long_step_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_server.status_board.ANSWER_LIMIT_S", 0.01)
    board = StatusBoard(StageTotals())
    async with board.sampling(SlowEngine(), VisionStats):  # type: ignore[arg-type]
        assert (await board.sample()).engine is None


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class TickingEngine(FakeEngine):
    """Half a second between two answers."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(Activity())
        self.clock = clock

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]:
        timings_s = {"queue": 1.0, "prefill": 2.0}
        for number in range(4):
            self.clock.now_s += 0.5
            reason = FinishReason.LENGTH if number == 3 else None
            first = timings_s if number == 0 else None
            yield StepOutput(request_id=request_id, token_ids=[number, number], finish_reason=reason, timings_s=first)


async def test_the_engines_stages_are_summed_and_its_answers_stay_as_they_are() -> None:
    clock = Clock()
    totals = StageTotals(clock)
    engine = timed_engine(TickingEngine(clock), totals)
    prompt = Prompt(token_ids=(1,), cache_keys=(1,))

    outputs = [[output async for output in engine.generate(prompt, SamplingParams(), request_id=name)] for name in ("a", "b")]

    assert [output.token_ids for output in outputs[0]] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert totals.now() == {
        "queue": StageTotal(2, 2.0),
        "encode": StageTotal(),
        "prefill": StageTotal(2, 4.0),
        "decode": StageTotal(12, 3.0),
    }
    assert engine.state == "ready"


async def test_who_stops_reading_closes_the_engines_stream_too() -> None:
    activity = Activity()
    engine = timed_engine(FakeEngine(activity), StageTotals())
    prompt = Prompt(token_ids=(1,), cache_keys=(1,))

    async with aclosing(engine.generate(prompt, SamplingParams(), request_id="left")) as steps:
        await anext(steps)
        assert len(activity) == 1

    assert len(activity) == 0
