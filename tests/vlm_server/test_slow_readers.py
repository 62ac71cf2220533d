"""Readers that stop or are slow: what is made ahead of them is bounded, and whoever gets on keeps his connection."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from engine.request import Prompt, SamplingParams, UnreadError
from tests.contract.fake_engine import SESSION_LEN, FakeBackend
from tests.vlm_server.byte_tokenizer import ByteTokenizer
from vlm_server.connections import MIN_TAKEN_BYTES, _Progress
from vlm_server.errors import ApiError, to_api_error
from vlm_server.generation import MAX_DELTAS_AHEAD, Generation
from vlm_server.metrics import Metrics
from vlm_server.protocol import CompletionRequest
from vlm_server.sessions.history import Sessions
from vlm_server.sessions.opening import open_store
from vlm_server.sessions.store import Limits
from vlm_server.turns import MAX_REPLIES_AHEAD, TurnRequest, Turns

PROMPT = Prompt(token_ids=(104, 105), cache_keys=(104, 105))
LONG = SamplingParams(max_tokens=SESSION_LEN, ignore_eos=True)


class Counted:
    """An engine that counts the steps which were taken from it: one letter each."""

    def __init__(self, backend: FakeBackend) -> None:
        self.num_steps = 0
        self._engine = backend.engine
        self._engine.script = lambda prompt, params: b"a"

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> Any:
        async with aclosing(self._engine.generate(prompt, params, request_id=request_id)) as steps:
            async for step in steps:
                self.num_steps += 1
                yield step


def generation_of(engine: Any, *, n: int = 1) -> Generation:
    body = CompletionRequest(model="m", prompt="hi", n=n)
    return Generation(engine, ByteTokenizer(), [PROMPT], LONG, body, request_id="x", metrics=Metrics())


async def settled() -> None:
    """Lets all that can run do so."""
    for _ in range(20 * SESSION_LEN):
        await asyncio.sleep(0)


async def test_several_answers_are_not_made_far_ahead_of_their_reader() -> None:
    engine = Counted(FakeBackend())
    deltas = generation_of(engine, n=4).deltas()

    await anext(deltas)
    await settled()
    num_ahead = engine.num_steps
    rest = [delta async for delta in deltas]

    assert num_ahead <= 1 + MAX_DELTAS_AHEAD + 4
    assert sum(delta.finish_reason is not None for delta in rest) == 4
    assert engine.num_steps > 4 * 400


@pytest.fixture
async def sessions() -> AsyncIterator[Sessions]:
    async with open_store("memory") as store:
        yield Sessions(store, model="m", limits=Limits(60, 10), max_bytes=1000)


def turn_of(sessions: Sessions, engine: Any) -> TurnRequest:
    return TurnRequest(
        tenant="",
        session_id=sessions.id_of("", 1),
        keeps=True,
        messages=[{"role": "user", "content": "hi"}],
        generation=lambda prompt: generation_of(engine),
    )


class CancelledWithin:
    """An engine in which something is cancelled that a turn waits for, and not by the turn's client."""

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncIterator[Any]:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        yield await future


async def test_a_turn_that_is_cancelled_by_nobody_tells_its_reader(sessions: Sessions, caplog: pytest.LogCaptureFixture) -> None:
    replies = Turns(sessions, FakeBackend().pipeline).replies(turn_of(sessions, CancelledWithin()))

    with pytest.raises(ApiError, match="internal error") as failure:
        await asyncio.wait_for(anext(replies), 5)

    assert (failure.value.status, failure.value.code) == (500, "internal_error")
    assert "nobody had asked for it" in caplog.text
    async with sessions.open(sessions.id_of("", 1), on_lost=lambda: None):
        pass


async def test_a_turn_waits_for_its_reader_and_is_whole_in_the_end(sessions: Sessions) -> None:
    backend = FakeBackend()
    engine = Counted(backend)
    replies = Turns(sessions, backend.pipeline).replies(turn_of(sessions, engine))

    await anext(replies)
    await settled()
    num_ahead = engine.num_steps
    rest = [reply async for reply in replies]

    assert num_ahead <= 2 + MAX_REPLIES_AHEAD
    assert rest[-1].finish_reason == "length"
    assert engine.num_steps > 400


async def test_a_turn_that_nobody_reads_can_be_cancelled(sessions: Sessions) -> None:
    backend = FakeBackend()
    turns = Turns(sessions, backend.pipeline)
    replies = turns.replies(turn_of(sessions, backend.engine))
    await anext(replies)
    await settled()

    await asyncio.wait_for(turns.cancel(sessions.id_of("", 1)), 2)

    assert len(backend.activity) == 0
    assert [reply.finish_reason async for reply in replies][-1] == "abort"


class FakeTransport:
    """Of which a test says how much is unread, and when time passes."""

    def __init__(self, num_unread: int) -> None:
        self.num_unread = num_unread
        self.is_cut = False
        self.call: Callable[[], None] | None = None

    def get_write_buffer_size(self) -> int:
        return self.num_unread

    def abort(self) -> None:
        self.is_cut = True

    def call_later(self, delay_s: float, call: Callable[..., None], *args: Any) -> "FakeTransport":
        self.call = lambda: call(*args)
        return self

    def cancel(self) -> None:
        self.call = None

    def pass_limit(self) -> None:
        assert self.call is not None
        self.call()


@pytest.mark.parametrize(("taken_bytes", "is_cut"), [(0, True), (1, True), (MIN_TAKEN_BYTES - 1, True), (MIN_TAKEN_BYTES, False)])
def test_a_large_answer_that_is_read_steadily_is_not_cut(taken_bytes: int, is_cut: bool) -> None:
    transport: Any = FakeTransport(10 << 20)
    progress = _Progress(transport, transport, 60.0)
    progress.watch()

    for _ in range(50):
        transport.num_unread -= taken_bytes
        if not transport.is_cut:
            transport.pass_limit()

    assert transport.is_cut == is_cut


def test_what_was_read_before_does_not_count_again() -> None:
    transport: Any = FakeTransport(10 << 20)
    progress = _Progress(transport, transport, 60.0)
    progress.watch()
    transport.num_unread -= 5 << 20
    transport.pass_limit()

    transport.pass_limit()

    assert transport.is_cut


def test_an_answer_that_was_given_up_says_so() -> None:
    error = to_api_error(UnreadError("4096 KiB were written and not read"))

    assert (error.status, error.code) == (503, "answer_not_read")
