"""The same decoder from other files: GGUF, and random weights from a config alone."""

import shutil

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.equality.harness import RecordingEngine, assert_equal, reference_answer
from tests.equality.test_text_models import random_prompt
from tests.tiny_gguf import write_gguf
from tests.tiny_models import write_tiny
from vlm_server.tokenizer import TextTokenizer, load_tokenizer

NUM_NEW_TOKENS = 32


def answers_of(model, prompts, end_ids):
    inputs = [{"input_ids": torch.tensor([prompt.token_ids])} for prompt in prompts]
    return [reference_answer(model.eval(), each, num_new_tokens=NUM_NEW_TOKENS, eos_token_ids=end_ids) for each in inputs]


def test_a_gguf_file_gives_the_tokens_of_the_checkpoint_that_it_was_made_from(tmp_path, num_prompts):
    folder = write_tiny("llama", tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    file = tmp_path / "llama.gguf"
    write_gguf(file, TextTokenizer(load_tokenizer(folder)), model)
    prompts = [random_prompt(folder, seed) for seed in range(num_prompts)]

    with RecordingEngine(file, session_len=256) as engine:
        end_ids = engine.engine.runner.eos_token_ids
        answers = engine.answers(prompts, num_new_tokens=NUM_NEW_TOKENS)

    assert_equal(answers, answers_of(model, prompts, end_ids))


def test_dummy_weights_are_the_references_own_random_initialisation(tmp_path, num_prompts):
    folder = write_tiny("qwen3", tmp_path / "qwen3")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    prompts = [random_prompt(folder, seed) for seed in range(num_prompts)]

    with RecordingEngine(bare, load_format="dummy", seed=5) as engine:
        end_ids = engine.engine.runner.eos_token_ids
        answers = engine.answers(prompts, num_new_tokens=NUM_NEW_TOKENS)

    assert_equal(answers, answers_of(model, prompts, end_ids))
