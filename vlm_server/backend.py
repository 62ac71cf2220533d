"""What the routes talk to: an engine, a pipeline and what reads grammars, opened and closed together.

The protocols are all that the routes know of them, so that tests can put scripted ones in their place.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from engine.request import EngineInfo, EngineStats, Prompt, SamplingParams, StepOutput
from vision.config import VisionConfig
from vision.image import ImageRef
from vision.media_budgets import MediaBudgets
from vision.request_room import RequestRoom
from vision.service import VisionStats
from vlm_server.config import RequestLimits, ServerConfig
from vlm_server.detokenizer import StopWords, TextDecoder
from vlm_server.jinja_worker import RenderLimits
from vlm_server.picture_report import PictureReport
from vlm_server.readiness import Probe
from vlm_server.stage_timings import StageTimings
from vlm_server.transcript import Transcript, TurnPrompt

MAX_TEMPLATE_CHARACTERS = 4 << 20  # that a chat template may write beside the request's own text


class Engine(Protocol):
    """See `engine.client.EngineClient`."""

    @property
    def state(self) -> str: ...

    @property
    def info(self) -> EngineInfo | None: ...

    @property
    def failure(self) -> str | None: ...

    @property
    def num_restarts(self) -> int: ...

    def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]: ...

    async def stats(self) -> EngineStats: ...


class Tokenizer(TextDecoder, Protocol):
    def showing(self, words: Collection[str]) -> TextDecoder: ...

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]: ...

    def encode_after(self, token_id: int, text: str) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def added_token_id(self, token: str) -> int | None: ...


class Template(Protocol):
    """See `vlm_server.chat_template.ChatTemplate`."""

    @property
    def text(self) -> str: ...

    @property
    def shows_tools(self) -> bool: ...


Result = TypeVar("Result")


class PromptPipeline(Protocol):
    """See `vlm_server.pipeline.Pipeline`."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def template(self) -> Template: ...

    async def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        image_settings: Mapping[str, Any] | None = None,
        tenant: str = "",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        pictures: Mapping[str, bytes] | None = None,
        timings: StageTimings | None = None,
        report: PictureReport | None = None,
    ) -> Prompt: ...

    async def chat_tokens(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        image_settings: Mapping[str, Any] | None = None,
        tenant: str = "",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        pictures: Mapping[str, bytes] | None = None,
        report: PictureReport | None = None,
    ) -> list[int]: ...

    def request_room(self) -> RequestRoom | None: ...

    async def parts_prompt(
        self,
        parts: Sequence[dict[str, Any]],
        *,
        param: str,
        tenant: str = "",
        pictures: Mapping[str, bytes] | None = None,
        timings: StageTimings | None = None,
        room: RequestRoom | None = None,
    ) -> Prompt: ...

    async def turn_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        known: Transcript = ...,
        pictures: Mapping[str, bytes] | None = None,
        names: Mapping[str, str] | None = None,
        tenant: str = "",
        timings: StageTimings | None = None,
        report: PictureReport | None = None,
    ) -> TurnPrompt: ...

    async def fetch_pictures(
        self,
        refs: Sequence[ImageRef],
        *,
        limit_bytes: int,
        tenant: str = "",
        report: PictureReport | None = None,
        kept: Mapping[str, bytes] | None = None,
    ) -> list[bytes | None]: ...

    async def check_picture(self, ref: ImageRef, *, tenant: str = "") -> None: ...

    def with_answer(self, transcript: Transcript, token_ids: Sequence[int]) -> Transcript: ...

    async def picture_prompt(
        self,
        text_or_ids: str | Sequence[int],
        pictures: Sequence[dict[str, Any]],
        *,
        params: Sequence[str],
        tenant: str = "",
        timings: StageTimings | None = None,
        report: PictureReport | None = None,
    ) -> Prompt: ...

    def text_prompt(self, text_or_ids: str | Sequence[int], *, tenant: str = "") -> Prompt: ...

    def text_tokens(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    async def in_thread(self, work: Callable[[], Result]) -> Result: ...


class GrammarReader(Protocol):
    """See `vlm_server.grammar_pool.GrammarPool`."""

    async def read(self, write: Callable[[], str]) -> str: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """All of it, while the server runs."""

    engine: Engine
    pipeline: PromptPipeline
    grammars: GrammarReader
    vision_stats: Callable[[], VisionStats] = VisionStats
    stop_words: StopWords = field(default_factory=StopWords)  # the chat template's, for every request
    media: MediaBudgets = field(default_factory=lambda: MediaBudgets(VisionConfig()))  # of all requests together
    probe: Probe | None = None  # tries both out; None: they need not be
    kill_engine: Callable[[], None] = lambda: None  # in the middle of whatever it does, for a server that is to end at once


def render_limits(limits: RequestLimits) -> RenderLimits:
    """A template writes its own words around the messages', and the tools."""
    return RenderLimits(cpu_s=limits.template_timeout_s, max_characters=2 * limits.max_prompt_characters + MAX_TEMPLATE_CHARACTERS)


OpenBackend = Callable[[ServerConfig], AbstractAsyncContextManager[Backend]]


@contextlib.asynccontextmanager
async def open_backend(config: ServerConfig, *, on_progress: Callable[[float], None] = lambda fraction: None) -> AsyncIterator[Backend]:
    """The real ones: picture and grammar workers and the engine process start side by side.

    on_progress: is told the share of the weights that is loaded. Raises EngineDeadError, OSError, ValueError or WorkerError where
    the checkpoint cannot be served.
    """
    from engine.client import EngineClient
    from vision.service import VisionService
    from vlm_server.grammar_pool import GrammarPool
    from vlm_server.jinja_process import JinjaProcess
    from vlm_server.pipeline import Pipeline
    from vlm_server.probe import PipelineProbe

    folder, trusts = config.engine.model_folder, config.engine.trust_remote_code
    async with contextlib.AsyncExitStack() as stack:
        engine = EngineClient(config.engine, on_progress=on_progress)
        stack.push_async_callback(engine.close)
        start = asyncio.create_task(engine.start())
        stack.callback(start.cancel)
        media = MediaBudgets(config.vision)
        vision = VisionService(
            config.vision,
            model_folder=folder,
            trust_remote_code=trusts,
            budgets=media,
            max_tokens=lambda: engine.info.session_len if engine.info else None,
        )
        stack.push_async_callback(vision.close)
        grammars = GrammarPool()
        stack.push_async_callback(grammars.close)
        jinja = JinjaProcess(render_limits(config.limits))
        stack.push_async_callback(asyncio.to_thread, jinja.close)
        pipeline = await asyncio.to_thread(
            Pipeline.load,
            folder,
            tokenizer_folder=config.tokenizer_folder,
            images=vision,
            chat_template=config.chat_template,
            chat_template_args=config.chat_template_args,
            meta_instruction=config.meta_instruction,
            trust_remote_code=trusts,
            jinja=jinja,
            max_picture_pixels=config.vision.max_picture_pixels,
            shares_caches=config.share_caches,
            announce=engine.announcement,
        )
        stack.callback(pipeline.close)
        if pipeline.family is not None:
            await vision.open()
        await grammars.open()
        await start
        if vocabulary := pipeline.tokenizer.vocabulary():
            await engine.set_vocabulary(vocabulary)
        if pipeline.family is not None:
            await vision.ready()
        probe = PipelineProbe(engine, pipeline, vision if pipeline.family is not None else None)
        yield Backend(engine, pipeline, grammars, vision.stats, pipeline.stop_words, media, probe, engine.kill)
