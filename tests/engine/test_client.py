"""The client and a real engine process on a tiny checkpoint. What the HTTP server makes of it is tested end to end."""

import asyncio
import errno
import json
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from llguidance import LLMatcher

import engine.client
from engine.channel import AsyncSender, Channel
from engine.client import EngineClient, EngineState
from engine.config import EngineConfig
from engine.messages import ToEngine, Withdraw
from engine.request import (
    EngineDeadError,
    InvalidRequestError,
    Prompt,
    PromptTooLongError,
    QueueFullError,
    SamplingParams,
    UnreadError,
    make_cache_keys,
)
from tests.engine.fake_encoder import fake_image
from tests.tiny_models import write_tiny
from vlm_server.tokenizer import TextTokenizer, load_tokenizer

WAIT_S = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EngineConfig:
    folder = write_tiny("llama", tmp_path_factory.mktemp("llama"))
    config = EngineConfig(model_folder=str(folder), device="cpu", session_len=512, num_threads=1)
    return config.resolve(json.loads((folder / "config.json").read_text()))


@pytest.fixture
async def client(config, monkeypatch) -> AsyncIterator[EngineClient]:
    monkeypatch.setattr(engine.client, "FIRST_BACKOFF_S", 0.01)
    client = EngineClient(config)
    await client.start()
    yield client
    await client.close()


def prompt(*token_ids: int) -> Prompt:
    return Prompt(token_ids=token_ids, cache_keys=make_cache_keys(token_ids, (), ()))


async def ask(client: EngineClient, name: str, *, num_tokens: int = 4) -> list[int]:
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    outputs = [output async for output in client.generate(prompt(5, 6, 7), params, request_id=name)]
    return [token_id for output in outputs for token_id in output.token_ids]


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_true():  # noqa: ASYNC110 - the client has no event for it
            await asyncio.sleep(0.01)


async def until_running(client: EngineClient, count: int) -> None:
    """Aborts are sent without waiting, so a moment may pass."""
    async with asyncio.timeout(1.0):
        while (await client.stats()).num_running != count:
            pass


async def test_requests_are_answered_refused_aborted_and_survive_a_crash(client):
    """One engine process for all of it: starting one takes seconds."""
    together = await asyncio.gather(*(ask(client, f"request {i}") for i in range(5)))
    assert together == [together[0]] * 5
    assert len(together[0]) == 4

    with pytest.raises(PromptTooLongError) as too_long:
        await anext(client.generate(prompt(*range(3, 515 - 200), *range(3, 203)), SamplingParams(), request_id="long"))
    assert (too_long.value.num_tokens, too_long.value.session_len) == (512, 512)
    with pytest.raises(InvalidRequestError, match="outside"):
        await anext(client.generate(prompt(4000), SamplingParams(), request_id="unknown token"))

    stream = client.generate(prompt(5, 6), SamplingParams(max_tokens=400, ignore_eos=True), request_id="left")
    await anext(stream)
    with pytest.raises(InvalidRequestError, match="running already"):
        await anext(client.generate(prompt(5), SamplingParams(), request_id="left"))
    await stream.aclose()
    await until_running(client, 0)
    assert (await client.stats()).num_referenced_blocks == 0

    client._streams.limit_bytes = 20_000
    unread = client.generate(prompt(5, 6), SamplingParams(max_tokens=400, ignore_eos=True), request_id="unread")
    await anext(unread)
    await until_running(client, 0)
    with pytest.raises(UnreadError):
        _ = [output async for output in unread]
    assert len(client._streams) == client._streams.num_bytes == 0
    assert (await client.stats()).num_referenced_blocks == 0

    running = asyncio.create_task(ask(client, "in the crash", num_tokens=500))
    await until_running(client, 1)
    os.kill(client.process_id, signal.SIGKILL)
    with pytest.raises(EngineDeadError) as dead:
        await running
    assert not dead.value.is_final
    with pytest.raises(EngineDeadError, match="restarting"):
        await ask(client, "too early")
    await until(lambda: client.state is EngineState.READY)
    assert await ask(client, "after the crash") == together[0]
    assert client.num_restarts == 1


