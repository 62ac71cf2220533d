"""The engine as a whole on tiny checkpoints: what it refuses, what one request's trouble costs the others, and seeds."""

import json
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import pytest
import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.encoding import Encoding
from engine.request import FinishReason, ImageSpan, InvalidRequestError, Prompt, PromptTooLongError, SamplingParams, make_cache_keys
from engine.sampler import sample
from tests.engine.fake_encoder import NUM_TOKENS, FakeEncoder, SteppingClock, fake_image
from tests.tiny_models import write_tiny

HIDDEN_SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def engine(folder) -> Iterator[Engine]:
    engine = make_engine(folder)
    yield engine
    engine.scheduler.check()
    engine.close()


def make_engine(folder, **settings) -> Engine:
    config = EngineConfig(model_folder=str(folder), device="cpu", session_len=256, max_batch_size=16, **settings)
    return Engine(config.resolve(json.loads((folder / "config.json").read_text())))


def text_prompt(*token_ids: int, tenant: str = "") -> Prompt:
    return Prompt(token_ids=token_ids, cache_keys=make_cache_keys(token_ids, (), ()), tenant=tenant)


def image_prompt(value: int, *, first: int = 5) -> Prompt:
    image = fake_image(value)
    token_ids = (first, *[9] * NUM_TOKENS, *range(20, 60))
    spans = (ImageSpan(1, NUM_TOKENS, 0),)
    return Prompt(token_ids=token_ids, cache_keys=make_cache_keys(token_ids, (image,), spans), images=(image,), spans=spans)


def run(engine: Engine) -> dict[str, list]:
    """All outputs by request until nothing is left to do."""
    outputs: dict[str, list] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.scheduler.check()
    return outputs


def tokens(outputs: list) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        (text_prompt(1, 400), SamplingParams(), "outside 0 … 399"),
        (text_prompt(1, -1), SamplingParams(), "outside 0 … 399"),
        (text_prompt(), SamplingParams(), "no tokens"),
        (text_prompt(1), SamplingParams(logit_bias={400: 1.0}), "logit_bias"),
        (text_prompt(1), SamplingParams(stop_token_ids=(400,)), "stop_token_ids"),
        (image_prompt(1), SamplingParams(), "no images"),
    ],
)
def test_what_the_model_cannot_take_is_refused_by_name(engine, prompt, params, message):
    with pytest.raises(InvalidRequestError, match=message):
        engine.add("request", prompt, params)
    assert not engine.has_work


def test_a_prompt_over_the_window_is_refused_with_both_numbers(engine):
    with pytest.raises(PromptTooLongError, match=r"256 tokens.*at most 256.*--session-len"):
        engine.add("request", text_prompt(*range(3, 259)), SamplingParams())


def test_a_repetition_penalty_reads_the_prompts_tokens_once_and_not_in_each_step(engine, monkeypatch):
    read = []

    def noted(logits, rows, **settings):
        read.extend(row.prompt_token_ids for row in rows)
        return sample(logits, rows, **settings)

    monkeypatch.setattr("engine.core.sample", noted)
    engine.add("penalized", text_prompt(4, 5, 4, 5, 6), SamplingParams(max_tokens=3, repetition_penalty=1.5, ignore_eos=True))
    run(engine)

    assert len(read) == 3
    assert sorted(read[0]) == [4, 5, 6]
    assert all(token_ids is read[0] for token_ids in read)
    engine.add("plain", text_prompt(4, 5, 4, 5, 6), SamplingParams(max_tokens=3, ignore_eos=True))
    run(engine)
    assert not any(read[3:])


def test_output_that_reaches_the_window_ends_with_length(engine):
    engine.add("request", text_prompt(*range(3, 250)), SamplingParams(temperature=0, ignore_eos=True))

    outputs = run(engine)["request"]

    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert len(tokens(outputs)) == 256 - 247


