"""Turns of interactive sessions: history, pictures, prompt, answer, and history again.

Each turn is a task of its own, so that it can be cancelled by another request, and gives its session back whether its client waits for it
or left. What is saved is a whole turn or nothing. Knows nothing of HTTP.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from engine.request import Prompt
from vision.image import ImageRef
from vlm_server.backend import PromptPipeline
from vlm_server.config import RequestLimits
from vlm_server.errors import ApiError
from vlm_server.generation import Generation, Usage
from vlm_server.picture_report import PictureReport
from vlm_server.request_limits import check_conversation
from vlm_server.sessions.history import PICTURE_SCHEME, History, OpenSession, SessionBusyError, Sessions, picture_url
from vlm_server.sessions.store import LeaseLostError, RecordId
from vlm_server.stage_timings import StageTimings

logger = logging.getLogger(__name__)

WAIT_FOR_END_S = 30.0  # of a running turn, when its session is to be ended
WAIT_FOR_CANCEL_S = 5.0
MAX_REPLIES_AHEAD = 64  # that are made and not read; then the turn waits, and its engine's queue fills, which has a limit
_POLL_S = 0.1  # of a session that another server works on

_NO_USAGE = Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0, image_tokens=0)


@dataclass(frozen=True, slots=True)
class Reply:
    """A piece of an answer; the last one, and no other, has a finish reason."""

    text: str = ""
    usage: Usage = _NO_USAGE  # of the turn so far
    history_tokens: int = 0  # of the prompt's tokens, those that earlier turns left
    finish_reason: str | None = None  # stop, length, or abort for a turn that was cancelled


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    tenant: str
    session_id: RecordId | None  # None: nothing was kept before
    keeps: bool  # the session after this turn; else it ends
    messages: list[dict[str, Any]]
    pictures: Sequence[tuple[int, int, str]] = ()  # (message, part, the field's path in the request)
    files: Mapping[str, bytes] = field(default_factory=dict)  # of those pictures that are here already, by the URL in their message
    generation: Callable[[Prompt], Generation]
    report: PictureReport = field(default_factory=PictureReport)  # of the turn's own pictures
    prompt_prepared: Callable[[float], None] = lambda duration_s: None
    timings: StageTimings = field(default_factory=StageTimings)  # of the client's request


@dataclass(slots=True, eq=False)
class _Turn:
    """A turn under way, and what its client has not read yet."""

    request: TurnRequest
    replies: "asyncio.Queue[Reply | Exception]" = field(default_factory=asyncio.Queue)
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_REPLIES_AHEAD))  # for all replies but the last
    task: "asyncio.Task[None] | None" = None
    generation: Generation | None = None
    num_known_tokens: int = 0
    is_final: bool = False  # from here on it cannot be cancelled by another request: its history may be written
    is_aborted: bool = False
    is_left: bool = False

    def abort(self) -> None:
        if self.task is not None and not self.is_final and not self.is_aborted:
            self.is_aborted = True
            self.task.cancel()

    def leave(self) -> None:
        """Nobody reads the answer any more. A turn that is being saved ends by itself."""
        self.is_left = True
        if self.task is not None and not self.is_final:
            self.task.cancel()

    def reply(self, text: str = "", finish_reason: str | None = None) -> Reply:
        usage = self.generation.usage() if self.generation is not None else _NO_USAGE
        return Reply(text, usage, self.num_known_tokens, finish_reason)


class Turns:
    """All turns of one server. `aclose()` ends those that run."""

    def __init__(self, sessions: Sessions, pipeline: PromptPipeline, *, limits: RequestLimits | None = None) -> None:
        self._sessions = sessions
        self._limits = limits or RequestLimits()
        self._pipeline = pipeline
        self._turns: set[_Turn] = set()
        self._running: dict[RecordId, _Turn] = {}  # those that have their session

    @property
    def num_running(self) -> int:
        return len(self._turns)

    @property
    def sessions(self) -> Sessions:
        return self._sessions

    async def replies(self, request: TurnRequest) -> AsyncGenerator[Reply, None]:
        """The turn's answer in pieces. Closing it cancels the turn, which then leaves the history as it was.

        Raises SessionBusyError, StoreError, and what pipeline and generation raise, with the field's path in the turn's own request.
        """
        turn = _Turn(request)
        turn.task = asyncio.create_task(self._run(turn))
        self._turns.add(turn)
        turn.task.add_done_callback(lambda task: self._forget(turn, task))
        try:
            while True:
                item = await turn.replies.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
                turn.room.release()
        finally:
            turn.leave()

    def _forget(self, turn: _Turn, task: asyncio.Task[None]) -> None:
        self._turns.discard(turn)
        if not task.cancelled():
            return
        if not turn.is_left:  # something that it waited for was cancelled: its reader would wait for ever
            logger.error("a turn was cancelled, and nobody had asked for it")
        turn.replies.put_nowait(ApiError(500, "internal_error", "internal error: the turn was cancelled, and nobody had asked for it"))

    async def cancel(self, session_id: RecordId) -> None:
        """Stops the session's running turn, here or on another server. Where none runs, nothing happens."""
        turn = self._running.get(session_id)
        if turn is None or turn.task is None:
            await self._sessions.revoke(session_id)
            return
        turn.abort()
        await asyncio.wait((turn.task,), timeout=WAIT_FOR_CANCEL_S)

    async def end(self, session_id: RecordId) -> None:
        """Ends the session, after a running turn. Raises SessionBusyError where that takes too long."""
        deadline_s = time.monotonic() + WAIT_FOR_END_S
        while True:
            try:
                return await self._sessions.end(session_id)
            except SessionBusyError:
                left_s = deadline_s - time.monotonic()
                if left_s < 0:
                    raise
            turn = self._running.get(session_id)
            if turn is None or turn.task is None:
                await asyncio.sleep(_POLL_S)
            else:  # however many wait, the store is not asked before it is worth it
                await asyncio.wait((turn.task,), timeout=left_s)

    async def aclose(self) -> None:
        tasks = [turn.task for turn in self._turns if turn.task is not None]
        for turn in self._turns:
            turn.leave()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, turn: _Turn) -> None:
        try:
            session_id = turn.request.session_id
            reply = await (self._alone(turn) if session_id is None else self._in_session(turn, session_id))
        except LeaseLostError:
            reply = turn.reply(finish_reason="abort")
        except asyncio.CancelledError:
            if not turn.is_aborted:
                raise
            reply = turn.reply(finish_reason="abort")
        except Exception as error:  # handed to the reader, who raises it
            turn.replies.put_nowait(error)
            return
        turn.replies.put_nowait(reply)

    async def _alone(self, turn: _Turn) -> Reply:
        reply, _ = await self._answer(turn, History(), turn.request.messages, dict(turn.request.files))
        return reply

    async def _in_session(self, turn: _Turn, session_id: RecordId) -> Reply:
        """The last reply, once the session is written and free again."""
        async with self._sessions.open(session_id, on_lost=turn.abort) as session:
            self._running[session_id] = turn
            try:
                messages, pictures = await self._with_kept_pictures(turn.request, session)
                reply, history = await self._answer(turn, session.history, messages, pictures)
                turn.is_final = True
                if not turn.request.keeps:
                    await session.end()
                elif history is not None:
                    await session.save(history, {url: pictures[url] for url in history.picture_urls})
            finally:
                if self._running.get(session_id) is turn:
                    del self._running[session_id]
        return reply

    async def _with_kept_pictures(self, request: TurnRequest, session: OpenSession) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        """The turn's messages, their pictures' URLs replaced by ours, and the files of all of the session's pictures."""
        if not request.keeps or not request.pictures:
            return request.messages, session.pictures | dict(request.files)
        messages = deepcopy(request.messages)
        images = [messages[number]["content"][index]["image_url"] for number, index, _ in request.pictures]
        paths = [path for _, _, path in request.pictures]
        refs = [ImageRef(image["url"], path, data=request.files.get(image["url"])) for image, path in zip(images, paths, strict=True)]
        limit_bytes = max(0, self._sessions.max_bytes - session.num_picture_bytes)
        kept = {url.removeprefix(PICTURE_SCHEME): data for url, data in session.pictures.items()}
        with request.timings.stage("pictures"):
            files = await self._pipeline.fetch_pictures(
                refs, limit_bytes=limit_bytes, tenant=request.tenant, report=request.report, kept=kept
            )
        had = [(image, data) for image, data in zip(images, files, strict=True) if data is not None]
        urls = await asyncio.to_thread(lambda: [picture_url(data) for _, data in had])
        for (image, _), url in zip(had, urls, strict=True):
            image["url"] = url
        return messages, session.pictures | {url: data for url, (_, data) in zip(urls, had, strict=True)}

    async def _answer(
        self, turn: _Turn, history: History, new: list[dict[str, Any]], pictures: dict[str, bytes]
    ) -> tuple[Reply, History | None]:
        """The turn's last reply, and the history with the turn; None where the window was too small for it."""
        request, messages = turn.request, [*history.messages, *new]
        check_conversation(messages, self._limits, param="session_id")
        started_s = time.monotonic()
        first = len(history.messages)
        names = {f"messages[{first + number}].content[{index}].image_url": path for number, index, path in request.pictures}
        prompt = await self._pipeline.turn_prompt(
            messages,
            known=history.transcript,
            pictures=pictures,
            names=names,
            tenant=request.tenant,
            timings=request.timings,
            report=request.report,
        )
        request.prompt_prepared(time.monotonic() - started_s)
        turn.generation = request.generation(prompt.prompt)
        turn.num_known_tokens = prompt.num_known_tokens
        try:
            text, reply = await self._generate(turn, turn.generation)
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            return turn.reply(finish_reason="length"), None
        transcript = await asyncio.to_thread(self._pipeline.with_answer, prompt.transcript, turn.generation.token_ids)
        failed = {error.param for error in request.report.left_out}
        kept = _without(messages, {(first + number, index) for number, index, path in request.pictures if path in failed})
        urls = [url for url in pictures if not failed or url in _picture_urls(kept)]
        return reply, History([*kept, {"role": "assistant", "content": text}], transcript, urls)

    async def _generate(self, turn: _Turn, generation: Generation) -> tuple[str, Reply]:
        """The whole text, and the last reply, which is not given to the client yet."""
        pieces: list[str] = []
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                pieces.append(delta.text)
                if len(pieces) == 1 or delta.finish_reason is not None:
                    generation.tell(turn.request.timings)
                if delta.finish_reason is not None:
                    return "".join(pieces), turn.reply(delta.text, delta.finish_reason)
                turn.replies.put_nowait(turn.reply(delta.text))
                await turn.room.acquire()
        raise AssertionError("the generation ended without a finish reason")


def _without(messages: list[dict[str, Any]], places: Collection[tuple[int, int]]) -> list[dict[str, Any]]:
    """The messages without some (message, part), as the prompt was made: a message that has nothing else keeps an empty text."""
    kept = []
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list) and any(place[0] == number for place in places):
            parts = [part for index, part in enumerate(content) if (number, index) not in places]
            message = {**message, "content": parts or [{"type": "text", "text": ""}]}
        kept.append(message)
    return kept


def _picture_urls(messages: list[dict[str, Any]]) -> set[str]:
    parts = (part for message in messages if isinstance(message.get("content"), list) for part in message["content"])
    return {part["image_url"]["url"] for part in parts if part["type"] == "image_url"}
