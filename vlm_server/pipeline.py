"""Messages with pictures → `Prompt`: the one bridge between vision and engine on the request's side.

Renders the chat template, has the pictures loaded, expands each placeholder to its picture's tokens, tokenizes as the reference processor
does, and says which slots take which rows of which picture. Knows nothing of HTTP and of how pictures are fetched or encoded.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engine.request import ImageInput, ImageSpan, InvalidRequestError, Prompt, make_cache_keys
from vision.config import MAX_PICTURE_PIXELS
from vision.families import Family, load_family
from vision.image import ImageRef, MeasuredImage, MediaError, ProcessedImage, salted_hash
from vision.request_room import RequestRoom
from vlm_server.announcing import OpenAnnouncement, announcing
from vlm_server.chat_template import Message, TemplateError
from vlm_server.detokenizer import StopWords
from vlm_server.jinja_process import JinjaProcess
from vlm_server.metering import admit_pictures, charge_pixels
from vlm_server.picture_parts import PictureParts
from vlm_server.picture_places import ids_with_pictures, ids_without, text_with_placeholders
from vlm_server.picture_report import PictureReport
from vlm_server.stage_timings import StageTimings
from vlm_server.template_choice import PromptTemplate, load_chat_template
from vlm_server.tokenizer import TextTokenizer, load_tokenizer
from vlm_server.transcript import CutText, Segment, Transcript, TurnPrompt, answer_segment, num_leading

NUM_THREADS = 2  # a very long text occupies one; the event loop none

Result = TypeVar("Result")


class ImagesNotSupportedError(InvalidRequestError):
    """A picture was sent to a model that takes none."""

    def __init__(self, param: str) -> None:
        super().__init__(f"{param}: this model takes no pictures, only text parts are allowed")
        self.param = param


class ImageLoader(Protocol):
    """What the pipeline asks of the vision service."""

    def request_room(self) -> RequestRoom: ...

    async def load(
        self,
        refs: Sequence[ImageRef],
        *,
        tenant: str = "",
        room: RequestRoom | None = None,
        on_loaded: Callable[[ProcessedImage], None] | None = None,
    ) -> list[ProcessedImage | MediaError]: ...

    async def measure(self, refs: Sequence[ImageRef], *, tenant: str = "") -> list[MeasuredImage | MediaError]: ...

    async def fetch(self, refs: Sequence[ImageRef], *, limit_bytes: int, tenant: str = "") -> list[bytes | MediaError]: ...


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
        self._images = images
        self._shares_caches = shares_caches
        self._announce = announce
        self._pictures = PictureParts(family, max_picture_pixels)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenize")

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
        marker, report = _new_marker(), report or PictureReport()
        timings = timings or StageTimings()
        refs, plain = self._split(messages, report, image_settings=image_settings, pictures=pictures)
        render = partial(
            self._rendered,
            plain,
            marker,
            tools=tools,
            template_kwargs=template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            timings=timings,
        )
        return (await self._loaded_prompt(refs, render, marker, tenant, timings, report)).prompt

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
        marker, report = _new_marker(), report or PictureReport()
        refs, plain = self._split(messages, report, names=names, pictures=pictures)
        fingerprint = await self._in_thread(lambda: self.tokenizer.fingerprint)
        segments = known.segments if known.tokenizer == fingerprint else ()
        timings = timings or StageTimings()
        write = partial(self._rendered, plain, marker, timings=timings)
        turn = await self._loaded_prompt(refs, write, marker, tenant, timings, report, segments)
        return replace(turn, transcript=Transcript(turn.transcript.segments, fingerprint))

    async def fetch_pictures(
        self, refs: Sequence[ImageRef], *, limit_bytes: int, tenant: str = "", report: PictureReport | None = None
    ) -> list[bytes | None]:
        """The files of pictures that are to be kept, at most `limit_bytes` together. Raises ImagesNotSupportedError or MediaError.

        None: one that may fail; the report knows it as lost from now on, so that no prompt has it.
        """
        if not refs:
            return []
        images = self._loader(refs)
        admit_pictures()
        report, salt = report or PictureReport(), self._salt(tenant)
        files = await report.gather(_held(refs, None, report), lambda wanted: images.fetch(wanted, limit_bytes=limit_bytes, tenant=salt))
        report.lost |= {ref.url: file for ref, file in zip(refs, files, strict=True) if isinstance(file, MediaError)}
        return [None if isinstance(file, MediaError) else file for file in files]

    async def check_picture(self, ref: ImageRef, *, tenant: str = "") -> None:
        """Raises ImagesNotSupportedError or MediaError where the picture cannot be used, as far as its header tells."""
        await self._loader([ref]).measure([ref], tenant=self._salt(tenant))

    def with_answer(self, transcript: Transcript, token_ids: Sequence[int]) -> Transcript:
        """The transcript with the answer that followed, for a later `turn_prompt`; without it where its tokens are no whole text."""
        return replace(transcript, segments=(*transcript.segments, *self._answer_segments(token_ids)))

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
        """The tokens of the prompt that `chat_prompt` makes, its pictures measured by their headers and not loaded. Raises as it does."""
        marker, report = _new_marker(), report or PictureReport()
        refs, plain = self._split(messages, report, image_settings=image_settings, pictures=pictures)
        render = partial(
            self._rendered,
            plain,
            marker,
            tools=tools,
            template_kwargs=template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        text = await render()
        measured: list[MeasuredImage] = []
        if refs:
            images, salt = self._loader(refs), self._salt(tenant)
            results = await report.gather(refs, lambda wanted: images.measure(wanted, tenant=salt))
            measured = report.take(refs, results)
            text = await render(_failed(results)) if len(measured) < len(refs) else text
        return await self._in_thread(lambda: self._chat_tokens(text, measured, marker))

    def request_room(self) -> RequestRoom | None:
        """What the pictures of several `parts_prompt` of one request share; None where there are no pictures."""
        return self._images.request_room() if self._images is not None else None

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
        marker, report = _new_marker(), PictureReport()
        refs: list[ImageRef] = []
        defaults = self._pictures.defaults(None)
        plain = [self._pictures.plain(part, f"{param}[{index}]", refs, defaults) for index, part in enumerate(parts)]
        if refs:
            self._loader(refs)
        placeholder = self.family.placeholder if self.family else ""

        async def write(left_out: Collection[int]) -> str:
            return "".join(self._guarded(part["text"], marker) if part["type"] == "text" else placeholder for part in plain)

        held, timings = _held(refs, pictures, report), timings or StageTimings()
        return (await self._loaded_prompt(held, write, marker, tenant, timings, report, room=room)).prompt

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
        InvalidRequestError.
        """
        marker, report = _new_marker(), report or PictureReport()
        timings = timings or StageTimings()
        refs: list[ImageRef] = []
        defaults = self._pictures.defaults(None)
        for image, param in zip(pictures, params, strict=True):
            self._pictures.plain({"type": "image_url", "image_url": image}, param, refs, defaults)
        if self.family is None or self._images is None:
            raise ImagesNotSupportedError(params[0])
        family, refs = self.family, _held(refs, None, report)
        if not isinstance(text_or_ids, str):
            return await self._ids_prompt(text_or_ids, refs, family, tenant, timings, report)
        text = text_or_ids

        async def write(left_out: Collection[int]) -> str:
            return text_with_placeholders(text, len(refs), family, guarded=partial(self._guarded, marker=marker), left_out=left_out)

        return (await self._loaded_prompt(refs, write, marker, tenant, timings, report)).prompt

    def text_prompt(self, text_or_ids: str | Sequence[int], *, tenant: str = "") -> Prompt:
        """The prompt for a text, or for token ids, without a template. Blocks while a text is tokenized; may be called in any thread.

        Raises InvalidRequestError for an empty prompt and for ids that stand for a picture.
        """
        token_ids = self.text_tokens(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
        return self._token_prompt(tuple(token_ids), tenant)

    def text_tokens(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text without a template; none of them stands for a picture. Blocks; may be called in any thread."""
        marker = _new_marker()
        return self._tokenize(self._guarded(text, marker).split(marker), add_special_tokens=add_special_tokens)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _loader(self, refs: Sequence[ImageRef]) -> ImageLoader:
        """What loads these pictures. Raises ImagesNotSupportedError."""
        if self.family is None or self._images is None:
            raise ImagesNotSupportedError(refs[0].param)
        return self._images

    def _split(
        self,
        messages: Sequence[Message],
        report: PictureReport,
        *,
        image_settings: Mapping[str, Any] | None = None,
        names: Mapping[str, str] | None = None,
        pictures: Mapping[str, bytes] | None = None,
    ) -> tuple[list[ImageRef], list[Message]]:
        """The pictures in order, and the messages as a template takes them."""
        refs, plain = self._pictures.split(messages, names or {}, self._pictures.defaults(image_settings))
        if refs:
            self._loader(refs)
        return _held(refs, pictures, report), plain

    async def _rendered(
        self,
        plain: Sequence[Message],
        marker: str,
        left_out: Collection[int] = (),
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        timings: StageTimings | None = None,
    ) -> str:
        """The template's text with a placeholder for each picture but those of the numbers in `left_out`."""
        kept = self._pictures.without(plain, left_out) if left_out else plain
        with (timings or StageTimings()).stage("template"):
            return await self._in_thread(
                lambda: self.template.render(
                    self._guarded(kept, marker),
                    tools=self._guarded(tools, marker),
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    template_kwargs=self._guarded(template_kwargs, marker),
                )
            )

    async def _loaded_prompt(
        self,
        refs: Sequence[ImageRef],
        write: Callable[[Collection[int]], Awaitable[str]],
        marker: str,
        tenant: str,
        timings: StageTimings,
        report: PictureReport,
        known: Sequence[Segment] = (),
        room: RequestRoom | None = None,
    ) -> TurnPrompt:
        """The prompt for a text with a placeholder for each picture. write: gives it, without the pictures of some numbers."""
        text = await write(())
        results = await self._loaded(refs, tenant, timings, report, room)
        loaded = report.take(refs, results)
        with _closing_on_error(loaded):
            if len(loaded) < len(refs):
                text = await write(_failed(results))
            with timings.stage("tokenize"):
                return await self._in_thread(lambda: self._prompt(text, loaded, marker, tenant, known))

    async def _ids_prompt(
        self, token_ids: Sequence[int], refs: Sequence[ImageRef], family: Family, tenant: str, timings: StageTimings, report: PictureReport
    ) -> Prompt:
        """The prompt for token ids, with the pictures' tokens in them or not yet."""
        results = await self._loaded(refs, tenant, timings, report)
        loaded = report.take(refs, results)

        def prompt() -> Prompt:
            kept_ids = ids_without(token_ids, len(refs), _failed(results), family, self.tokenizer)
            if kept_ids is None:  # nobody knows which tokens are the picture's
                raise report.left_out[0]
            written = ids_with_pictures(kept_ids, [image.layout for image in loaded], family, self.tokenizer)
            return self._prompt_of(tuple(written), loaded, tenant)

        with timings.stage("tokenize"), _closing_on_error(loaded):
            return await self._in_thread(prompt)

    async def _loaded(
        self, refs: Sequence[ImageRef], tenant: str, timings: StageTimings, report: PictureReport, room: RequestRoom | None = None
    ) -> list[ProcessedImage | MediaError]:
        if not refs:
            return []
        images = self._loader(refs)
        admit_pictures()
        salt = self._salt(tenant)
        with timings.stage("pictures"), announcing(self._announce, len(refs), lambda image: self._input(image, tenant)) as on_loaded:
            results = await report.gather(refs, lambda wanted: images.load(wanted, tenant=salt, room=room, on_loaded=on_loaded))
        loaded = [result for result in results if isinstance(result, ProcessedImage)]
        charge_pixels(sum(image.width * image.height for image in loaded))
        for image in loaded:
            timings.add_slowest("picture", image.timings_s)
        return results

    def _token_prompt(self, token_ids: tuple[int, ...], tenant: str) -> Prompt:
        if not token_ids:
            raise InvalidRequestError("prompt: it has no tokens; at least one is needed")
        if self.family is not None and self.family.image_token_id in token_ids:
            raise InvalidRequestError(
                f"prompt: token {self.family.image_token_id} stands for a picture; send pictures as chat messages or image_data"
            )
        return Prompt(token_ids=token_ids, cache_keys=make_cache_keys(token_ids, (), (), salt=self._salt(tenant)), tenant=tenant)

    def _guarded(self, value: Any, marker: str) -> Any:
        """Every string within, cut by `marker` inside each word that means a picture: no user's text becomes one."""
        if isinstance(value, str):
            for word in self.family.reserved if self.family else ():
                value = value.replace(word, word[:1] + marker + word[1:])
            return value
        if isinstance(value, list | tuple):
            return [self._guarded(item, marker) for item in value]
        if isinstance(value, dict):
            return {self._guarded(key, marker): self._guarded(item, marker) for key, item in value.items()}
        return value

    def _prompt(self, text: str, images: Sequence[ProcessedImage], marker: str, tenant: str, known: Sequence[Segment]) -> TurnPrompt:
        segments, num_kept = self._segments(text, images, marker, known)
        transcript = Transcript(segments)
        prompt = self._prompt_of(transcript.token_ids, images, tenant)
        return TurnPrompt(prompt, transcript, sum(len(segment.token_ids) for segment in segments[:num_kept]))

    def _prompt_of(self, token_ids: tuple[int, ...], images: Sequence[ProcessedImage], tenant: str) -> Prompt:
        """Tokens that have all of the pictures' slots, as the engine takes them."""
        inputs = tuple(self._input(image, tenant) for image in images)
        spans = self._spans(token_ids, inputs)
        positions, delta = self._positions(len(token_ids), spans, images)
        keys = make_cache_keys(token_ids, inputs, spans, salt=self._salt(tenant))
        return Prompt(
            token_ids=token_ids, cache_keys=keys, images=inputs, spans=spans, positions=positions, position_delta=delta, tenant=tenant
        )

    def _input(self, image: ProcessedImage, tenant: str) -> ImageInput:
        return ImageInput(salted_hash(image.content_hash, self._salt(tenant)), image.num_tokens, image.arrays)

    def _salt(self, tenant: str) -> str:
        """Keeps a tenant's entries in every cache apart from the others'; nothing where all share them."""
        return "" if self._shares_caches else tenant

    def _segments(
        self, text: str, images: Sequence[ProcessedImage], marker: str, known: Sequence[Segment]
    ) -> tuple[tuple[Segment, ...], int]:
        """The known segments that the text begins with, then one for the rest of it; and how many are known."""
        whole = CutText.joined(self._expanded(text, images).split(marker))
        num_kept, end = num_leading(known, whole)
        kept = tuple(known[:num_kept])
        before = next((segment.token_ids[-1] for segment in reversed(kept) if segment.token_ids), None)
        if before is not None:
            first, *pieces = whole.pieces(end)
            token_ids = self.tokenizer.encode_after(before, first) + self._tokenize_cut_off(pieces)
            rest = whole.between(end, len(whole.text))
            if self.tokenizer.spells(token_ids, rest.text):  # not where a tokenizer changes the beginning of what it is given
                return (*kept, Segment(rest.text, tuple(token_ids), rest.cuts)), num_kept
        token_ids = self._tokenize(whole.pieces(), add_special_tokens=self._adds_special_tokens(text))
        return (Segment(whole.text, tuple(token_ids), whole.cuts),), 0

    def _answer_segments(self, token_ids: Sequence[int]) -> tuple[Segment, ...]:
        """The end token stands alone: a template may write another one."""
        has_end = bool(token_ids) and self.tokenizer.is_special(token_ids[-1])
        parts = (token_ids[:-1], token_ids[-1:]) if has_end else (token_ids,)
        segments = [answer_segment(part, [self.tokenizer.token_bytes(token_id) for token_id in part]) for part in parts]
        return tuple(segment for segment in segments if segment is not None) if segments[0] is not None else ()

    def _chat_tokens(self, text: str, images: Sequence[ProcessedImage | MeasuredImage], marker: str) -> list[int]:
        pieces = self._expanded(text, images).split(marker)
        return self._tokenize(pieces, add_special_tokens=self._adds_special_tokens(text))

    def _adds_special_tokens(self, text: str) -> bool:
        """As the reference: a tokenizer's Jinja template brings its own; a processor adds them unless the text begins with the first."""
        bos = self.tokenizer.reference.bos_token
        is_left_to_us = self.family is not None or not self.template.brings_special_tokens
        return is_left_to_us and not (bos is not None and text.startswith(str(bos)))

    def _expanded(self, text: str, images: Sequence[ProcessedImage | MeasuredImage]) -> str:
        if self.family is None:
            return text
        gaps = text.split(self.family.placeholder)
        if len(gaps) - 1 != len(images):
            raise TemplateError(
                f"messages: the chat template wrote {len(gaps) - 1} of {self.family.placeholder} for {len(images)} pictures; "
                "pictures are allowed in messages of those roles whose pictures the template writes, and no text may form that word"
            )
        expansions = [self.family.expand(image.layout) for image in images]
        return gaps[0] + "".join(expansion + gap for expansion, gap in zip(expansions, gaps[1:], strict=True))

    def _tokenize(self, pieces: Sequence[str], *, add_special_tokens: bool) -> list[int]:
        """The pieces' tokens, one after the other; no token reaches over a cut."""
        return self.tokenizer.encode(pieces[0], add_special_tokens=add_special_tokens) + self._tokenize_cut_off(pieces[1:])

    def _tokenize_cut_off(self, pieces: Sequence[str]) -> list[int]:
        """The tokens of pieces behind a cut."""
        token_ids: list[int] = []
        for piece in pieces:
            assert self.family is not None  # only its words are cut
            token_ids += self.tokenizer.encode(self.family.image_token + piece)[1:]  # behind a token, no space is put before the piece
        return token_ids

    def _spans(self, token_ids: Sequence[int], images: Sequence[ImageInput]) -> tuple[ImageSpan, ...]:
        """Runs of the image token, each picture taking as many slots as its embedding has rows."""
        if self.family is None:
            return ()
        slots = [slot for slot, token_id in enumerate(token_ids) if token_id == self.family.image_token_id]
        expected = sum(image.num_tokens for image in images)
        assert len(slots) == expected, f"{len(slots)} slots of {self.family.image_token} for {expected} rows of {len(images)} pictures"
        spans: list[ImageSpan] = []
        first = 0
        for index, image in enumerate(images):
            spans += _runs(slots[first : first + image.num_tokens], index, self.family.is_atomic)
            first += image.num_tokens
        return tuple(spans)

    def _positions(
        self, num_slots: int, spans: Sequence[ImageSpan], images: Sequence[ProcessedImage]
    ) -> tuple[tuple[tuple[int, ...], ...] | None, int]:
        if self.family is None or not images:
            return None, 0
        starts = [span.start for span in spans if span.offset == 0]
        return self.family.positions(num_slots, [(start, image.layout) for start, image in zip(starts, images, strict=True)])


@contextlib.contextmanager
def _closing_on_error(images: Sequence[ProcessedImage]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for array in (array for image in images for array in image.arrays.values()):
            array.close()
        raise


def _held(refs: Sequence[ImageRef], pictures: Mapping[str, bytes] | None, report: PictureReport) -> list[ImageRef]:
    """With the files that are here already, and whether the others go on without them."""
    files = pictures or {}
    return [replace(ref, data=files.get(ref.url, ref.data), may_fail=report.may_fail and report.covers(ref)) for ref in refs]


def _failed(results: Sequence[object]) -> frozenset[int]:
    """The numbers of the pictures that are left out."""
    return frozenset(number for number, result in enumerate(results) if isinstance(result, MediaError))


def _runs(slots: Sequence[int], image: int, is_atomic: bool) -> list[ImageSpan]:
    """One span per unbroken run of slots."""
    spans = []
    start = 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index] != slots[index - 1] + 1:
            spans.append(ImageSpan(slots[start], index - start, image, start, is_atomic))
            start = index
    return spans


def _new_marker() -> str:
    """A cut that no text holds: private characters around a number that nobody can guess."""
    return f"\ue000{secrets.randbits(64)}\ue001"
