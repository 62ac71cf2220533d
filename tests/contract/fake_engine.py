"""An engine and a pipeline of bytes: the same interfaces, scripted answers, no model."""

import asyncio
import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from engine.guided import check_grammar
from engine.request import (
    EngineDeadError,
    EngineError,
    EngineInfo,
    EngineStats,
    FinishReason,
    ImageInput,
    ImageSpan,
    InvalidRequestError,
    Prompt,
    PromptTooLongError,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
    make_cache_keys,
)
from tests.vlm_server.byte_tokenizer import BOS, EOS, IMAGE, VOCAB_SIZE, ByteTokenizer
from vision.config import VisionConfig
from vision.image import ImageRef, MediaError
from vision.media_budgets import MediaBudgets
from vision.request_room import RequestRoom
from vlm_server.backend import Backend
from vlm_server.config import ServerConfig
from vlm_server.detokenizer import StopWords
from vlm_server.picture_report import PictureReport
from vlm_server.readiness import Probe
from vlm_server.stage_timings import StageTimings
from vlm_server.transcript import Segment, Transcript, TurnPrompt

SESSION_LEN = 512
TOKENS_PER_IMAGE = 4
HIDDEN_SIZE = 8
PREPARATION_S = {"template": 0.001, "tokenize": 0.002}  # what the server is told that its stages took
FIRST_TOKEN_S = {"queue": 0.003, "encode": 0.5, "prefill": 0.125}
DEFAULT_REPLY = "Hello! 你好，世界 🌍. This is a test."

Script = Callable[[Prompt, SamplingParams], Sequence[int]]


def reply_to(prompt: Prompt, params: SamplingParams) -> Sequence[int]:
    """The default text, with the seed where one is given."""
    text = DEFAULT_REPLY if params.seed is None else f"seed {params.seed}"
    return [*text.encode(), EOS]