def test_a_seeded_rows_tokens_are_the_same_alone_and_among_fifteen_others(folder):
    params = SamplingParams(max_tokens=40, temperature=0.9, top_p=0.95, top_k=50, seed=11, ignore_eos=True)
    alone, among = make_engine(folder), make_engine(folder)

    alone.add("mine", text_prompt(7, 8, 9), params)
    for number in range(15):
        among.add(f"other-{number}", text_prompt(7, 8, 10 + number), SamplingParams(max_tokens=50, temperature=1.2, ignore_eos=True))
    for _ in range(3):
        among.step()
    among.add("mine", text_prompt(7, 8, 9), params)

    assert tokens(run(alone)["mine"]) == tokens(run(among)["mine"])
    assert among.stats().max_batched_requests == 16


@pytest.mark.parametrize("settings", [{}, {"enable_prefix_caching": False}, {"tp": 2}], ids=str)
def test_answers_that_made_way_for_another_keys_are_the_same_as_alone(folder, settings):
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    prompts = {f"{tenant}{number}": text_prompt(7, 8, 10 + number, tenant=tenant) for tenant in "ab" for number in range(16)}
    alone, shared = make_engine(folder), make_engine(folder, **settings)
    expected = {}
    for name, prompt in prompts.items():
        alone.add(name, prompt, params)
        expected[name] = tokens(run(alone)[name])

    for name, prompt in prompts.items():
        if name == "b0":
            early = [shared.step() for _ in range(10)]
        shared.add(name, prompt, params)
    outputs = run(shared)
    for output in [output for step in reversed(early) for output in step]:
        outputs[output.request_id].insert(0, output)

    assert shared.scheduler.num_preemptions == 4
    assert {name: tokens(outputs[name]) for name in prompts} == expected
    shared.close()
    alone.close()


def test_requests_without_a_seed_differ_from_each_other(engine):
    for name in ("a", "b"):
        engine.add(name, text_prompt(7, 8, 9), SamplingParams(max_tokens=30, temperature=1.5, ignore_eos=True))

    outputs = run(engine)

    assert tokens(outputs["a"]) != tokens(outputs["b"])


def test_an_aborted_request_gives_its_blocks_back_at_once(engine):
    engine.add("request", text_prompt(*range(3, 100)), SamplingParams(max_tokens=100, ignore_eos=True))
    engine.step()
    assert engine.stats().num_referenced_blocks > 0

    output = engine.abort("request")

    assert output.finish_reason is FinishReason.ABORT
    assert engine.stats().num_referenced_blocks == 0
    assert engine.abort("request") is None


