"""Pictures whose embeddings do not fit in their cache: each is encoded once and stays until its request has computed it; few do at once."""

import json
from collections.abc import Callable

import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.request import ImageSpan, Prompt, SamplingParams, make_cache_keys
from tests.engine.fake_encoder import NUM_TOKENS, fake_image
from tests.engine.test_core import HIDDEN_SIZE, WideEncoder, run, text_prompt, tokens
from tests.tiny_models import write_tiny

EMBEDDING_BYTES = NUM_TOKENS * HIDDEN_SIZE * 4
PREFIX = tuple(range(100, 116))
ANSWER = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def new_engine(folder) -> Callable[..., Engine]:
    """Makes text models that are made to take pictures."""
    engines = []

    def new(**settings: int) -> Engine:
        defaults = {"session_len": 128, "max_batch_size": 2, "cache_block_seq_len": 16, "embedding_cache_bytes": 0}
        config = EngineConfig(model_folder=str(folder), device="cpu", **(defaults | settings))
        engine = Engine(config.resolve(json.loads((folder / "config.json").read_text())))
        engine.runner.encoder = WideEncoder()
        engines.append(engine)
        return engine

    yield new
    for engine in engines:
        engine.scheduler.check()
        engine.close()


def prompt(*values: int, prefix: tuple[int, ...] = (), tenant: str = "") -> Prompt:
    """Pictures directly behind the prefix, each of a shape of its own: no two are encoded together."""
    images = tuple(fake_image(value, side=1 + value) for value in values)
    spans = tuple(ImageSpan(len(prefix) + NUM_TOKENS * index, NUM_TOKENS, index) for index in range(len(values)))
    token_ids = (*prefix, *[9] * (NUM_TOKENS * len(values)), *range(20, 50))
    return Prompt(token_ids=token_ids, cache_keys=make_cache_keys(token_ids, images, spans), images=images, spans=spans, tenant=tenant)


@pytest.mark.parametrize("values", [(1,), (1, 2)], ids=str)
@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["at the start", "behind a cached prefix"])
def test_a_picture_that_does_not_fit_in_the_cache_is_encoded_once_and_answered_as_any_other(new_engine, values, prefix):
    answers = []
    for limit_bytes in (1 << 20, 0):
        engine = new_engine(embedding_cache_bytes=limit_bytes)
        engine.add("prefix", text_prompt(*PREFIX, 5), ANSWER)
        run(engine)
        engine.add("image", prompt(*values, prefix=prefix), ANSWER)
        for _ in range(50):
            answers += [output for output in engine.step() if output.request_id == "image"]
        assert engine.runner.encoder.batch_sizes == [1] * len(values)

    assert not engine.has_work
    assert engine.stats().embedding_cache_bytes == 0
    assert len(answers) == 2 * ANSWER.max_tokens
    assert tokens(answers[: ANSWER.max_tokens]) == tokens(answers[ANSWER.max_tokens :])


@pytest.mark.parametrize("settings", [{}, {"max_batch_size": 16, "cache_max_entry_count": 8}], ids=["rows are short", "blocks are short"])
def test_pictures_that_wait_for_their_turn_are_encoded_once_and_only_one_ahead_of_a_full_cache(new_engine, settings):
    roomy, short = new_engine(embedding_cache_bytes=1 << 20), new_engine(**settings)
    prompts = {f"image {value}": prompt(value) for value in range(1, 6)}
    expected = {}
    for name, each in prompts.items():
        roomy.add(name, each, ANSWER)
        expected[name] = tokens(run(roomy)[name])

    for number in range(2):
        short.add(f"long {number}", text_prompt(*range(60 + number, 90 + number)), LONG)
    short.step()
    for name, each in prompts.items():
        short.add(name, each, ANSWER)
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    while short.has_work:
        was_full = "long 0" in short.scheduler.requests
        for output in short.step():
            answers.setdefault(output.request_id, []).extend(output.token_ids)
        assert short.embeddings.num_bytes <= (1 if was_full else 3) * EMBEDDING_BYTES

    assert short.scheduler.num_preemptions == 0
    assert short.runner.encoder.batch_sizes == [1] * len(prompts)
    assert {name: answers[name] for name in prompts} == expected
    assert short.embeddings.num_bytes == 0


def test_the_embedding_of_a_request_that_leaves_before_its_turn_goes_at_once_and_the_next_one_is_made(new_engine):
    engine = new_engine()
    for number in range(2):
        engine.add(f"long {number}", text_prompt(*range(60 + number, 90 + number)), LONG)
    engine.step()
    for value in (1, 2):
        engine.add(f"image {value}", prompt(value), ANSWER)
    engine.step()
    assert list(engine.embeddings.tensors) == [fake_image(1, side=2).content_hash]

    engine.abort("image 1")

    assert engine.embeddings.num_bytes == 0
    engine.step()
    assert list(engine.embeddings.tensors) == [fake_image(2, side=3).content_hash]


def test_one_tenants_waiting_pictures_do_not_keep_another_tenants_from_the_encoder(new_engine):
    engine = new_engine()
    for number in range(2):
        engine.add(f"long {number}", text_prompt(*range(60 + number, 90 + number), tenant="a"), LONG)
    engine.step()
    engine.add("a", prompt(1, tenant="a"), ANSWER)
    engine.step()
    engine.add("b", prompt(2, tenant="b"), ANSWER)

    while "b" in engine.scheduler.requests:
        engine.step()

    assert "long 0" in engine.scheduler.requests or "long 1" in engine.scheduler.requests


def test_announced_pictures_wait_for_room_and_are_encoded_then(new_engine):
    engine = new_engine()
    for number in range(2):
        engine.add(f"long {number}", text_prompt(*range(60 + number, 90 + number)), LONG)
    engine.step()
    engine.add("image", prompt(1), ANSWER)
    engine.announce("prompt", fake_image(2, side=3))
    for _ in range(5):
        engine.step()
    assert engine.stats().num_images_encoded == 1

    run(engine)

    assert engine.stats().num_images_encoded == 2
