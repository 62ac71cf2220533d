"""Probes: the server's own requests go the whole way and leave nothing behind, neither in the caches nor in the counters."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.request import FinishReason, SamplingParams
from tests.engine.fake_encoder import FakeEncoder
from tests.engine.test_core import HIDDEN_SIZE, image_prompt, run, text_prompt, tokens
from tests.tiny_models import write_tiny

ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0)


class WideEncoder(FakeEncoder):
    def encode(self, batch):
        return [rows[:, :1].expand(-1, HIDDEN_SIZE) / 255 for rows in super().encode(batch)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def engine(folder) -> Iterator[Engine]:
    """A text model that is made to take pictures."""
    config = EngineConfig(model_folder=str(folder), device="cpu", session_len=256, max_batch_size=16, cache_block_seq_len=16)
    engine = Engine(config.resolve(json.loads((folder / "config.json").read_text())))
    engine.runner.encoder = WideEncoder()
    yield engine
    engine.scheduler.check()
    engine.close()


def probe(value: int):
    return replace(image_prompt(value), is_probe=True)


def test_a_probe_alone_changes_no_cache_and_no_number(engine):
    before = engine.stats()

    engine.add("probe", probe(50), ONE_TOKEN)
    [output] = run(engine)["probe"]

    assert (len(output.token_ids), output.finish_reason) == (1, FinishReason.LENGTH)
    assert list(output.timings_s) == ["queue", "encode", "prefill"]
    assert engine.runner.encoder.batch_sizes == [1]
    assert engine.stats() == before
    assert engine.scheduler.pinned_images() == set()
    engine.add("beams", probe(50), SamplingParams(max_tokens=3, num_beams=2, temperature=0))
    assert run(engine)["beams"][-1].token_ids
    assert engine.stats().num_output_tokens == before.num_output_tokens


def test_each_probe_is_computed_anew(engine):
    for name in ("first", "second"):
        engine.add(name, probe(50), ONE_TOKEN)
        assert run(engine)[name][0].num_cached_tokens == 0

    assert engine.runner.encoder.batch_sizes == [1, 1]


def test_a_probe_takes_nothing_from_the_prefix_cache_and_changes_no_answer(engine):
    prompt = text_prompt(*range(20, 60))
    engine.add("user", prompt, ONE_TOKEN)
    answer = tokens(run(engine)["user"])
    counted = engine.stats()

    engine.add("probe", replace(prompt, is_probe=True), ONE_TOKEN)
    probed = run(engine)["probe"]

    assert tokens(probed) == answer
    assert probed[0].num_cached_tokens == 0
    assert engine.stats() == counted


def test_beside_a_probe_the_others_work_is_counted_as_ever(engine):
    engine.add("user", image_prompt(10), ONE_TOKEN)
    engine.add("probe", probe(50), ONE_TOKEN)

    outputs = run(engine)

    stats = engine.stats()
    assert (len(outputs["user"]), len(outputs["probe"])) == (1, 1)
    assert (stats.num_prompt_tokens, stats.num_output_tokens, stats.num_images_encoded) == (45, 1, 1)
    assert stats.num_cached_blocks == 2  # the user's, whose picture is kept too
    assert list(engine.embeddings.tensors) == [image_prompt(10).images[0].content_hash]


@pytest.mark.parametrize("end", ["abort", "fail"])
def test_a_probe_that_ends_early_leaves_nothing_either(engine, end):
    before = engine.stats()
    engine.add("probe", probe(50), ONE_TOKEN)

    if end == "abort":
        engine.abort("probe")
    else:
        engine.runner.encoder.failure = RuntimeError("broken")
        assert run(engine)["probe"][0].finish_reason is FinishReason.ERROR

    assert engine.stats() == before
    assert not engine.embeddings.tensors
    assert not engine.has_work
