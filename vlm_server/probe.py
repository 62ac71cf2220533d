"""The server tries itself out: a small picture, made here, goes the way of every request's pictures, up to one token of an answer.

It goes past the caches and the counters, and leaves nothing in them. A model without pictures is given a text. Knows nothing of HTTP and
of when, or for whom, it is done.
"""

import asyncio
import logging
import secrets
import struct
import zlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from engine.request import EngineDeadError, FinishReason, InvalidRequestError, Prompt, QueueFullError, SamplingParams, StepOutput
from vision.image import ImageOptions, ImageRef, MeasuredImage, MediaError, ProcessedImage
from vision.request_room import RequestRoom
from vision.workers import WorkerError
from vlm_server.chat_template import TemplateError
from vlm_server.jinja_process import RenderLimitError
from vlm_server.pipeline import Pipeline
from vlm_server.readiness import ENGINE, QUEUE, ProbeReport
from vlm_server.stage_timings import StageTimings

logger = logging.getLogger(__name__)

LIMIT_S = 120.0  # for all of it: a large model on few cores takes its time, and it waits its turn behind requests
PICTURE_SIDE = 64

_URL = "probe:picture"
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)
_TEXT = "Describe the image please"


class _Engine(Protocol):
    def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]: ...


class _Pictures(Protocol):
    """See `VisionService.try_out`."""

    async def try_out(self, data: bytes, options: ImageOptions, *, on_stage: Callable[[str], None]) -> ProcessedImage: ...


@dataclass(slots=True)
class _Progress:
    stage: str = "template"  # that is being tried
    timings: StageTimings = field(default_factory=StageTimings)

    def enter(self, stage: str) -> None:
        self.stage = stage


class _FailedError(Exception):
    """The engine ended the probe; the message says why."""


class PipelineProbe:
    """Of one engine and one pipeline. `images`: None for a model that takes no pictures. Called once at a time."""

    def __init__(self, engine: _Engine, pipeline: Pipeline, images: _Pictures | None, *, limit_s: float = LIMIT_S) -> None:
        self._engine = engine
        self._pipeline = pipeline
        self._images = images
        self._limit_s = limit_s

    async def __call__(self) -> ProbeReport:
        """Never raises, save where it is cancelled."""
        progress = _Progress()
        try:
            async with asyncio.timeout(self._limit_s):
                await self._run(progress)
        except QueueFullError as error:
            return self._failed(progress, str(error), stage=QUEUE, is_busy=True)
        except EngineDeadError as error:
            return self._failed(progress, str(error), stage=ENGINE)
        except TimeoutError:
            return self._failed(progress, f"no answer within {self._limit_s:g} s")
        except (MediaError, InvalidRequestError, _FailedError) as error:
            return self._failed(progress, str(error))
        except WorkerError:
            return self._failed(progress, "a worker process for pictures does not answer")
        except Exception:
            logger.exception("the probe failed at %s", progress.stage)
            return self._failed(progress, "it failed; the server's log says why")
        return ProbeReport(stages_s=progress.timings.seconds)

    def _failed(self, progress: _Progress, message: str, *, stage: str | None = None, is_busy: bool = False) -> ProbeReport:
        stage = stage or progress.stage
        return ProbeReport(stages_s=progress.timings.seconds, failed_stage=stage, message=f"{stage}: {message}", is_busy=is_busy)

    async def _run(self, progress: _Progress) -> None:
        prompt = replace(await self._prompt(progress), is_probe=True)
        try:
            await self._answer(prompt, progress)
        finally:
            prompt.close()

    async def _answer(self, prompt: Prompt, progress: _Progress) -> None:
        progress.enter("queue")
        num_tokens = 0
        async with aclosing(self._engine.generate(prompt, _ONE_TOKEN, request_id=f"probe-{secrets.token_hex(8)}")) as steps:
            async for step in steps:
                progress.timings.seconds.update(step.timings_s or {})
                progress.enter("encode" if prompt.images and "encode" not in progress.timings.seconds else "prefill")
                if step.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise _FailedError(step.error or "the engine gave it up")
                num_tokens += len(step.token_ids)
        if num_tokens != 1:
            raise _FailedError(f"the engine answered with {num_tokens} tokens, not with one")

    async def _prompt(self, progress: _Progress) -> Prompt:
        """As a chat; without the template where that takes no such chat: the model can still be used without it."""
        pictures = None if self._images is None else _Pictured(self._images, progress)
        pipeline = self._pipeline.with_images(pictures)
        parts: list[dict[str, Any]] = [{"type": "text", "text": _TEXT}]
        if pictures is not None:
            parts.insert(0, {"type": "image_url", "image_url": {"url": _URL, "detail": "low"}})
        try:
            return await pipeline.chat_prompt([{"role": "user", "content": parts}], timings=progress.timings)
        except TemplateError as error:
            if isinstance(error.__cause__, RenderLimitError):
                raise
            progress.enter("tokenize")
            return await pipeline.parts_prompt(parts, param="probe")
        finally:
            pipeline.close()


class _Pictured:
    """The pipeline's pictures, each of them the one that is made here."""

    def __init__(self, images: _Pictures, progress: _Progress) -> None:
        self._images = images
        self._progress = progress

    def request_room(self) -> RequestRoom:
        raise NotImplementedError

    async def load(
        self,
        refs: Sequence[ImageRef],
        *,
        tenant: str = "",
        room: RequestRoom | None = None,
        on_loaded: Callable[[ProcessedImage], None] | None = None,
    ) -> list[ProcessedImage | MediaError]:
        """Nobody is told that they are there: an announced picture would stay in the engine's cache."""
        images: list[ProcessedImage | MediaError] = [
            await self._images.try_out(picture(), ref.options, on_stage=self._progress.enter) for ref in refs
        ]
        self._progress.enter("tokenize")
        return images

    async def measure(self, refs: Sequence[ImageRef], *, tenant: str = "") -> list[MeasuredImage | MediaError]:
        raise NotImplementedError

    async def fetch(
        self, refs: Sequence[ImageRef], *, limit_bytes: int, tenant: str = "", kept: Mapping[str, bytes] | None = None
    ) -> list[bytes | MediaError]:
        raise NotImplementedError


def picture(side: int = PICTURE_SIDE) -> bytes:
    """A PNG of `side` × `side` pixels, RGB: one colour grows from left to right, one from top to bottom."""
    ramp = [255 * place // (side - 1) for place in range(side)]
    rows = b"".join(b"\0" + b"".join(bytes((across, down, 128)) for across in ramp) for down in ramp)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