def test_out_of_memory_ends_the_largest_request_and_no_other(engine, monkeypatch, caplog):
    engine.add("small", text_prompt(4, 5), SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    engine.step()
    execute = engine.ranks.execute

    def short_of_memory(plan, embeddings):
        if any(len(chunk.token_ids) > 50 for chunk in plan.chunks):
            raise torch.OutOfMemoryError
        return execute(plan, embeddings)

    monkeypatch.setattr(engine.ranks, "execute", short_of_memory)
    engine.add("large", text_prompt(*range(3, 100)), SamplingParams(max_tokens=5, ignore_eos=True))

    outputs = run(engine)

    assert outputs["large"][-1].finish_reason is FinishReason.ERROR
    assert "--cache-max-entry-count" in outputs["large"][-1].error
    assert outputs["small"][-1].finish_reason is FinishReason.LENGTH


def test_out_of_memory_while_sampling_reads_no_prompt_twice_and_offers_beams_nothing(folder, monkeypatch):
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    answers, offers = [], []

    for num_failures in (0, 1):
        engine = make_engine(folder, max_prefill_token_num=16)
        failures = [torch.OutOfMemoryError()] * num_failures

        def short_of_memory(logits, rows, engine=engine, failures=failures, **settings):
            read = engine.scheduler.requests.get("read")
            if failures and read is not None and read.num_computed:
                offers.append(dict(engine.beams.search_of("beams").offers))
                raise failures.pop()
            return sample(logits, rows, **settings)

        monkeypatch.setattr("engine.core.sample", short_of_memory)
        engine.add("decoding", text_prompt(*range(10, 18)), params)
        engine.add("beams", text_prompt(*range(40, 48)), replace(params, num_beams=2))
        engine.step()
        engine.add("read", text_prompt(*range(100, 120)), replace(params, prompt_logprobs=0, pools=True))
        engine.add("largest", text_prompt(*range(150, 250)), params)
        answers.append(run(engine))
        engine.close()

    whole, short = answers
    assert offers == [{}]
    assert short["largest"][-1].finish_reason is FinishReason.ERROR
    assert {name: tokens(short[name]) for name in ("read", "beams")} == {name: tokens(whole[name]) for name in ("read", "beams")}
    assert len(short["read"][0].prompt_logprobs) == 19
    assert short["read"][0].embedding == pytest.approx(whole["read"][0].embedding, rel=1e-5)


class WideEncoder(FakeEncoder):
    def encode(self, batch):
        return [rows[:, :1].expand(-1, HIDDEN_SIZE) / 255 for rows in super().encode(batch)]


def test_a_request_whose_numbers_overflow_fails_and_leaves_nothing_to_the_others(folder):
    """The others decode beside it, and later ones get its blocks."""
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    prompts = {"beside": text_prompt(*range(100, 120)), "longer": text_prompt(*range(150, 220)), "after": text_prompt(*range(230, 240))}
    poisoned, clean = (make_engine(folder, cache_max_entry_count=16) for _ in range(2))
    with torch.inference_mode():
        poisoned.runner.decoder.embedding.weight[7] = torch.nan

    def answers(engine: Engine, names: list[str]) -> dict[str, list[int]]:
        for name in names:
            engine.add(name, prompts[name], params)
        return {name: tokens(outputs) for name, outputs in run(engine).items() if name in prompts}

    poisoned.add("sick", text_prompt(*[7] * 60), params)
    poisoned.add("left", text_prompt(*[7] * 50), params)
    poisoned.step()
    poisoned.abort("left")
    poisoned.add("sick too", text_prompt(9, 7, *range(20, 60)), params)

    assert answers(poisoned, ["beside", "longer"]) == answers(clean, ["beside", "longer"])
    assert answers(poisoned, ["after"]) == answers(clean, ["after"])
    poisoned.add("sick", text_prompt(*[7] * 60), params)
    assert "no finite numbers" in run(poisoned)["sick"][-1].error


@pytest.fixture
def seeing(engine) -> Engine:
    """A text model that is made to take pictures."""
    engine.runner.encoder = WideEncoder(num_layers=20)
    return engine


@pytest.fixture
def slow(seeing, monkeypatch) -> Engine:
    """It encodes at most one layer per step: each takes a second of its clock, and each step has one."""
    monkeypatch.setattr("engine.core.Encoding", partial(Encoding, now_s=SteppingClock()))
    monkeypatch.setattr("engine.core.IDLE_ENCODE_S", 1.0)
    monkeypatch.setattr(seeing.pace, "encode_s", lambda step_s, **load: 1.0)
    return seeing


def test_rows_decode_on_while_a_picture_is_encoded(slow):
    slow.add("text", text_prompt(4, 5), SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    slow.step()
    slow.add("image", image_prompt(200), SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))

    num_text_tokens_meanwhile = 0
    while slow.encoding is not None or slow.scheduler.images_needed():
        num_text_tokens_meanwhile += sum(len(output.token_ids) for output in slow.step() if output.request_id == "text")

    assert num_text_tokens_meanwhile >= 20
    assert len(run(slow)["image"]) == 2


def test_a_prompt_comes_in_at_the_pace_that_is_set(engine):
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    loads: list[dict[str, object]] = []

    def seven(**load: object) -> int:
        loads.append(load)
        return 7

    engine.pace.prefill_tokens = seven
    engine.add("beside", text_prompt(1, 2), replace(params, max_tokens=40))
    engine.step()
    engine.add("in pieces", text_prompt(3, *range(21, 90)), params)
    num_steps = 0
    while engine.scheduler.requests["in pieces"].num_output_tokens == 0:
        engine.step()
        num_steps += 1

    assert num_steps == 70 / 7
    assert loads[1:2] == [{"num_decoding": 1, "num_prefilling": 1, "num_images": 0}]


def test_a_picture_seen_before_is_not_encoded_again(seeing):
    for name in ("first", "second"):
        seeing.add(name, image_prompt(50), SamplingParams(max_tokens=1, temperature=0))
        run(seeing)

    assert seeing.runner.encoder.batch_sizes == [1]
    assert (seeing.stats().num_embedding_cache_hits, seeing.stats().num_embedding_cache_misses) == (1, 1)


def test_the_statistics_say_how_long_a_request_and_a_picture_wait(seeing):
    seeing.add("image", image_prompt(52), SamplingParams(max_tokens=1, temperature=0))
    before = seeing.stats()
    run(seeing)
    after = seeing.stats()

    assert min(before.oldest_waiting_s, before.oldest_image_waiting_s) > 0
    assert (after.oldest_waiting_s, after.oldest_image_waiting_s) == (0, 0)


def test_the_first_output_says_where_the_time_went_and_no_later_one_does(seeing):
    for name in ("new picture", "seen before"):
        seeing.add(name, image_prompt(50), SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
        first, *later = run(seeing)[name]
        assert list(first.timings_s) == (["queue", "encode", "prefill"] if name == "new picture" else ["queue", "prefill"])
        assert all(seconds >= 0 for seconds in first.timings_s.values())
        assert len(later) == 2
        assert all(output.timings_s is None for output in later)
    seeing.add("aborted", image_prompt(51), SamplingParams())
    seeing.abort("aborted")

    assert len(seeing.clock) == 0


def test_a_picture_that_stands_twice_in_a_prompt_is_as_two_equal_ones(folder):
    token_ids = (5, *[9] * NUM_TOKENS, 6, *[9] * NUM_TOKENS, *range(20, 60))
    answers = []
    for images in ((fake_image(7),), (fake_image(7), fake_image(7))):
        spans = (ImageSpan(1, NUM_TOKENS, 0), ImageSpan(2 + NUM_TOKENS, NUM_TOKENS, len(images) - 1))
        prompt = Prompt(token_ids=token_ids, cache_keys=make_cache_keys(token_ids, images, spans), images=images, spans=spans)
        engine = make_engine(folder)
        engine.runner.encoder = WideEncoder()
        for name in ("first", "again"):
            engine.add(name, prompt, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
            answers.append(tokens(run(engine)[name]))
        assert engine.runner.encoder.batch_sizes == [1]
        engine.close()

    assert answers == [answers[0]] * 4


def test_a_forgotten_picture_is_encoded_again(seeing):
    seeing.embeddings.limit_bytes = 0
    for first in (5, 6):  # a prefix of their own, or the prefix cache would have all that the picture gave
        seeing.add(f"first token {first}", image_prompt(50, first=first), SamplingParams(max_tokens=1, temperature=0))
        run(seeing)

    assert seeing.runner.encoder.batch_sizes == [1, 1]
    assert seeing.stats().embedding_cache_bytes == 0


def test_pictures_of_several_requests_are_encoded_in_one_batch(seeing):
    for value in (1, 2, 3):
        seeing.add(f"request-{value}", image_prompt(value), SamplingParams(max_tokens=1, temperature=0))

    run(seeing)

    assert seeing.runner.encoder.batch_sizes == [3]


def test_different_pictures_under_the_same_text_share_nothing_and_the_same_picture_does(seeing):
    outputs = {}
    for name, value in (("red", 10), ("blue", 240), ("red again", 10)):
        seeing.add(name, image_prompt(value), SamplingParams(max_tokens=1, temperature=0, logprobs=5))
        outputs[name] = run(seeing)[name][0]

    assert {name: output.num_cached_tokens for name, output in outputs.items()} == {"red": 0, "blue": 0, "red again": 32}
    best = {name: [logprob for _, logprob in output.logprobs[0].top] for name, output in outputs.items()}
    assert best["red again"] == pytest.approx(best["red"], rel=1e-5)
    assert best["blue"] != pytest.approx(best["red"], rel=1e-3)


def test_a_picture_that_cannot_be_encoded_fails_its_requests_only(seeing, caplog):
    seeing.runner.encoder.failure = RuntimeError("broken")
    seeing.add("image", image_prompt(1), SamplingParams(max_tokens=3))
    seeing.add("text", text_prompt(4, 5), SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))

    outputs = run(seeing)

    assert outputs["image"][-1].finish_reason is FinishReason.ERROR
    assert outputs["text"][-1].finish_reason is FinishReason.LENGTH


class PickyEncoder(WideEncoder):
    """Cannot encode the picture of 2s, nor any batch that it is in."""

    def encode(self, batch):
        embeddings = super().encode(batch)
        if any(int(arrays["pixel_values"].flatten()[0]) == 2 for arrays in batch):
            raise RuntimeError("broken")
        return embeddings


def test_a_picture_that_cannot_be_encoded_fails_none_that_are_encoded_with_it(engine, caplog):
    engine.runner.encoder = PickyEncoder()
    for value in (1, 2, 3):
        engine.add(f"request-{value}", image_prompt(value), SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))

    outputs = run(engine)

    assert engine.runner.encoder.batch_sizes == [3, 1, 1, 1]
    assert {name: part[-1].finish_reason for name, part in outputs.items()} == {
        "request-1": FinishReason.LENGTH,
        "request-2": FinishReason.ERROR,
        "request-3": FinishReason.LENGTH,
    }
    for value in (4, 5):
        engine.add(f"request-{value}", image_prompt(value), SamplingParams(max_tokens=1))
    run(engine)
    assert engine.runner.encoder.batch_sizes[4:] == [2]


def test_an_announced_picture_that_cannot_be_encoded_keeps_no_other_from_being_encoded_ahead(engine, caplog):
    engine.runner.encoder = PickyEncoder()
    images = [fake_image(value) for value in (1, 2, 3)]
    for image in images:
        engine.announce("a prompt", image)

    run(engine)

    assert engine.runner.encoder.batch_sizes == [3, 1, 1, 1]
    assert set(engine.embeddings.tensors) == {images[0].content_hash, images[2].content_hash}


def test_aborting_the_only_request_of_a_picture_stops_its_encoding(slow):
    slow.add("image", image_prompt(1), SamplingParams(max_tokens=3))
    slow.step()
    slow.step()
    assert slow.encoding is not None

    slow.abort("image")

    assert slow.encoding is None
    assert slow.runner.encoder.num_layers_done < len(slow.runner.encoder.layers)


def test_a_grammar_is_waited_for_only_when_no_picture_is_left_to_encode(slow, monkeypatch):
    compiled: Future[None] = Future()
    waits = []

    def noted(futures, **how):
        waits.append((slow.stats().num_images_encoded, slow.encoding))
        compiled.set_result(None)

    monkeypatch.setattr("engine.core.wait", noted)
    monkeypatch.setattr(slow.guides, "begin", lambda *args, **settings: compiled)
    slow.set_vocabulary("any")
    slow.announce("prompt", fake_image(2, side=3))
    slow.add("guided", image_prompt(1), SamplingParams(max_tokens=1, temperature=0, grammar="any"))
    run(slow)

    assert waits == [(2, None)]


def encode_what_is_announced(engine: Engine) -> None:
    while engine.has_work:
        assert engine.step() == []


def test_an_announced_picture_is_encoded_before_its_request_comes_and_not_again(seeing):
    seeing.announce("prompt", fake_image(1))
    encode_what_is_announced(seeing)
    assert seeing.stats().num_images_encoded == 1

    seeing.withdraw("prompt", request_follows=True)
    seeing.add("image", image_prompt(1), SamplingParams(max_tokens=1, temperature=0))
    first = run(seeing)["image"][0]

    assert seeing.runner.encoder.batch_sizes == [1]
    assert list(first.timings_s) == ["queue", "prefill"]


def test_the_time_of_announced_pictures_is_counted(seeing):
    seeing.announce("prompt", fake_image(1))

    encode_what_is_announced(seeing)

    stats = seeing.stats()
    assert stats.step_time_s >= stats.encode_time_s > 0
    assert stats.num_steps == 0


def test_an_answer_is_the_same_with_and_without_an_announcement(folder):
    answers = []
    for is_announced in (False, True):
        engine = make_engine(folder)
        engine.runner.encoder = WideEncoder()
        if is_announced:
            engine.announce("prompt", fake_image(200))
            encode_what_is_announced(engine)
        engine.add("image", image_prompt(200), SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
        answers.append(tokens(run(engine)["image"]))
        assert engine.runner.encoder.batch_sizes == [1]
        engine.close()

    assert answers[0] == answers[1]


def test_pictures_that_requests_need_come_before_announced_ones(slow):
    slow.announce("prompt", fake_image(1, side=3))  # not of the same batch
    slow.add("image", image_prompt(2), SamplingParams(max_tokens=1, temperature=0))

    slow.step()

    assert [image.content_hash for image in slow.encoding.images] == [fake_image(2).content_hash]


def test_a_request_that_finds_its_picture_being_encoded_ahead_waits_for_that(slow):
    slow.announce("prompt", fake_image(1))
    slow.step()
    slow.step()
    slow.withdraw("prompt", request_follows=True)

    slow.add("image", image_prompt(1), SamplingParams(max_tokens=1, temperature=0))
    first = run(slow)["image"][0]

    assert slow.runner.encoder.batch_sizes == [1]
    assert all(seconds >= 0 for seconds in first.timings_s.values())
    assert list(first.timings_s) == ["queue", "encode", "prefill"]


def test_pictures_that_nobody_will_ask_for_are_not_encoded_to_their_end(slow):
    for value in (1, 2):
        slow.announce("prompt", fake_image(value, side=1 + value))
    slow.step()
    slow.step()
    assert slow.encoding is not None

    slow.withdraw("prompt", request_follows=False)

    assert slow.encoding is None
    assert not slow.has_work
    assert slow.stats().num_images_encoded == 0


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        (text_prompt(*range(3, 259)), SamplingParams(), PromptTooLongError),
        (text_prompt(1), SamplingParams(num_beams=17), InvalidRequestError),
        (text_prompt(400), SamplingParams(), InvalidRequestError),
    ],
)
def test_a_refused_request_ends_the_encoding_that_was_announced_for_it(slow, prompt, params, error):
    slow.announce("prompt", fake_image(1))
    slow.step()
    slow.step()
    slow.withdraw("prompt", request_follows=True)
    assert slow.encoding is not None

    with pytest.raises(error):
        slow.add("request", prompt, params)

    assert slow.encoding is None
    assert not slow.has_work


