"""When the pipeline is probed, and what `Readiness` says of it. Time stands unless a test moves it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from vlm_server.readiness import DRAINING, ENGINE, FIRST_PROBE, MIN_INTERVAL_S, QUEUE, ProbeReport, Readiness

PASSED = ProbeReport(stages_s={"decode": 0.25, "encode": 1.5})
FAILED = ProbeReport(stages_s={"template": 0.001}, failed_stage="decode", message="decode: broken")
BUSY = ProbeReport(failed_stage=QUEUE, message="queue: 200 requests wait", is_busy=True)


@dataclass
class ScriptedEngine:
    state: str = "ready"
    failure: str | None = None
    num_restarts: int = 0


@dataclass
class Bench:
    """What a test moves: time, the engine, and what the next probes report; each waits until it is let go."""

    readiness: Readiness
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    reports: "asyncio.Queue[ProbeReport | Exception]" = field(default_factory=asyncio.Queue)
    num_probes: int = 0
    now_s: float = 1000.0

    async def probe(self) -> ProbeReport:
        self.num_probes += 1
        report = await self.reports.get()
        if isinstance(report, Exception):
            raise report
        return report

    async def let(self, report: ProbeReport | Exception) -> None:
        """The probe that runs, or else the next one, reports this; what follows from it has happened on return."""
        self.reports.put_nowait(report)
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench(Readiness(now_s=lambda: bench.now_s))
    async with bench.readiness.watching(bench.engine, bench.probe):
        await asyncio.sleep(0)
        yield bench


async def test_it_is_ready_once_the_first_probe_went_through_and_says_what_it_took(bench: Bench) -> None:
    before = bench.readiness.standing()
    await bench.let(PASSED)
    bench.now_s += 7
    after = bench.readiness.standing()

    assert (before.is_ready, before.stage, before.body()["probe"]) == (False, FIRST_PROBE, None)
    assert (after.is_ready, after.stage) == (True, None)
    assert after.body()["status"] == "ready"
    assert after.body()["probe"] == {"age_s": 7.0, "stages_ms": {"decode": 250.0, "encode": 1500.0}}
    assert bench.num_probes == 1


async def test_questions_alone_never_repeat_a_probe_that_went_through(bench: Bench) -> None:
    await bench.let(PASSED)
    for _ in range(100):
        bench.now_s += 100
        assert bench.readiness.standing().is_ready

    assert bench.num_probes == 1


async def test_a_failure_names_its_stage_and_is_tried_again_after_a_while(bench: Bench) -> None:
    await bench.let(FAILED)
    assert (bench.readiness.standing().stage, bench.readiness.standing().message) == ("decode", "decode: broken")
    assert bench.num_probes == 1

    bench.now_s += MIN_INTERVAL_S
    assert bench.readiness.standing().stage == "decode"  # as long as nothing better is known
    await bench.let(PASSED)

    assert bench.readiness.standing().is_ready
    assert bench.num_probes == 2


async def test_a_new_engine_is_not_ready_before_a_probe_of_its_own(bench: Bench) -> None:
    await bench.let(PASSED)
    bench.engine.state = "restarting"
    assert bench.readiness.standing().stage == ENGINE
    bench.engine.state, bench.engine.num_restarts = "ready", 1

    assert bench.readiness.standing().stage == FIRST_PROBE
    await bench.let(PASSED)

    assert bench.readiness.standing().is_ready
    assert bench.num_probes == 2


async def test_a_probe_of_the_engine_before_says_nothing_of_the_new_one(bench: Bench) -> None:
    bench.engine.num_restarts = 1
    await bench.let(PASSED)

    assert bench.readiness.standing().stage == FIRST_PROBE
    await bench.let(PASSED)
    assert bench.readiness.standing().is_ready


async def test_an_engine_that_is_not_ready_is_not_probed(bench: Bench) -> None:
    await bench.let(PASSED)
    bench.engine.state, bench.engine.failure = "failed", "the checkpoint lacks a tensor"
    bench.now_s += 100

    standing = await bench.readiness.probed()

    assert (standing.stage, standing.message) == (ENGINE, "the engine is failed: the checkpoint lacks a tensor")
    assert bench.num_probes == 1


async def test_all_who_ask_at_once_wait_for_one_probe(bench: Bench) -> None:
    asking = [asyncio.create_task(bench.readiness.probed()) for _ in range(20)]
    await bench.let(PASSED)

    assert [standing.is_ready for standing in await asyncio.gather(*asking)] == [True] * 20
    assert bench.num_probes == 1


async def test_asking_for_probes_starts_one_per_interval_at_most(bench: Bench) -> None:
    await bench.let(PASSED)
    for _ in range(50):  # a tenth of a second each
        bench.now_s += 0.1
        assert (await bench.readiness.probed()).is_ready
    assert bench.num_probes == 1

    bench.now_s += MIN_INTERVAL_S
    asking = asyncio.create_task(bench.readiness.probed())
    await bench.let(FAILED)

    assert (await asking).stage == "decode"
    assert bench.num_probes == 2
    assert not bench.readiness.standing().is_ready


async def test_one_who_leaves_does_not_end_the_probe_for_the_others(bench: Bench) -> None:
    leaving, staying = (asyncio.create_task(bench.readiness.probed()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await bench.let(PASSED)

    assert (await staying).is_ready
    assert leaving.cancelled()


async def test_a_full_waiting_room_answers_whoever_asked_and_does_not_unmake_what_is_known(bench: Bench) -> None:
    await bench.let(PASSED)
    bench.now_s += MIN_INTERVAL_S
    asking = asyncio.create_task(bench.readiness.probed())
    await bench.let(BUSY)

    assert (await asking).stage == QUEUE
    assert bench.readiness.standing().is_ready


async def test_a_first_probe_that_was_not_let_in_is_tried_again(bench: Bench) -> None:
    await bench.let(BUSY)
    assert bench.readiness.standing().stage == QUEUE
    bench.now_s += MIN_INTERVAL_S
    bench.readiness.standing()
    await bench.let(PASSED)

    assert bench.readiness.standing().is_ready


async def test_a_server_that_stops_is_not_ready_and_probes_no_more(bench: Bench) -> None:
    await bench.let(PASSED)
    bench.now_s += 100
    bench.readiness.drain()

    assert bench.readiness.standing().stage == DRAINING
    assert (await bench.readiness.probed()).stage == DRAINING
    assert bench.num_probes == 1


async def test_a_probe_that_breaks_in_its_own_way_is_a_failure_without_its_text(bench: Bench) -> None:
    await bench.let(RuntimeError("a secret path"))

    standing = bench.readiness.standing()
    assert standing.stage == "probe"
    assert "secret" not in standing.message


async def test_without_a_probe_an_engine_that_is_ready_is_enough() -> None:
    engine, readiness = ScriptedEngine(), Readiness()
    async with readiness.watching(engine, None):
        assert readiness.standing().is_ready
        assert (await readiness.probed()).is_ready
    assert readiness.standing().stage == ENGINE


async def test_leaving_ends_a_probe_that_runs() -> None:
    ended = asyncio.Event()

    async def probe() -> ProbeReport:
        try:
            return await asyncio.Future()
        finally:
            ended.set()

    async with Readiness().watching(ScriptedEngine(), probe):
        await asyncio.sleep(0)

    assert ended.is_set()
