"""Grammars that are greedy or hostile, and the processes that they are read in."""

import asyncio
import json
import os
import resource
import signal
import string
from collections.abc import AsyncIterator
from itertools import pairwise

import msgspec
import pytest
from llguidance import LLMatcher

from engine.guided import GrammarError
from tests.vision.processes import freeze, is_gone, until
from vision.budget import Budget
from vision.config import VisionConfig
from vision.confinement import NETWORK
from vision.decode_pool import DecodePool
from vision.frames import Frame
from vision.workers import WorkerPool
from vlm_server import grammar_pool
from vlm_server.errors import ApiError
from vlm_server.grammar_pool import NUM_WORKERS, GrammarPool
from vlm_server.grammar_worker import MAX_COMPLAINT_CHARACTERS, GrammarLimits
from vlm_server.guided import json_grammar

WORD = LLMatcher.grammar_from_regex("[a-z]{3,8}")
LIMITS = GrammarLimits(cpu_s=0.5, memory_bytes=256 << 20)


def doubling(num_patterns: int) -> str:
    """A schema whose reading takes twice the time and memory for each further pattern."""
    words = [first + second for first, second in pairwise(string.ascii_lowercase)][:num_patterns]
    return json_grammar({"allOf": [{"type": "string", "pattern": f".*{word}.*"} for word in words]})


def rules(num_rules: int) -> str:
    return "start: r0\n" + "".join(f"r{index}: r{index + 1}\n" for index in range(num_rules)) + f'r{num_rules}: "a"\n'


@pytest.fixture
async def pool() -> AsyncIterator[GrammarPool]:
    pool = GrammarPool(LIMITS)
    await pool.open()
    yield pool
    await pool.close()


async def is_read(pool: GrammarPool, grammar: str = WORD) -> bool:
    return await pool.read(lambda: grammar) == grammar


async def test_a_grammar_that_takes_too_much_time_is_refused_and_the_next_one_is_read(pool: GrammarPool) -> None:
    """Regression: 800 bytes of schema took the server's memory and a lock that all grammars wait for, without end."""
    with pytest.raises(GrammarError, match=r"too large to be followed: .* 0.5 s of processor time or 256 MiB"):
        await pool.read(lambda: doubling(24))

    assert await is_read(pool)


async def test_a_grammar_that_takes_too_much_memory_is_refused_and_the_next_one_is_read() -> None:
    pool = GrammarPool(GrammarLimits(cpu_s=60.0, memory_bytes=32 << 20))
    await pool.open()

    with pytest.raises(GrammarError, match="32 MiB"):
        await pool.read(lambda: doubling(24))

    assert await is_read(pool)
    await pool.close()


async def test_what_is_wrong_with_a_grammar_is_said_briefly_by_workers_that_live_on(pool: GrammarPool) -> None:
    before = sorted(pool.process_ids)

    with pytest.raises(GrammarError, match="unclosed group"):
        await pool.read(lambda: "start: /(/")
    with pytest.raises(GrammarError, match="Unable to determine") as caught:
        await pool.read(lambda: doubling(13))

    assert len(str(caught.value)) <= MAX_COMPLAINT_CHARACTERS
    assert sorted(pool.process_ids) == before


async def test_a_chain_of_many_rules_fits_the_workers_stack() -> None:
    pool = GrammarPool()
    await pool.open()
    before = sorted(pool.process_ids)

    assert await is_read(pool, rules(18_000))

    assert sorted(pool.process_ids) == before
    await pool.close()


async def test_what_cannot_be_written_is_the_writers_error_and_gives_its_place_back(pool: GrammarPool) -> None:
    for _ in range(NUM_WORKERS + 1):
        with pytest.raises(json.JSONDecodeError):
            await pool.read(lambda: str(json.loads("{")))

    assert await is_read(pool)


