"""`--lora-model` with a larger vocabulary and a tokenizer of its own: the answer is that of the model changed by hand."""

import json

import openai
import pytest
import torch

from tests.engine.test_lora import ALPHA, RANK, changed_model, write_adapter
from tests.server_process import server_process
from tests.tiny_models import write_tiny
from vlm_server.tokenizer import load_tokenizer

PROMPT = "A red circle <new-3> is left of the <new-1> square."


@pytest.mark.full
def test_an_adapter_with_new_tokens_is_served_merged(tmp_path):
    folder = write_tiny("llama", tmp_path / "base")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<new-{number}>" for number in range(11)])
    model, tensors = changed_model(folder, vocab_size=len(tokenizer), scale=ALPHA / RANK)
    lora = write_adapter(tmp_path / "lora", tensors)
    tokenizer.save_pretrained(lora)

    with server_process(folder, "--lora_model", str(lora)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(
            model=str(folder), prompt=PROMPT, max_tokens=16, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
        )

    inputs = tokenizer(PROMPT, return_tensors="pt")
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        ids = model.generate(inputs["input_ids"], max_new_tokens=16, do_sample=False, pad_token_id=0)
    expected = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert len(json.loads((lora / "tokenizer.json").read_text())["added_tokens"]) >= 11
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")
