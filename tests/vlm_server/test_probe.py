"""The probe: which way it goes with each family, what it says where a stage fails, and that it leaves nothing behind."""

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.request import (
    EngineDeadError,
    EngineError,
    FinishReason,
    Prompt,
    PromptTooLongError,
    QueueFullError,
    SamplingParams,
    StepOutput,
)
from tests.image_fixtures import EMBEDDED, preprocessor, tiny_folder
from tests.tiny_models import image_model_names
from vision.image import ImageOptions, MediaError, ProcessedImage
from vision.shared_array import SharedArray
from vision.workers import WorkerError
from vlm_server.jinja_process import JinjaProcess, RenderLimitError
from vlm_server.pipeline import Pipeline
from vlm_server.probe import PICTURE_SIDE, PipelineProbe, picture

JINJA = JinjaProcess()
TIMINGS_S = {"queue": 0.5, "encode": 0.25, "prefill": 0.125}


class Pictures:
    """Stands in for the vision service's workers: the same work, in this process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failures: dict[str, Exception] = {}  # by stage
        self.given: list[ProcessedImage] = []

    async def try_out(self, data: bytes, options: ImageOptions, *, on_stage: Callable[[str], None]) -> ProcessedImage:
        for stage in ("decode", "preprocess"):
            on_stage(stage)
            if stage in self.failures:
                raise self.failures[stage]
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        arrays, layout, num_tokens = preprocessor(self.name).process(pixels, options)
        shared = {key: SharedArray.copy_of(value) for key, value in arrays.items()}
        image = ProcessedImage(b"x" * 32, num_tokens, shared, layout, *pixels.shape[:2], {"decode": 0.1, "preprocess": 0.2})
        self.given.append(image)
        return image


class Engine:
    """Answers every prompt with one token, unless it is told otherwise."""

    def __init__(self) -> None:
        self.requests: list[tuple[Prompt, SamplingParams]] = []
        self.refusal: EngineError | None = None
        self.output: dict[str, Any] = {"token_ids": [5], "finish_reason": FinishReason.LENGTH, "timings_s": TIMINGS_S}
        self.hangs = False
        self.num_left = 0

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str) -> AsyncGenerator[StepOutput, None]:
        self.requests.append((prompt, params))
        if self.refusal is not None:
            raise self.refusal
        try:
            if self.hangs:
                await asyncio.Future()
            yield StepOutput(request_id=request_id, **self.output)
        finally:
            self.num_left += 1


class Bench:
    def __init__(self, name: str, *, limit_s: float = 60.0, chat_template: str | None = None) -> None:
        self.engine, self.images = Engine(), Pictures(name)
        self.pipeline = Pipeline.load(tiny_folder(name), jinja=JINJA, chat_template=chat_template)
        self.probe = PipelineProbe(self.engine, self.pipeline, self.images, limit_s=limit_s)


@pytest.fixture
async def benches() -> AsyncIterator[Callable[..., Bench]]:
    opened: list[Bench] = []

    def bench(name: str = EMBEDDED, **options: Any) -> Bench:
        opened.append(Bench(name, **options))
        return opened[-1]

    yield bench
    for made in opened:
        made.pipeline.close()


def test_the_picture_is_made_here_and_every_pixel_of_it_is_as_drawn() -> None:
    pixels = np.asarray(Image.open(io.BytesIO(picture())))

    assert pixels.shape == (PICTURE_SIDE, PICTURE_SIDE, 3)
    assert pixels[0, 0].tolist() == [0, 0, 128]
    assert pixels[0, -1].tolist() == [255, 0, 128]
    assert pixels[-1, 0].tolist() == [0, 255, 128]


@pytest.mark.parametrize("name", [*image_model_names(), EMBEDDED])
async def test_in_every_family_one_picture_goes_through_all_stages_up_to_one_token(benches: Callable[..., Bench], name: str) -> None:
    bench = benches(name)

    report = await bench.probe()

    assert (report.failed_stage, report.message) == (None, "")
    stages = ["template", "pictures", "picture-decode", "picture-preprocess", "tokenize", "queue", "encode", "prefill"]
    assert list(report.stages_s) == stages
    [(prompt, params)] = bench.engine.requests
    [image] = bench.images.given
    assert prompt.is_probe
    assert [span.num_tokens for span in prompt.spans]
    assert sum(span.num_tokens for span in prompt.spans) == prompt.images[0].num_tokens == image.num_tokens
    assert (params.max_tokens, params.temperature) == (1, 0)


async def test_a_model_without_pictures_is_given_a_text(benches: Callable[..., Bench]) -> None:
    engine = Engine()
    engine.output["timings_s"] = {"queue": 0.5, "prefill": 0.125}
    pipeline = benches(EMBEDDED).pipeline.with_images(None)
    pipeline.family = None

    report = await PipelineProbe(engine, pipeline, None)()
    pipeline.close()

    assert report.failed_stage is None
    assert list(report.stages_s) == ["template", "tokenize", "queue", "prefill"]
    [(prompt, _)] = engine.requests
    assert prompt.images == ()


async def test_a_template_that_takes_no_such_chat_does_not_matter(benches: Callable[..., Bench], tmp_path: Any) -> None:
    template = tmp_path / "refuses.jinja"
    template.write_text("{{ raise_exception('never') }}")
    bench = benches(chat_template=str(template))

    report = await bench.probe()

    assert report.failed_stage is None
    assert len(bench.engine.requests[0][0].images) == 1


@pytest.mark.parametrize(
    ("stage", "failure", "message"),
    [
        ("decode", MediaError("image_decode_failed", "the decoder broke down over the picture"), "the decoder broke down over the picture"),
        ("decode", WorkerError("inner words"), "a worker process for pictures does not answer"),
        ("preprocess", MediaError("image_preprocess_failed", "the image processor broke down; try again"), "broke down"),
        ("preprocess", RuntimeError("inner words"), "it failed; the server's log says why"),
    ],
)
async def test_a_failure_of_the_pictures_names_its_stage_and_no_inner_words(
    benches: Callable[..., Bench], stage: str, failure: Exception, message: str
) -> None:
    bench = benches()
    bench.images.failures[stage] = failure

    report = await bench.probe()

    assert report.failed_stage == stage
    assert report.message.startswith(f"{stage}: ")
    assert message in report.message
    assert "inner words" not in report.message
    assert bench.engine.requests == []


async def test_a_template_that_is_stopped_fails_the_probe(benches: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = benches()

    def stopped(*_: Any, **__: Any) -> str:
        raise RenderLimitError("it took too long")

    monkeypatch.setattr(JinjaProcess, "render", stopped)

    assert (await bench.probe()).failed_stage == "template"


@pytest.mark.parametrize(
    ("refusal", "stage", "is_busy"),
    [
        (EngineDeadError("the engine process ended"), "engine", False),
        (QueueFullError("200 requests wait already"), "queue", True),
        (PromptTooLongError(80, 64), "queue", False),
    ],
)
async def test_what_the_engine_refuses_is_told_apart(
    benches: Callable[..., Bench], refusal: EngineError, stage: str, is_busy: bool
) -> None:
    bench = benches()
    bench.engine.refusal = refusal

    report = await bench.probe()

    assert (report.failed_stage, report.is_busy) == (stage, is_busy)
    assert str(refusal) in report.message


@pytest.mark.parametrize(("timings_s", "stage"), [({"queue": 0.1}, "encode"), ({"queue": 0.1, "encode": 0.2, "prefill": 0.0}, "prefill")])
async def test_a_failure_in_the_engine_is_that_of_the_stage_it_came_to(
    benches: Callable[..., Bench], timings_s: dict[str, float], stage: str
) -> None:
    bench = benches()
    bench.engine.output = {"finish_reason": FinishReason.ERROR, "error": "a picture could not be encoded", "timings_s": timings_s}

    report = await bench.probe()

    assert (report.failed_stage, report.message) == (stage, f"{stage}: a picture could not be encoded")


async def test_an_answer_without_a_token_is_a_failure(benches: Callable[..., Bench]) -> None:
    bench = benches()
    bench.engine.output["token_ids"] = []

    assert (await bench.probe()).failed_stage == "prefill"


async def test_an_engine_that_never_answers_is_given_up_and_the_request_is_left(benches: Callable[..., Bench]) -> None:
    bench = benches(limit_s=0.5)
    bench.engine.hangs = True

    report = await bench.probe()

    assert report.failed_stage == "queue"
    assert "0.5 s" in report.message
    assert bench.engine.num_left == 1
