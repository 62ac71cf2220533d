"""Pictures that cannot be used, with `on_media_error: skip`: the prompt is that of the conversation without them, token by token."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from engine.request import Prompt
from tests.image_fixtures import SIZES, FakeImages, images_of, picture, tiny_folder
from tests.tiny_models import image_model_names
from vision.image import ImageRef, MediaError
from vlm_server.jinja_process import JinjaProcess
from vlm_server.picture_report import PictureReport
from vlm_server.pipeline import Pipeline
from vlm_server.transcript import Transcript

FAMILIES = image_model_names()
PICTURES = {name: picture(size, seed) for seed, (name, size) in enumerate(SIZES.items())}

# A part `@name` is a picture; `@bad` cannot be used.
CONVERSATIONS: dict[str, list[tuple[str, list[str]]]] = {
    "alone": [("user", ["@bad"])],
    "first": [("user", ["@bad", "What is in this picture?"])],
    "between texts": [("user", ["Look:", "@bad", "What is it?"])],
    "between pictures": [("user", ["@wide", "@bad", "@small", "How many?"])],
    "several": [("user", ["@bad", "@large", "@bad"]), ("assistant", ["A circle."]), ("user", ["And now?", "@bad"])],
    "of another role": [("user", ["Find one."]), ("tool", ["Found: ", "@bad"]), ("user", ["@tall", "Like this?"])],
}


class FailingImages(FakeImages):
    """One picture fails, for those that may fail as for others."""

    async def load(self, refs: Any, **options: Any) -> list[Any]:
        loaded = iter(await super().load([ref for ref in refs if not is_bad(ref)], **options))
        return [failed(ref) if is_bad(ref) else next(loaded) for ref in refs]

    async def measure(self, refs: Any, *, tenant: str = "") -> list[Any]:
        measured = iter(await super().measure([ref for ref in refs if not is_bad(ref)], tenant=tenant))
        return [failed(ref) if is_bad(ref) else next(measured) for ref in refs]


def is_bad(ref: ImageRef) -> bool:
    return ref.url.endswith("bad")


def failed(ref: ImageRef) -> MediaError:
    error = MediaError("image_decode_failed", "the picture is damaged", param=ref.param)
    if not ref.may_fail:
        raise error
    return error


@pytest.fixture(scope="module")
def jinja() -> Any:
    process = JinjaProcess()
    yield process
    process.close()


@pytest.fixture
async def pipelines(jinja: JinjaProcess) -> AsyncIterator[Callable[[str], Pipeline]]:
    opened: list[Pipeline] = []

    def open_pipeline(name: str) -> Pipeline:
        opened.append(Pipeline.load(tiny_folder(name), images=FailingImages(name, PICTURES), jinja=jinja))
        return opened[-1]

    yield open_pipeline
    for pipeline in opened:
        pipeline.close()


def messages_of(conversation: Sequence[tuple[str, list[str]]], *, without: str = "") -> list[dict[str, Any]]:
    """A message that has nothing left has an empty text."""
    kept = [(role, [text for text in content if text != without] or [""]) for role, content in conversation]
    return [{"role": role, "content": list(map(part_of, content))} for role, content in kept]


def part_of(text: str) -> dict[str, Any]:
    if text.startswith("@"):
        return {"type": "image_url", "image_url": {"url": f"picture:{text[1:]}"}}
    return {"type": "text", "text": text}


def assert_same(prompt: Prompt, other: Prompt) -> None:
    assert (prompt.token_ids, prompt.cache_keys, prompt.spans) == (other.token_ids, other.cache_keys, other.spans)
    assert (prompt.positions, prompt.position_delta) == (other.positions, other.position_delta)
    assert [image.content_hash for image in prompt.images] == [image.content_hash for image in other.images]


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
async def test_a_prompt_is_as_if_the_picture_were_not_there(name: str, conversation: Any, pipelines: Any) -> None:
    pipeline, report = pipelines(name), PictureReport(may_fail=True)
    messages, without = messages_of(conversation), messages_of(conversation, without="@bad")

    prompt = await pipeline.chat_prompt(messages, tenant="key", report=report)

    assert_same(prompt, await pipeline.chat_prompt(without, tenant="key"))
    assert await pipeline.chat_tokens(messages, report=PictureReport(may_fail=True)) == list(prompt.token_ids)
    places = [(m, p) for m, (_, content) in enumerate(conversation) for p, text in enumerate(content) if text == "@bad"]
    assert [error.param for error in report.left_out] == [f"messages[{m}].content[{p}].image_url" for m, p in places]


async def test_a_warning_names_field_code_and_reason(pipelines: Any) -> None:
    report = PictureReport(may_fail=True)

    await pipelines("llava").chat_prompt(messages_of(CONVERSATIONS["first"]), report=report)

    assert report.warnings() == ["messages[0].content[0].image_url: image_decode_failed: the picture is damaged; the picture is left out"]


async def test_without_leave_to_fail_the_first_failure_is_raised(pipelines: Any) -> None:
    pipeline = pipelines("llava")

    for report in (None, PictureReport()):
        with pytest.raises(MediaError) as caught:
            await pipeline.chat_prompt(messages_of(CONVERSATIONS["between pictures"]), report=report)
        assert caught.value.param == "messages[0].content[1].image_url"


async def test_a_file_that_is_lost_is_not_even_asked_for(pipelines: Any) -> None:
    pipeline = pipelines("llava")
    report = PictureReport(may_fail=True, lost={"picture:large": MediaError("file_not_found", "it is gone", status=404)})
    conversation = [("user", ["@wide", "@large", "Which?"])]

    prompt = await pipeline.chat_prompt(messages_of(conversation), report=report)

    assert_same(prompt, await pipeline.chat_prompt(messages_of(conversation, without="@large")))
    assert [(error.code, error.param) for error in report.left_out] == [("file_not_found", "messages[0].content[1].image_url")]
    assert [ref.url for ref in images_of(pipeline).asked] == ["picture:wide"] * 2


async def test_the_others_are_closed_where_the_template_refuses_the_rest(pipelines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipelines("llava")
    render, num_calls = pipeline.template.render, 0

    def refusing(*args: Any, **kwargs: Any) -> str:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise RuntimeError("not without a picture")
        return str(render(*args, **kwargs))

    monkeypatch.setattr(pipeline.template, "render", refusing)

    with pytest.raises(RuntimeError):
        await pipeline.chat_prompt(messages_of(CONVERSATIONS["between pictures"]), report=PictureReport(may_fail=True))

    arrays = [array for image in images_of(pipeline).given for array in image.arrays.values()]
    assert len(arrays) > 1
    for array in arrays:
        with pytest.raises((ValueError, OSError)):
            array.numpy()


@pytest.mark.parametrize("name", FAMILIES)
async def test_later_turns_go_on_from_the_turn_without_the_picture(name: str, pipelines: Any) -> None:
    pipeline, report = pipelines(name), PictureReport(may_fail=True)
    first = [("user", ["@wide", "@bad", "Describe it."])]
    answer = pipeline.tokenizer.encode("A red circle.")

    turn = await pipeline.turn_prompt(messages_of(first), names={"messages[0].content[1].image_url": "image_url[1]"}, report=report)
    known = pipeline.with_answer(turn.transcript, answer)
    conversation = [*first, ("assistant", ["A red circle."]), ("user", ["And the colour?"])]
    later = await pipeline.turn_prompt(messages_of(conversation, without="@bad"), known=known)

    assert [error.param for error in report.left_out] == ["image_url[1]"]
    assert later.num_known_tokens >= len(turn.prompt.token_ids)
    fresh = await pipeline.turn_prompt(messages_of(first, without="@bad"), known=Transcript())
    assert_same(turn.prompt, fresh.prompt)


IMAGES = [{"url": "picture:wide"}, {"url": "picture:bad"}, {"url": "picture:small"}]
FIELDS = [f"image_data[{index}]" for index in range(3)]


@pytest.mark.parametrize("framed", [True, False], ids=["with their frames", "without"])
@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize("name", FAMILIES)
async def test_placeholders_without_messages_go_with_their_pictures(name: str, as_ids: bool, framed: bool, pipelines: Any) -> None:
    pipeline, report = pipelines(name), PictureReport(may_fail=True)
    mark = pipeline.family.framed_placeholder if framed else pipeline.family.placeholder
    text, without = (f"First:{mark} then{middle}, and{mark}How many?" for middle in (mark, ""))
    if as_ids:
        text, without = (pipeline.tokenizer.encode(part, add_special_tokens=True) for part in (text, without))
        place = [i for i, token_id in enumerate(text) if token_id == pipeline.tokenizer.token_id(pipeline.family.placeholder)][1]
        begin, end = (len(pipeline.tokenizer.encode(part)) if framed and part else 0 for part in pipeline.family.rules.frame)
        without = text[: place - begin] + text[place + 1 + end :]  # cut out, and not tokenized anew

    prompt = await pipeline.picture_prompt(text, IMAGES, params=FIELDS, report=report)

    assert_same(prompt, await pipeline.picture_prompt(without, IMAGES[::2], params=FIELDS[::2]))
    assert [error.param for error in report.left_out] == ["image_data[1]"]


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
async def test_pictures_that_stand_before_the_text_are_fewer_then(as_ids: bool, pipelines: Any) -> None:
    pipeline = pipelines("qwen2_vl")
    prompt = pipeline.tokenizer.encode("How many?", add_special_tokens=True) if as_ids else "How many?"

    made = await pipeline.picture_prompt(prompt, IMAGES, params=FIELDS, report=PictureReport(may_fail=True))

    assert_same(made, await pipeline.picture_prompt(prompt, IMAGES[::2], params=FIELDS[::2]))


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize("has_placeholder", [False, True])
async def test_a_picture_that_was_all_there_was_is_not_left_out(as_ids: bool, has_placeholder: bool, pipelines: Any) -> None:
    """The prompt would be empty, which the client did not send."""
    pipeline = pipelines("qwen2_vl")
    text = pipeline.family.framed_placeholder if has_placeholder else ""
    prompt = pipeline.tokenizer.encode(text) if as_ids else text

    with pytest.raises(MediaError) as caught:
        await pipeline.picture_prompt(prompt, [IMAGES[1]], params=["image_data"], report=PictureReport(may_fail=True))

    assert (caught.value.code, caught.value.param) == ("image_decode_failed", "image_data")


@pytest.mark.parametrize("name", FAMILIES)
async def test_ids_that_hold_the_pictures_tokens_already_cannot_be_cut(name: str, pipelines: Any) -> None:
    """Nobody knows how many of the tokens were to be the lost picture's."""
    pipeline = pipelines(name)
    good = [IMAGES[0], {"url": "picture:large"}]
    ids = list((await pipeline.picture_prompt("How many?", good, params=FIELDS[:2])).token_ids)
    num_given = len(images_of(pipeline).given)

    with pytest.raises(MediaError) as caught:
        await pipeline.picture_prompt(ids, IMAGES[:2], params=FIELDS[:2], report=PictureReport(may_fail=True))

    assert caught.value.param == "image_data[1]"
    assert len(images_of(pipeline).given) == num_given + 1


def test_a_text_that_would_become_a_placeholder_by_the_gap_is_cut() -> None:
    from vlm_server.picture_places import text_with_placeholders

    class Family:
        placeholder = framed_placeholder = "<image>"

        class rules:
            frame, gap = ("", ""), ""

    written = text_with_placeholders("<im<image>age>", 1, Family, guarded=lambda text: text.replace("<image>", "<|image>"), left_out={0})  # type: ignore[arg-type]

    assert written == "<|image>"