async def test_grammars_are_followed_before_and_after_a_crash(client, config):
    tokenizer = TextTokenizer(load_tokenizer(config.model_folder))
    params = SamplingParams(max_tokens=60, seed=1, grammar=LLMatcher.grammar_from_regex("(yes|no), [0-9]{4}"))

    async def guided(name: str) -> str:
        outputs = [output async for output in client.generate(prompt(5, 6, 7), params, request_id=name)]
        return tokenizer.decode([token_id for output in outputs for token_id in output.token_ids])

    with pytest.raises(InvalidRequestError, match="vocabulary"):
        await guided("too early")
    await client.set_vocabulary(tokenizer.vocabulary())
    before = await guided("before")
    os.kill(client.process_id, signal.SIGKILL)
    await until(lambda: client.num_restarts == 1 and client.state is EngineState.READY)

    assert re.fullmatch("(yes|no), [0-9]{4}", before)
    assert await guided("after") == before


async def test_an_engine_that_does_not_answer_is_killed_and_started_again(client, monkeypatch):
    monkeypatch.setattr(engine.client, "HANG_TIMEOUT_S", 0.05)
    monkeypatch.setattr(engine.client, "PING_INTERVAL_S", 0.05)
    watched = EngineClient(client.config)
    await watched.start()
    hanging = watched.process_id

    os.kill(hanging, signal.SIGSTOP)
    await until(lambda: watched.num_restarts == 1)
    monkeypatch.setattr(engine.client, "HANG_TIMEOUT_S", WAIT_S)
    await until(lambda: watched.state is EngineState.READY)

    assert watched.process_id != hanging
    assert await ask(watched, "again")
    await watched.close()


async def test_an_engine_that_hangs_with_full_sockets_is_told_from_a_busy_one_by_its_processor_time(client, monkeypatch):
    """Its requests get an error, those too that it has not read; it need not be waited for as long as a busy one."""
    monkeypatch.setattr(engine.client, "PING_INTERVAL_S", 0.01)
    monkeypatch.setattr(engine.client, "PULSE_INTERVAL_S", 0.05)
    monkeypatch.setattr(engine.client, "STALL_TIMEOUT_S", 0.2)
    watched = EngineClient(client.config)
    await watched.start()

    os.kill(watched.process_id, signal.SIGSTOP)
    long = tuple(range(3, 400)) * 500  # fills the socket
    requests = [asyncio.create_task(ask_long(watched, f"request {number}", long)) for number in range(3)]
    results = await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), WAIT_S)

    assert [type(result) for result in results] == [EngineDeadError] * 3
    assert watched.state is EngineState.RESTARTING
    await watched.close()


async def test_an_engine_that_hangs_and_can_be_sent_nothing_is_killed_and_started_again(client, monkeypatch):
    """Regression: a failed ping was taken for the process's end, which nobody then brought about."""
    monkeypatch.setattr(engine.client, "PING_INTERVAL_S", 0.01)
    watched = EngineClient(client.config)
    await watched.start()

    os.kill(watched.process_id, signal.SIGSTOP)
    watched._connection.sender._end()
    await until(lambda: watched.num_restarts == 1)

    await watched.close()


async def ask_long(client: EngineClient, name: str, token_ids: tuple[int, ...]) -> None:
    async for _ in client.generate(Prompt(token_ids=token_ids, cache_keys=token_ids), SamplingParams(), request_id=name):
        pass


async def test_a_process_that_cannot_be_started_again_is_tried_until_it_can(client, monkeypatch):
    failures = iter([OSError("no more processes"), RuntimeError("can't start new thread")])
    spawn = engine.client._spawn

    async def fails_twice(config: EngineConfig):
        for failure in failures:
            raise failure
        return await spawn(config)

    monkeypatch.setattr(engine.client, "_spawn", fails_twice)

    os.kill(client.process_id, signal.SIGKILL)
    await until(lambda: client.num_restarts == 3 and client.state is EngineState.READY)

    assert await ask(client, "at last")