class Activity:
    """What is being generated or loaded now, for tests in another thread to wait on."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: set[str] = set()
        self._num_begun = 0
        self._num_left = 0

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Counts as left where the block is ended by its caller: cancelled or closed."""
        self._note(self._running.add, name, num_begun=1)
        try:
            yield
        except BaseException as error:
            self._note(self._running.discard, name, num_left=int(not isinstance(error, Exception)))
            raise
        self._note(self._running.discard, name)

    def has_begun_within(self, limit_s: float, *, count: int = 1) -> bool:
        return self._wait(lambda: self._num_begun >= count, limit_s)

    def was_left_within(self, limit_s: float) -> bool:
        """Whether nothing runs any more, and something was ended early."""
        return self._wait(lambda: not self._running and self._num_left > 0, limit_s)

    def is_idle_within(self, limit_s: float) -> bool:
        return self._wait(lambda: not self._running, limit_s)

    def __len__(self) -> int:
        return len(self._running)

    def _wait(self, is_met: Callable[[], bool], limit_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(is_met, timeout=limit_s)

    def _note(self, change: Callable[[str], None], name: str, *, num_begun: int = 0, num_left: int = 0) -> None:
        with self._changed:
            change(name)
            self._num_begun += num_begun
            self._num_left += num_left
            self._changed.notify_all()


class FakeEngine:
    """Writes what `script` says, `group` tokens a step."""

    def __init__(self, activity: Activity) -> None:
        self.activity = activity
        self.state = "ready"
        self.failure: str | None = None
        self.num_restarts = 0
        self.script: Script = reply_to
        self.group = 1
        self.logprob_of: Callable[[int], float] = lambda token_id: -1.5
        self.hangs_after: int | None = None  # steps, then nothing more comes
        self.gate: Callable[[], Awaitable[None]] | None = None  # awaited after the first step
        self.refusal: EngineError | None = None
        self.fails_after: int | None = None  # steps, then the engine dies
        self.requests: list[tuple[Prompt, SamplingParams]] = []
        self.info: EngineInfo | None = EngineInfo(
            model_type="fake",
            device="cpu",
            dtype="float32",
            tp=1,
            session_len=SESSION_LEN,
            block_size=16,
            num_blocks=64,
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            eos_token_ids=(EOS,),
            load_time_s=0.0,
        )

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]:
        if self.refusal is not None:
            raise self.refusal
        if len(prompt.token_ids) >= SESSION_LEN:
            raise PromptTooLongError(len(prompt.token_ids), SESSION_LEN)
        self.requests.append((prompt, params))
        with self.activity.during(request_id):
            for number, output in enumerate(self._outputs(prompt, params, request_id)):
                if self.fails_after is not None and number >= self.fails_after:
                    raise EngineDeadError("the engine process ended")
                if self.hangs_after is not None and number >= self.hangs_after:
                    await asyncio.Event().wait()
                if self.gate is not None and number == 1:
                    await self.gate()
                await asyncio.sleep(0)
                yield output

    async def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.activity), max_batched_requests=3, num_cached_prompt_tokens=7, num_embedding_cache_hits=2)

    def _outputs(self, prompt: Prompt, params: SamplingParams, request_id: str) -> list[StepOutput]:
        scored = None
        if params.prompt_logprobs is not None:
            scored = [self._logprobs(token_id, params.prompt_logprobs) for token_id in prompt.token_ids[1:]]
        if params.max_tokens == 0 and not params.pools:
            return [StepOutput(request_id=request_id, finish_reason=FinishReason.LENGTH, prompt_logprobs=scored)]
        if params.pools:
            embedding = [float(token_id) for token_id in (*prompt.token_ids, *[0] * HIDDEN_SIZE)[:HIDDEN_SIZE]]
            return [StepOutput(request_id=request_id, finish_reason=FinishReason.LENGTH, embedding=embedding)]
        token_ids = list(self.script(prompt, params))
        if params.ignore_eos:
            token_ids = [token_id for token_id in token_ids if token_id != EOS] * (1 + min(params.max_tokens or 0, SESSION_LEN))
        limit = min(params.max_tokens or SESSION_LEN, SESSION_LEN - len(prompt.token_ids))
        ends = [place for place, token_id in enumerate(token_ids) if token_id == EOS or token_id in params.stop_token_ids]
        length = min(limit, ends[0] + 1 if ends else limit, len(token_ids))
        reason = FinishReason.STOP if ends and length == ends[0] + 1 else FinishReason.LENGTH
        kept = token_ids[:length]
        groups = [kept[start : start + self.group] for start in range(0, length, self.group)]
        return [
            StepOutput(
                request_id=request_id,
                token_ids=group,
                logprobs=None if params.logprobs is None else [self._logprobs(token_id, params.logprobs) for token_id in group],
                finish_reason=reason if number == len(groups) - 1 else None,
                prompt_logprobs=scored if number == 0 else None,
                num_cached_tokens=2,
                timings_s=dict(FIRST_TOKEN_S) if number == 0 else None,
            )
            for number, group in enumerate(groups)
        ]

    def _logprobs(self, token_id: int, num_top: int) -> TokenLogprobs:
        """The sampled token is the second best."""
        logprob = self.logprob_of(token_id)
        best = [(ord("x"), -0.25), (token_id, logprob), (0xE4, float("-inf"))]
        return TokenLogprobs(token_id=token_id, logprob=logprob, rank=2, top=tuple(best[:num_top]))


class FakeTemplate:
    """What the server asks of a template: here that of a model that writes calls as Hermes."""

    def __init__(self) -> None:
        self.text = "<tool_call>"
        self.shows_tools = True
        self.generation_prompt = "assistant: "


Result = TypeVar("Result")


