"""What requests read off their own prompts equals the reference's hidden states and log-probabilities, however the prompt is cut up."""

import json
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.request import FinishReason, Prompt, PromptTooLongError, SamplingParams, make_cache_keys
from tests.tiny_models import write_tiny

NUM_TOKENS = 90
TOLERANCE = 1e-5
POOLS = SamplingParams(max_tokens=0, pools=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def token_ids() -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(3, 400, (NUM_TOKENS,), generator=generator).tolist())


@pytest.fixture(scope="module")
def reference(folder, token_ids) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of the last hidden states, and the log-probabilities of every next token, (num_tokens, vocab_size)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        out = model(torch.tensor([token_ids]), output_hidden_states=True)
    return out.hidden_states[-1][0].mean(0), out.logits[0].log_softmax(-1)


@pytest.fixture
def engine(folder) -> Iterator[Engine]:
    engine = make_engine(folder)
    yield engine
    engine.scheduler.check()
    assert engine.stats().num_referenced_blocks == 0
    engine.close()


def make_engine(folder, **settings) -> Engine:
    config = EngineConfig(model_folder=str(folder), device="cpu", session_len=256, **{"max_batch_size": 8, **settings})
    return Engine(config.resolve(json.loads((folder / "config.json").read_text())))


def prompt_of(token_ids) -> Prompt:
    return Prompt(token_ids=tuple(token_ids), cache_keys=make_cache_keys(token_ids, (), ()))


def run(engine: Engine) -> dict[str, list]:
    outputs: dict[str, list] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def assert_close(ours: list[float], theirs: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(ours), theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"max_prefill_token_num": 7}, {"tp": 2}, {"enable_prefix_caching": True}], ids=str)
def test_the_mean_of_the_hidden_states_is_the_references(folder, token_ids, reference, settings):
    engine = make_engine(folder, **settings)
    for name in ("cold", "warm"):  # with a prefix cache the second one could skip what it must read
        engine.add(name, prompt_of(token_ids), POOLS)
        [output] = run(engine)[name]

        assert output.token_ids == []
        assert output.finish_reason is FinishReason.LENGTH
        assert output.num_cached_tokens == 0
        assert_close(output.embedding, reference[0])
    engine.close()


@pytest.mark.parametrize("settings", [{}, {"max_prefill_token_num": 7}, {"tp": 2}, {"enable_prefix_caching": True}], ids=str)
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_the_prompts_log_probabilities_are_the_references(folder, token_ids, reference, settings, max_tokens):
    engine = make_engine(folder, **settings)
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=2, temperature=0, ignore_eos=True)
    for name in ("cold", "warm"):
        engine.add(name, prompt_of(token_ids), params)
        first, *others = run(engine)[name]

        assert [logprobs.token_id for logprobs in first.prompt_logprobs] == list(token_ids[1:])
        theirs = reference[1][:-1]
        assert_close([logprobs.logprob for logprobs in first.prompt_logprobs], theirs[range(NUM_TOKENS - 1), token_ids[1:]])
        best = theirs.topk(2)
        assert_close([logprob for logprobs in first.prompt_logprobs for _, logprob in logprobs.top], best.values.flatten())
        assert all(output.prompt_logprobs is None for output in others)
        assert sum(len(output.token_ids) for output in (first, *others)) == max_tokens
    engine.close()


def test_reading_beside_others_changes_nothing_for_them_and_leaves_their_prefix_to_use(engine, token_ids, reference):
    talks = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    engine.add("alone", prompt_of(token_ids), talks)
    [alone] = run(engine).values()
    engine.add("pools", prompt_of([*token_ids, 7]), POOLS)
    engine.add("talks", prompt_of(token_ids), talks)
    engine.add("same", prompt_of(token_ids), POOLS)

    outputs = run(engine)

    assert [output.token_ids for output in outputs["talks"]] == [output.token_ids for output in alone]
    assert_close(outputs["same"][0].embedding, reference[0])
    engine.add("after", prompt_of([*token_ids, 7, 8]), talks)
    assert run(engine)["after"][0].num_cached_tokens >= 64


def test_a_preempted_request_has_each_prompt_token_once(folder, token_ids, reference):
    """Sixteen blocks for two rows that need nine each; the younger one is preempted after its first tokens."""
    engine = make_engine(folder, cache_max_entry_count=16, cache_block_seq_len=16)
    params = SamplingParams(max_tokens=40, prompt_logprobs=0, temperature=0, ignore_eos=True)
    engine.add("a", prompt_of(token_ids), params)
    engine.add("b", prompt_of(token_ids[::-1]), params)

    outputs = run(engine)

    assert engine.scheduler.num_preemptions > 0
    for name in ("a", "b"):
        [logprobs] = [output.prompt_logprobs for output in outputs[name] if output.prompt_logprobs is not None]
        assert len(logprobs) == NUM_TOKENS - 1
    engine.close()


def test_a_prompt_that_is_only_read_may_fill_the_window(engine, token_ids):
    engine.add("fits", prompt_of([5] * 256), POOLS)
    with pytest.raises(PromptTooLongError):
        engine.add("does not", prompt_of([5] * 257), POOLS)

    assert len(run(engine)["fits"][0].embedding) == 64


def test_an_abort_in_the_middle_of_a_prompt_forgets_what_was_read(folder, token_ids):
    engine = make_engine(folder, max_prefill_token_num=16)
    engine.add("request", prompt_of(token_ids), POOLS)
    engine.step()
    assert engine._readings

    engine.abort("request")

    assert not engine._readings
    engine.close()