async def test_a_client_has_one_worker_at_most_and_others_are_read_beside_it(pool: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(owner: str) -> "asyncio.Task[bool]":
        monkeypatch.setattr(grammar_pool, "owner_or", lambda tenant: owner)
        return asyncio.create_task(is_read(pool))

    for process_id in pool.process_ids:
        freeze(process_id)
    greedy = []
    for _ in range(3):
        greedy.append(start("greedy"))
        await asyncio.sleep(0)
    await until(lambda: pool._pool.num_idle == NUM_WORKERS - 1)
    other = start("other")
    await until(lambda: pool._pool.num_idle == 0)

    assert pool._places.used_by("greedy") == pool._places.used_by("other") == 1
    for process_id in pool.process_ids:
        os.kill(process_id, signal.SIGCONT)
    assert await asyncio.gather(other, *greedy) == [True] * 4


async def test_who_leaves_gives_the_place_back_when_the_grammar_is_read_and_who_waits_at_once(pool: GrammarPool) -> None:
    for process_id in pool.process_ids:
        freeze(process_id)
    reading = [asyncio.create_task(is_read(pool)) for _ in range(NUM_WORKERS)]
    await until(lambda: pool._pool.num_idle == 0)
    waiting = asyncio.create_task(is_read(pool))
    await until(lambda: pool._places.num_waiting == 1)

    for task in (*reading, waiting):
        task.cancel()
    await asyncio.gather(*reading, waiting, return_exceptions=True)

    assert (pool._places.used, pool._places.num_waiting) == (NUM_WORKERS, 0)
    for process_id in pool.process_ids:
        os.kill(process_id, signal.SIGCONT)
    await until(lambda: pool._places.used == 0)
    assert await is_read(pool)


async def test_a_wait_for_a_place_ends(pool: GrammarPool) -> None:
    pool._places = Budget("grammars to be read", NUM_WORKERS, wait_s=0.01)
    held = await pool._places.reserve(NUM_WORKERS)

    with pytest.raises(Exception, match="grammars to be read"):
        await is_read(pool)

    held.release()
    assert await is_read(pool)


async def test_a_grammar_whose_worker_somebody_kills_is_read_by_another_one(pool: GrammarPool) -> None:
    before = pool.process_ids
    for process_id in before:
        freeze(process_id)
    reading = asyncio.create_task(is_read(pool))
    await until(lambda: pool._pool.num_idle == NUM_WORKERS - 1)

    for process_id in before:
        os.kill(process_id, signal.SIGKILL)

    assert await reading


async def test_workers_that_cannot_be_had_are_no_fault_of_the_grammar(pool: GrammarPool) -> None:
    await pool.close()

    with pytest.raises(ApiError) as caught:
        await is_read(pool)

    assert (caught.value.status, caught.value.code) == (503, "grammar_unavailable")


async def test_closing_ends_the_workers(pool: GrammarPool) -> None:
    process_ids = pool.process_ids
    assert len(process_ids) == NUM_WORKERS

    await pool.close()

    assert all(is_gone(process_id) for process_id in process_ids)


async def test_workers_have_little_of_everything(pool: GrammarPool) -> None:
    for process_id in pool.process_ids:
        assert resource.prlimit(process_id, resource.RLIMIT_NOFILE) == (64, 64)
        assert resource.prlimit(process_id, resource.RLIMIT_FSIZE) == (0, 0)
        assert resource.prlimit(process_id, resource.RLIMIT_AS)[1] < 2 << 30


@pytest.mark.parametrize(("kind", "confined"), [("grammar", GrammarPool()), ("decode", DecodePool(VisionConfig()))])
async def test_what_the_system_cannot_keep_workers_from_is_said_in_the_log(
    kind: str, confined: GrammarPool | DecodePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def opened(_: WorkerPool) -> Frame:
        return Frame(msgspec.msgpack.encode([NETWORK]))

    monkeypatch.setattr(WorkerPool, "open", opened)

    await confined.open()

    (message,) = caplog.messages
    assert message.startswith(f"{kind} workers are limited")
    assert message.endswith("cannot keep them from: files, signals")