async def test_an_engine_that_cannot_be_started_at_all_is_a_final_failure(config, monkeypatch):
    async def fail(config: EngineConfig):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(engine.client, "_spawn", fail)
    client = EngineClient(config)

    with pytest.raises(EngineDeadError) as failure:
        await asyncio.wait_for(client.start(), WAIT_S)

    assert failure.value.is_final
    await client.close()


async def test_progress_that_cannot_be_told_ends_no_engine(config):
    """Regression: a standard error that was gone was taken for the end of the engine's socket, at each start anew."""

    def fail(fraction: float) -> None:
        raise BrokenPipeError

    client = EngineClient(config, on_progress=fail)

    await client.start()

    assert client.state is EngineState.READY
    await client.close()


async def test_signals_for_the_whole_group_leave_the_engine_to_its_server(client):
    """A terminal's Ctrl-C, or a service manager that stops all processes at once: running requests may finish."""
    running = asyncio.create_task(ask(client, "running", num_tokens=100))
    await until_running(client, 1)

    os.kill(client.process_id, signal.SIGTERM)

    assert len(await running) == 100
    assert os.getpgid(client.process_id) != os.getpgid(0)


async def test_a_killed_engine_is_waited_for_by_nobody(config):
    client = EngineClient(config)
    await client.start()
    process_id = client.process_id
    os.kill(process_id, signal.SIGSTOP)

    client.kill()
    async with asyncio.timeout(engine.client.EXIT_TIMEOUT_S / 2):
        await client.close()

    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


@pytest.mark.parametrize(
    ("backoff_s", "served_s", "expected_s"), [(0.5, None, 1.0), (20.0, None, 30.0), (0.5, 1.0, 1.0), (8.0, 1.0, 8.0), (8.0, 11.0, 0.5)]
)
async def test_the_pause_grows_with_engines_that_served_for_a_moment_or_not_at_all(config, monkeypatch, backoff_s, served_s, expected_s):
    client = EngineClient(config)
    client._ready_since_s = None if served_s is None else asyncio.get_running_loop().time() - served_s

    assert client._next_backoff_s(backoff_s) == expected_s


@pytest.mark.full
@pytest.mark.parametrize("is_busy", [False, True])
async def test_a_killed_rank_ends_the_engine_which_starts_again_whole(config, monkeypatch, is_busy):
    monkeypatch.setattr(engine.client, "PING_INTERVAL_S", 0.1)
    client = EngineClient(replace(config, tp=2))
    await client.start()
    expected = await ask(client, "before")
    rank = psutil.Process(client.process_id).children()[0]
    running = asyncio.create_task(ask(client, "running", num_tokens=500)) if is_busy else None
    await until_running(client, int(is_busy))

    rank.kill()
    if running is not None:
        with pytest.raises(EngineDeadError):
            await running
    await until(lambda: client.num_restarts == 1 and client.state is EngineState.READY)

    assert await ask(client, "after") == expected
    await client.close()