class FakePipeline:
    """Writes `role: text` lines; a picture is four tokens, known by its URL, or by its bytes where they are at hand.

    URLs and uploads with `bad` cannot be loaded, with `slow` never end.
    """

    def __init__(self, activity: Activity) -> None:
        self.activity = activity
        self.tokenizer = ByteTokenizer()
        self.template = FakeTemplate()
        self.num_in_thread = 0  # calls of `in_thread`
        self.template_kwargs: dict[str, Any] | None = None
        self.image_settings: Mapping[str, Any] | None = None
        self.rooms: list[RequestRoom | None] = []  # of every `parts_prompt`
        self.turns: list[tuple[list[dict[str, Any]], dict[str, bytes]]] = []  # messages and files of every `turn_prompt`

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
    ) -> Prompt:
        self.template_kwargs = template_kwargs
        self.image_settings = image_settings
        token_ids, images, spans = [BOS], [], []
        token_ids += json.dumps(tools).encode() if tools else b""
        for number, message in enumerate(messages):
            token_ids += f"{message['role']}: ".encode()
            token_ids += "".join(json.dumps(call) for call in message.get("tool_calls", ())).encode()
            content = message.get("content") or ""
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for index, part in enumerate(parts):
                if part["type"] == "text":
                    token_ids += part["text"].encode()
                    continue
                url = part["image_url"]["url"]
                if not await self._is_loaded(url, f"messages[{number}].content[{index}].image_url", pictures, report):
                    continue
                spans.append(ImageSpan(len(token_ids), TOKENS_PER_IMAGE, len(images)))
                images.append(ImageInput(_content(url, pictures), TOKENS_PER_IMAGE, {}))
                token_ids += [IMAGE] * TOKENS_PER_IMAGE
            token_ids += b"\n" if message is not messages[-1] or not continue_final_message else b""
        token_ids += self.template.generation_prompt.encode() if add_generation_prompt else b""
        if timings is not None:
            timings.add_until(time.monotonic(), PREPARATION_S | ({"pictures": 0.25} if images else {}))
            timings.pictures += [{"fetch": 0.25}] * len(images)
        keys = make_cache_keys(token_ids, images, spans, salt=tenant)
        return Prompt(token_ids=tuple(token_ids), cache_keys=keys, images=tuple(images), spans=tuple(spans))

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
    ) -> list[int]:
        prompt = await self.chat_prompt(
            messages,
            tools=tools,
            template_kwargs=template_kwargs,
            image_settings=image_settings,
            tenant=tenant,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            pictures=pictures,
            report=report,
        )
        return list(prompt.token_ids)

    def request_room(self) -> RequestRoom | None:
        return RequestRoom(VisionConfig())

    async def parts_prompt(
        self,
        parts: Sequence[dict[str, Any]],
        *,
        param: str,
        tenant: str = "",
        pictures: Mapping[str, bytes] | None = None,
        timings: StageTimings | None = None,
        room: RequestRoom | None = None,
    ) -> Prompt:
        self.rooms.append(room)
        token_ids: list[int] = []
        for index, part in enumerate(parts):
            if part["type"] == "image_url":
                await self._load(part["image_url"]["url"], f"{param}[{index}].image_url", pictures)
            token_ids += part["text"].encode() if part["type"] == "text" else [IMAGE] * TOKENS_PER_IMAGE
        return Prompt(token_ids=tuple(token_ids), cache_keys=make_cache_keys(token_ids, (), (), salt=tenant))

    async def picture_prompt(
        self,
        text_or_ids: str | Sequence[int],
        pictures: Sequence[dict[str, Any]],
        *,
        params: Sequence[str],
        tenant: str = "",
        timings: StageTimings | None = None,
        report: PictureReport | None = None,
    ) -> Prompt:
        """The pictures first."""
        named = zip(pictures, params, strict=True)
        pictures = [picture for picture, param in named if await self._is_loaded(picture["url"], param, None, report)]
        token_ids = [IMAGE] * TOKENS_PER_IMAGE * len(pictures)
        token_ids += self.tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else list(text_or_ids)
        images = tuple(ImageInput(picture["url"].encode(), TOKENS_PER_IMAGE, {}) for picture in pictures)
        spans = tuple(ImageSpan(TOKENS_PER_IMAGE * index, TOKENS_PER_IMAGE, index) for index in range(len(pictures)))
        return Prompt(
            token_ids=tuple(token_ids), cache_keys=make_cache_keys(token_ids, images, spans, salt=tenant), images=images, spans=spans
        )

    async def turn_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        known: Transcript,
        pictures: Mapping[str, bytes],
        names: Mapping[str, str],
        tenant: str = "",
        timings: StageTimings | None = None,
        report: PictureReport | None = None,
    ) -> TurnPrompt:
        """The known tokens, and the last messages behind them: those since the last answer."""
        self.turns.append((messages, dict(pictures)))
        inner = PictureReport(may_fail=report.may_fail, lost=report.lost) if report else None
        try:
            whole = await self.chat_prompt(messages, tenant=tenant, pictures=pictures, timings=timings, report=inner)
            if report and inner:
                report.left_out += [MediaError(e.code, e.message, param=names.get(str(e.param), e.param)) for e in inner.left_out]
                report.seen += [(names[param], size) for param, size in inner.seen if param in names]
        except MediaError as error:
            raise MediaError(error.code, "not a picture", param=names.get(str(error.param), error.param)) from None
        if not known.segments:
            return TurnPrompt(whole, Transcript((Segment("", whole.token_ids),)), 0)
        num_new = next(number for number, message in enumerate(reversed(messages)) if message["role"] == "assistant")
        new = (await self.chat_prompt(messages[len(messages) - num_new :], pictures=pictures)).token_ids[1:]
        transcript = Transcript((*known.segments, Segment("", new)))
        keys = make_cache_keys(transcript.token_ids, (), (), salt=tenant)
        return TurnPrompt(Prompt(token_ids=transcript.token_ids, cache_keys=keys), transcript, len(known.token_ids))

    async def fetch_pictures(
        self,
        refs: Sequence[ImageRef],
        *,
        limit_bytes: int,
        tenant: str = "",
        report: PictureReport | None = None,
        kept: Mapping[str, bytes] | None = None,
    ) -> list[bytes | None]:
        files: list[bytes | None] = []
        for ref in refs:
            files.append(ref.url.encode() if ref.data is None else ref.data)
            try:
                await self._load(ref.url, ref.param, {ref.url: ref.data} if ref.data is not None else None)
            except MediaError as error:
                if report is None or not report.may_fail:
                    raise
                report.lost[ref.url] = error
                files[-1] = None
        by_digest = {hashlib.sha256(data).hexdigest(): len(data) for data in files if data is not None}
        if sum(num_bytes for digest, num_bytes in by_digest.items() if digest not in (kept or {})) > limit_bytes:
            raise MediaError("image_too_large", f"more than the {limit_bytes} bytes", param=refs[0].param)
        return files

    async def check_picture(self, ref: ImageRef, *, tenant: str = "") -> None:
        assert ref.data is not None
        await self._load(ref.data.decode("latin-1"), ref.param)

    def with_answer(self, transcript: Transcript, token_ids: Sequence[int]) -> Transcript:
        return Transcript((*transcript.segments, Segment("", tuple(token_ids))))

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        self.num_in_thread += 1
        return await asyncio.to_thread(work)

    def text_tokens(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def text_prompt(self, text_or_ids: str | Sequence[int], *, tenant: str = "") -> Prompt:
        token_ids = self.tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else list(text_or_ids)
        if not token_ids:
            raise InvalidRequestError("prompt: it has no tokens; at least one is needed")
        return Prompt(token_ids=tuple(token_ids), cache_keys=make_cache_keys(token_ids, (), (), salt=tenant))

    async def _is_loaded(self, url: str, param: str, pictures: Mapping[str, bytes] | None, report: PictureReport | None) -> bool:
        report = report or PictureReport()
        try:
            if url in report.lost:
                raise report.lost[url]
            await self._load(url, param, pictures)
        except MediaError as error:
            if not report.may_fail:
                raise
            report.left_out.append(MediaError(error.code, "not a picture", param=param))
            return False
        report.seen.append((param, {"width": 8, "height": 6, "seen": None, "tiles": []}))
        return True

    async def _load(self, url: str, param: str, pictures: Mapping[str, bytes] | None = None) -> None:
        """Also finds that a picture is named by an id which the server should have looked up."""
        is_upload = url.startswith("uploaded-file:")  # whose id may hold these letters by chance
        if is_upload and url not in (pictures or {}):
            raise MediaError("url_invalid", f"{param}: no file is at hand", param=param)
        if "bad" in url and not is_upload:
            raise MediaError("image_decode_failed", f"{param}: not a picture", param=param)
        if "slow" in url:
            with self.activity.during(url):
                await asyncio.Event().wait()


def _content(url: str, pictures: Mapping[str, bytes] | None) -> bytes:
    """The URL, or for a picture that is at hand the data: URL that it would have as a PNG."""
    data = (pictures or {}).get(url)
    return url.encode() if data is None else b"data:image/png;base64," + base64.b64encode(data)


class FakeGrammarReader:
    """Reads grammars in a thread, without limits."""

    async def read(self, write: Callable[[], str]) -> str:
        def checked() -> str:
            grammar = write()
            check_grammar(grammar)
            return grammar

        return await asyncio.to_thread(checked)


class FakeBackend:
    """Opens as the server does; keeps the doubles at hand for the test."""

    def __init__(self) -> None:
        self.activity = Activity()
        self.engine = FakeEngine(self.activity)
        self.pipeline = FakePipeline(self.activity)
        self.grammars = FakeGrammarReader()
        self.stop_words = StopWords()
        self.probe: Probe | None = None

    def reset(self) -> None:
        """As new, for the next test on the same server."""
        fresh = FakeBackend()
        self.activity = fresh.activity
        vars(self.engine).update(vars(fresh.engine))
        vars(self.pipeline).update(vars(fresh.pipeline))

    @contextlib.asynccontextmanager
    async def open(self, config: ServerConfig) -> AsyncIterator[Backend]:
        media = MediaBudgets(config.vision)
        yield Backend(self.engine, self.pipeline, self.grammars, stop_words=self.stop_words, media=media, probe=self.probe)
