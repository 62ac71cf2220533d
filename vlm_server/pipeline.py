"""Messages with pictures → `Prompt`: the one bridge between vision and engine on the request's side.

Renders the chat template, has the pictures loaded (`picture_loading`) and the text made tokens (`prompt_tokens`). Knows nothing of HTTP and
of how pictures are fetched or encoded.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from engine.request import Prompt
from vision.budget import Budget, Reservation, places_for
from vision.config import MAX_PICTURE_PIXELS
from vision.families import Family, load_family
from vision.image import ImageRef, MediaError, ProcessedImage
from vision.media_budgets import owner_or
from vision.request_room import RequestRoom
from vlm_server.announcing import OpenAnnouncement
from vlm_server.chat_template import Message
from vlm_server.detokenizer import StopWords
from vlm_server.jinja_process import JinjaProcess
from vlm_server.picture_loading import ImageLoader, PictureLoading, closing_on_error, failed, held
from vlm_server.picture_parts import PictureParts
from vlm_server.picture_places import ids_with_pictures, ids_without, text_with_placeholders
from vlm_server.picture_report import PictureReport
from vlm_server.prompt_tokens import PromptTokens, new_marker
from vlm_server.stage_timings import StageTimings
from vlm_server.template_choice import PromptTemplate, load_chat_template
from vlm_server.tokenizer import TextTokenizer, load_tokenizer
from vlm_server.transcript import Segment, Transcript, TurnPrompt

NUM_THREADS = 2  # a very long text occupies one; the event loop none

Result = TypeVar("Result")
Write = Callable[[Collection[int]], Awaitable[str]]  # a text with a placeholder for each picture but those of some numbers

_NOTHING_KNOWN = Transcript()


class Pipeline:
    """One model's way from messages to prompts. `close()` ends its threads.

    family, images: None for a model that takes no pictures.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: PromptTemplate,
        *,
        family: Family | None = None,
        images: ImageLoader | None = None,
        max_picture_pixels: int = MAX_PICTURE_PIXELS,
        shares_caches: bool = False,
        announce: OpenAnnouncement | None = None,
    ) -> None:
        """shares_caches: what one tenant's requests left in the caches is used for another's.

        announce: for pictures that are loaded before others of their prompt; None: nobody hears of them before the prompt is made.
        """
        if family is not None and tokenizer.token_id(family.image_token) != family.image_token_id:
            raise ValueError(f"the tokenizer's {family.image_token} is not token {family.image_token_id}, as config.json says")
        self.tokenizer = tokenizer
        self.template = template
        self.family = family
        self._tokens = PromptTokens(tokenizer, family, brings_special_tokens=template.brings_special_tokens, shares_caches=shares_caches)
        self._loading = PictureLoading(images if family is not None else None, announce=announce)
        self._pictures = PictureParts(family, max_picture_pixels)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenize")
        self._places = Budget("texts to be tokenized", places_for(NUM_THREADS), wait_s=None)

    @classmethod
    def load(
        cls,
        model_folder: str | Path,
        *,
        tokenizer_folder: str | None = None,
        images: ImageLoader | None = None,
        chat_template: str | None = None,
        chat_template_args: str | None = None,
        meta_instruction: str | None = None,
        trust_remote_code: bool = False,
        jinja: JinjaProcess | None = None,
        max_picture_pixels: int = MAX_PICTURE_PIXELS,
        shares_caches: bool = False,
        announce: OpenAnnouncement | None = None,
    ) -> "Pipeline":
        """The pipeline of the checkpoint in `model_folder`; blocks while its tokenizer is read.

        tokenizer_folder: of another tokenizer. chat_template, chat_template_args, meta_instruction: see `load_chat_template`.
        jinja: where templates run, closed by the caller; None: in a process that ends with the pipeline.
        """
        tokenizer = load_tokenizer(tokenizer_folder or model_folder, trust_remote_code=trust_remote_code)
        family = load_family(model_folder)
        template = load_chat_template(
            model_folder,
            tokenizer,
            placeholder=family.framed_placeholder if family else "",
            picture_gap=family.rules.gap if family else "",
            chat_template=chat_template,
            chat_template_args=chat_template_args,
            meta_instruction=meta_instruction,
            process=jinja,
        )
        return cls(
            TextTokenizer(tokenizer),
            template,
            family=family,
            images=images,
            max_picture_pixels=max_picture_pixels,
            shares_caches=shares_caches,
            announce=announce,
        )

    @property
    def stop_words(self) -> StopWords:
        """What the chat template ends every answer at: whole tokens where the tokenizer has them, else strings."""
        words = {word: self.tokenizer.added_token_id(word) for word in self.template.stop_words}
        return StopWords(
            strings=tuple(word for word, token_id in words.items() if token_id is None),
            token_ids=tuple(token_id for token_id in words.values() if token_id is not None),
        )

    async def chat_prompt(
        self,
        messages: Sequence[Message],
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
        """The prompt for a conversation whose shape is already checked.

        pictures: files that are here already, by the URL that the messages name them with.
        report: is told what became of the pictures, and says whether one that fails is left out: the prompt is then that of the
        conversation without it.
        image_settings: the request's `mm_processor_kwargs`.
        timings: is given the stages template, pictures (and within it picture-fetch, -decode, -preprocess) and tokenize.
        Raises TemplateError, ImagesNotSupportedError, or the vision service's MediaError, each naming the field.
        """
        report, timings = report or PictureReport(), timings or StageTimings()
        refs, write, marker = self._writing(
            messages,
            report,
            timings,
            image_settings=image_settings,
            pictures=pictures,
            tools=tools,
            template_kwargs=template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return (await self._loaded_prompt(refs, write, marker, tenant, timings, report)).prompt

    def with_images(self, images: ImageLoader | None) -> "Pipeline":
        """The same tokenizer and template over other pictures; to be closed by itself."""
        return Pipeline(
            self.tokenizer, self.template, family=self.family, images=images, max_picture_pixels=self._pictures.max_picture_pixels
        )

    async def turn_prompt(
        self,
        messages: Sequence[Message],
        *,
        known: Transcript = _NOTHING_KNOWN,
        pictures: Mapping[str, bytes] | None = None,
        names: Mapping[str, str] | None = None,
        tenant: str = "",
        timings: StageTimings | None = None,
        report: PictureReport | None = None,
    ) -> TurnPrompt:
        """The prompt for a further turn: begins with the tokens of `known`, as far as the template still writes their text.

        pictures, report: as for `chat_prompt`. names: `messages[0].content[1].image_url` to the field that the client knows. Raises as
        `chat_prompt`.
        """
        report, timings = report or PictureReport(), timings or StageTimings()
        refs, write, marker = self._writing(messages, report, timings, names=names, pictures=pictures)
        fingerprint = await self.in_thread(lambda: self.tokenizer.fingerprint)
        segments = known.segments if known.tokenizer == fingerprint else ()
        turn = await self._loaded_prompt(refs, write, marker, tenant, timings, report, segments)
        return replace(turn, transcript=Transcript(turn.transcript.segments, fingerprint))

    async def fetch_pictures(
        self,
        refs: Sequence[ImageRef],
        *,
        limit_bytes: int,
        tenant: str = "",
        report: PictureReport | None = None,
        kept: Mapping[str, bytes] | None = None,
    ) -> list[bytes | None]:
        """The files of pictures that are to be kept, at most `limit_bytes` together. Raises ImagesNotSupportedError or MediaError.

        kept: files that are kept already, by their SHA-256 in hexadecimal; they count no more, nor does an equal file twice.
        None: one that may fail; the report knows it as lost from now on, so that no prompt has it.
        """
        salt = self._tokens.salt(tenant)
        return await self._loading.fetch(refs, limit_bytes=limit_bytes, salt=salt, report=report or PictureReport(), kept=kept)

    async def check_picture(self, ref: ImageRef, *, tenant: str = "") -> None:
        """Raises ImagesNotSupportedError or MediaError where the picture cannot be used, as far as its header tells.

        One of more tokens than fit a prompt passes.
        """
        await self._loading.check_header(ref, salt=self._tokens.salt(tenant))

    def with_answer(self, transcript: Transcript, token_ids: Sequence[int]) -> Transcript:
        """The transcript with the answer that followed, for a later `turn_prompt`; without it where its tokens are no whole text."""
        return replace(transcript, segments=(*transcript.segments, *self._tokens.answer_segments(token_ids)))

    async def chat_tokens(
        self,
        messages: Sequence[Message],
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
        """The tokens of the prompt that `chat_prompt` makes, its pictures measured by their headers and not loaded.

        Raises as that does, save for what a header does not tell and for pictures of more tokens than fit a prompt: those are counted.
        """
        report = report or PictureReport()
        refs, write, marker = self._writing(
            messages,
            report,
            StageTimings(),
            image_settings=image_settings,
            pictures=pictures,
            tools=tools,
            template_kwargs=template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        text = await write(())
        results = await self._loading.measure(refs, salt=self._tokens.salt(tenant), report=report)
        measured = report.take(refs, results)
        if len(measured) < len(refs):
            text = await write(failed(results))
        return await self.in_thread(lambda: self._tokens.chat_tokens(text, measured, marker))

    def request_room(self) -> RequestRoom | None:
        """What the pictures of several `parts_prompt` of one request share; None where there are no pictures."""
        return self._loading.request_room()

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
        """The prompt for texts and pictures one after the other, without a template. `param` names their list.

        pictures: as for `chat_prompt`. room: None where the request has no other pictures. Raises as `chat_prompt` does.
        """
        marker, report = new_marker(), PictureReport()
        refs: list[ImageRef] = []
        defaults = self._pictures.defaults(None)
        plain = [self._pictures.plain(part, f"{param}[{index}]", refs, defaults) for index, part in enumerate(parts)]
        self._loading.check_supported(refs)
        placeholder = self.family.placeholder if self.family else ""

        async def write(left_out: Collection[int]) -> str:
            return "".join(self._tokens.guarded(part["text"], marker) if part["type"] == "text" else placeholder for part in plain)

        refs, timings = held(refs, pictures, report), timings or StageTimings()
        return (await self._loaded_prompt(refs, write, marker, tenant, timings, report, room=room)).prompt

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
        """The prompt for a text or token ids with pictures, without a template; where they stand, `picture_places` says.

        pictures: objects as `image_url` of a part, named by `params`. report: as for `chat_prompt`. Raises as that does, and
        InvalidRequestError; a picture's error, too, where nothing is left without it.
        """
        marker, report, timings = new_marker(), report or PictureReport(), timings or StageTimings()
        refs: list[ImageRef] = []
        defaults = self._pictures.defaults(None)
        for image, param in zip(pictures, params, strict=True):
            self._pictures.plain({"type": "image_url", "image_url": image}, param, refs, defaults)
        self._loading.check_supported(refs)
        assert self.family is not None  # or its pictures would not be supported
        family, refs = self.family, held(refs, None, report)
        if not isinstance(text_or_ids, str):
            return _with_tokens(await self._ids_prompt(text_or_ids, refs, family, tenant, timings, report), report)
        text = text_or_ids

        async def write(left_out: Collection[int]) -> str:
            return text_with_placeholders(text, len(refs), family, guarded=partial(self._tokens.guarded, marker=marker), left_out=left_out)

        return _with_tokens((await self._loaded_prompt(refs, write, marker, tenant, timings, report)).prompt, report)

    def text_prompt(self, text_or_ids: str | Sequence[int], *, tenant: str = "") -> Prompt:
        """The prompt for a text, or for token ids, without a template. Blocks while a text is tokenized; may be called in any thread.

        Raises InvalidRequestError for an empty prompt and for ids that stand for a picture.
        """
        token_ids = self.text_tokens(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
        return self._tokens.prompt_without_pictures(tuple(token_ids), tenant)

    def text_tokens(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text without a template; none of them stands for a picture. Blocks; may be called in any thread."""
        return self._tokens.text_tokens(text, add_special_tokens=add_special_tokens)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, from one of the threads that tokenize. No client has all of them and the places before them.

        Work that runs cannot be stopped: it keeps its place until its end, even where nobody waits for it any more.
        """
        place = await self._places.reserve(1, owner_or(""))
        future = self._threads.submit(work)
        future.add_done_callback(partial(_release, place, asyncio.get_running_loop()))
        return await asyncio.wrap_future(future)

    def _writing(
        self,
        messages: Sequence[Message],
        report: PictureReport,
        timings: StageTimings,
        *,
        image_settings: Mapping[str, Any] | None = None,
        names: Mapping[str, str] | None = None,
        pictures: Mapping[str, bytes] | None = None,
        **template_settings: Any,
    ) -> tuple[list[ImageRef], Write, str]:
        """The pictures in order, what renders the template, and the marker in its text. template_settings: as `render` takes them."""
        refs, plain = self._pictures.split(messages, names or {}, self._pictures.defaults(image_settings))
        self._loading.check_supported(refs)
        marker = new_marker()

        def rendered(kept: Sequence[Message]) -> str:
            guarded = {name: self._tokens.guarded(value, marker) for name, value in template_settings.items()}
            return self.template.render(self._tokens.guarded(kept, marker), **guarded)

        async def write(left_out: Collection[int]) -> str:
            kept = self._pictures.without(plain, left_out) if left_out else plain
            with timings.stage("template"):
                return await self.in_thread(lambda: rendered(kept))

        return held(refs, pictures, report), write, marker

    async def _loaded_prompt(
        self,
        refs: Sequence[ImageRef],
        write: Write,
        marker: str,
        tenant: str,
        timings: StageTimings,
        report: PictureReport,
        known: Sequence[Segment] = (),
        room: RequestRoom | None = None,
    ) -> TurnPrompt:
        """The prompt for what is written of the pictures that are there."""
        text = await write(())
        results = await self._loaded(refs, tenant, timings, report, room)
        loaded = report.take(refs, results)
        with closing_on_error(loaded):
            if len(loaded) < len(refs):
                text = await write(failed(results))
            with timings.stage("tokenize"):
                return await self.in_thread(lambda: self._tokens.prompt(text, loaded, marker, tenant, known))

    async def _ids_prompt(
        self, token_ids: Sequence[int], refs: Sequence[ImageRef], family: Family, tenant: str, timings: StageTimings, report: PictureReport
    ) -> Prompt:
        """The prompt for token ids, with the pictures' tokens in them or not yet."""
        results = await self._loaded(refs, tenant, timings, report)
        loaded = report.take(refs, results)

        def prompt() -> Prompt:
            kept_ids = ids_without(token_ids, len(refs), failed(results), family, self.tokenizer)
            if kept_ids is None:  # nobody knows which tokens are the picture's
                raise report.left_out[0]
            written = ids_with_pictures(kept_ids, [image.layout for image in loaded], family, self.tokenizer)
            return self._tokens.prompt_of(tuple(written), loaded, tenant)

        with timings.stage("tokenize"), closing_on_error(loaded):
            return await self.in_thread(prompt)

    async def _loaded(
        self, refs: Sequence[ImageRef], tenant: str, timings: StageTimings, report: PictureReport, room: RequestRoom | None = None
    ) -> list[ProcessedImage | MediaError]:
        as_input = partial(self._tokens.input_of, tenant=tenant)
        salt = self._tokens.salt(tenant)
        return await self._loading.load(refs, salt=salt, as_input=as_input, timings=timings, report=report, room=room)


def _with_tokens(prompt: Prompt, report: PictureReport) -> Prompt:
    """Raises the MediaError of a picture that was left out where it was all there was."""
    if not prompt.token_ids and report.left_out:
        raise report.left_out[0]
    return prompt


def _release(place: Reservation, loop: asyncio.AbstractEventLoop, work: "Future[Result]") -> None:
    """In whatever thread the work ended."""
    with contextlib.suppress(RuntimeError):  # the loop may be closed by then
        loop.call_soon_threadsafe(place.release)
