"""What the routes talk to: an engine and a pipeline, opened and closed together.

The protocols are all that the routes know of them, so that tests can put scripted ones in their place.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.request import EngineInfo, EngineStats, Prompt, SamplingParams, StepOutput
from vision.image import ImageRef
from vision.service import VisionStats
from vlm_server.config import ServerConfig
from vlm_server.detokenizer import StopWords, TextDecoder
from vlm_server.stage_timings import StageTimings
from vlm_server.transcript import Transcript, TurnPrompt


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
    ) -> list[int]: ...

    async def parts_prompt(
        self, parts: Sequence[dict[str, Any]], *, param: str, tenant: str = "", pictures: Mapping[str, bytes] | None = None
    ) -> Prompt: ...

    async def turn_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        known: Transcript = ...,
        pictures: Mapping[str, bytes] | None = None,
        names: Mapping[str, str] | None = None,
        tenant: str = "",
    ) -> TurnPrompt: ...

    async def fetch_pictures(self, refs: Sequence[ImageRef], *, limit_bytes: int, tenant: str = "") -> list[bytes]: ...

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
    ) -> Prompt: ...

    def text_prompt(self, text_or_ids: str | Sequence[int], *, tenant: str = "") -> Prompt: ...

    def text_tokens(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """Both, while the server runs."""

    engine: Engine
    pipeline: PromptPipeline
    vision_stats: Callable[[], VisionStats] = VisionStats
    stop_words: StopWords = field(default_factory=StopWords)  # the chat template's, for every request
    kill_engine: Callable[[], None] = lambda: None  # in the middle of whatever it does, for a server that is to end at once


OpenBackend = Callable[[ServerConfig], AbstractAsyncContextManager[Backend]]


@contextlib.asynccontextmanager
async def open_backend(config: ServerConfig, *, on_progress: Callable[[float], None] = lambda fraction: None) -> AsyncIterator[Backend]:
    """The real ones: picture workers and engine process start side by side. `on_progress` is told the share of the weights that is loaded.

    Raises EngineDeadError, OSError or ValueError where the checkpoint cannot be served.
    """
    from engine.client import EngineClient
    from vision.service import VisionService
    from vlm_server.jinja_process import JinjaProcess
    from vlm_server.pipeline import Pipeline

    folder, trusts = config.engine.model_folder, config.engine.trust_remote_code
    async with contextlib.AsyncExitStack() as stack:
        engine = EngineClient(config.engine, on_progress=on_progress)
        stack.push_async_callback(engine.close)
        start = asyncio.create_task(engine.start())
        stack.callback(start.cancel)
        vision = VisionService(config.vision, model_folder=folder, trust_remote_code=trusts)
        stack.push_async_callback(vision.close)
        jinja = JinjaProcess()
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
        )
        stack.callback(pipeline.close)
        if pipeline.family is not None:
            await vision.open()
        await start
        if vocabulary := pipeline.tokenizer.vocabulary():
            await engine.set_vocabulary(vocabulary)
        if pipeline.family is not None:
            await vision.ready()
        yield Backend(engine, pipeline, vision.stats, pipeline.stop_words, engine.kill)