def test_a_refused_request_leaves_others_their_encoding(slow):
    slow.add("image", image_prompt(1), SamplingParams(max_tokens=1, temperature=0))
    slow.step()

    with pytest.raises(PromptTooLongError):
        slow.add("request", text_prompt(*range(3, 259)), SamplingParams())

    assert slow.encoding is not None
    assert "image" in run(slow)
    assert slow.runner.encoder.batch_sizes == [1]


def test_an_encoding_whose_request_has_not_come_makes_way_for_a_picture_that_one_needs(slow):
    slow.announce("never", fake_image(1, side=3))
    slow.step()
    slow.step()
    slow.withdraw("never", request_follows=True)

    slow.add("image", image_prompt(2), SamplingParams(max_tokens=1, temperature=0))
    slow.step()

    assert [image.content_hash for image in slow.encoding.images] == [fake_image(2).content_hash]


def test_a_picture_that_fills_the_window_is_not_encoded_ahead(seeing):
    seeing.announce("prompt", fake_image(1, num_tokens=256))
    assert not seeing.has_work

    seeing.announce("prompt", fake_image(1, num_tokens=255))
    assert seeing.has_work


def test_what_the_prefix_cache_has_is_not_encoded_ahead_though_its_embedding_is_gone(seeing):
    seeing.embeddings.limit_bytes = 0
    seeing.add("first", image_prompt(50), SamplingParams(max_tokens=1, temperature=0))
    run(seeing)
    assert seeing.stats().embedding_cache_bytes == 0

    seeing.announce("prompt", fake_image(50))
    seeing.add("second", image_prompt(50), SamplingParams(max_tokens=1, temperature=0))
    run(seeing)

    assert seeing.runner.encoder.batch_sizes == [1]


def test_an_announced_picture_that_cannot_be_encoded_is_not_tried_for_ever(seeing, caplog):
    seeing.runner.encoder.failure = RuntimeError("broken")
    seeing.announce("prompt", fake_image(1))

    encode_what_is_announced(seeing)

    assert seeing.runner.encoder.batch_sizes == [1]


def test_a_model_without_eyes_ignores_announcements(engine):
    engine.announce("prompt", fake_image(1))

    assert not engine.has_work