@pytest.mark.full
async def test_an_engine_leaves_no_files_however_it_ends(config, monkeypatch, tmp_path: Path):
    """Its ranks meet in a folder; the first one is killed, and the second one asked to end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client = EngineClient(replace(config, tp=2))
    await client.start()
    (first,) = os.listdir(tmp_path)

    psutil.Process(client.process_id).kill()
    await until(lambda: client.num_restarts == 1 and client.state is EngineState.READY)
    (second,) = os.listdir(tmp_path)
    await client.close()

    assert first != second
    assert not os.listdir(tmp_path)


@pytest.mark.full
async def test_a_stopped_rank_is_ended_with_the_engine_that_waits_for_it(config, monkeypatch):
    monkeypatch.setattr(engine.client, "PING_INTERVAL_S", 0.1)
    monkeypatch.setattr(engine.client, "STALL_TIMEOUT_S", 2.0)
    client = EngineClient(replace(config, tp=2))
    await client.start()
    rank = psutil.Process(client.process_id).children()[0]
    rank.suspend()

    with pytest.raises(EngineDeadError):
        await ask(client, "hangs")
    await until(lambda: not rank.is_running())
    await until(lambda: client.state is EngineState.READY)

    assert await ask(client, "after")
    await client.close()


async def test_a_checkpoint_that_cannot_be_served_is_a_final_failure(config, tmp_path: Path):
    (tmp_path / "config.json").write_text((Path(config.model_folder) / "config.json").read_text())
    client = EngineClient(EngineConfig(model_folder=str(tmp_path), session_len=64))

    with pytest.raises(EngineDeadError, match=r"no \*\.safetensors") as failure:
        await client.start()

    assert failure.value.is_final
    assert client.state is EngineState.FAILED
    await client.close()


async def test_a_checkpoint_that_is_gone_for_a_while_ends_no_restarting(config, tmp_path: Path, monkeypatch):
    """A network mount that hiccups, a device that comes back."""
    monkeypatch.setattr(engine.client, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(engine.client, "MAX_START_BACKOFF_S", 0.1)
    folder = tmp_path / "checkpoint"
    shutil.copytree(config.model_folder, folder)
    client = EngineClient(replace(config, model_folder=str(folder)))
    await client.start()
    weights = list(folder.glob("*.safetensors"))
    for file in weights:
        file.rename(file.with_suffix(".away"))

    os.kill(client.process_id, signal.SIGKILL)
    await until(lambda: client.num_restarts >= 2)
    assert client.state is EngineState.RESTARTING
    for file in weights:
        file.with_suffix(".away").rename(file)
    await until(lambda: client.state is EngineState.READY)

    assert await ask(client, "after")
    await client.close()


async def test_an_engine_that_dies_in_its_first_start_is_a_final_failure(config):
    client = EngineClient(config)
    starting = asyncio.create_task(client.start())
    await until(lambda: client.process_id is not None)

    os.kill(client.process_id, signal.SIGKILL)

    with pytest.raises(EngineDeadError, match="ended while it started") as failure:
        await starting
    assert failure.value.is_final
    assert client.num_restarts == 0
    await client.close()


async def test_pictures_that_the_kernel_does_not_take_are_refused_for_now_and_the_engine_is_not_called_dead(config, monkeypatch):
    class FullSender:
        async def send(self, message: object) -> None:
            raise OSError(errno.ETOOMANYREFS, "too many references")

    client = EngineClient(config)
    monkeypatch.setattr(client, "_ready_sender", FullSender)

    with pytest.raises(QueueFullError, match="too many pictures are on their way"):
        await ask(client, "r")

    assert len(client._streams) == 0


async def test_a_picture_that_the_kernel_does_not_take_is_not_announced_after_it_was_withdrawn(config, monkeypatch):
    ours, theirs = socket.socketpair()
    sender, receiver = AsyncSender(ours), Channel(theirs, ToEngine)
    client = EngineClient(config)
    monkeypatch.setattr(client, "_ready_sender", lambda: sender)
    send_fds, is_full = socket.send_fds, True

    def send_unless_full(*args: Any) -> int:
        if is_full:
            raise OSError(errno.ETOOMANYREFS, "too many references")
        return send_fds(*args)

    monkeypatch.setattr(socket, "send_fds", send_unless_full)
    announcement = client.announcement()
    announcement.add(fake_image(1))
    announcement.end(request_follows=False)
    withdraw = await asyncio.to_thread(receiver.receive, 5.0)
    is_full = False
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    assert isinstance(withdraw, Withdraw)
    assert receiver.receive(0.0) is None
    sender.close()
    receiver.close()


async def test_closing_ends_the_process_and_what_runs(config):
    client = EngineClient(config)
    await client.start()
    process_id = client.process_id
    running = asyncio.create_task(ask(client, "running", num_tokens=500))
    await until_running(client, 1)

    await client.close()

    with pytest.raises(EngineDeadError):
        await running
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)
