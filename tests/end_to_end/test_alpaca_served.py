"""`--compat alpaca` with a real engine: a tiny Llama with a LoRA and its larger vocabulary answers as the model changed by hand."""

from typing import Any

import pytest
import requests
import torch

from tests.engine.test_lora import ALPHA, RANK, changed_model, write_adapter
from tests.server_process import server_process
from tests.tiny_models import write_tiny
from vlm_server.tokenizer import load_tokenizer

TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PROMPT = f"{TASK}\n\n### Instruction:\nA red circle <new-3>\n\n### Response: "
NTK = 3.0


@pytest.mark.full
def test_the_documented_line_serves_the_merged_model(tmp_path):
    folder = write_tiny("llama", tmp_path / "base")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<new-{number}>" for number in range(11)])
    changed, tensors = changed_model(folder, vocab_size=len(tokenizer), scale=ALPHA / RANK)
    lora = write_adapter(tmp_path / "lora", tensors)
    tokenizer.save_pretrained(lora)
    flags = ["--compat", "alpaca", "--base_model", str(folder), "--lora_model", str(lora), "--only_cpu", "--alpha", str(NTK)]

    with server_process(None, *flags) as server:
        chat = ask(server.url, "chat/completions", messages=[{"role": "user", "message": "A red circle <new-3>"}], **GREEDY)
        sampled = ask(server.url, "completions", prompt="A red circle", num_beams=2, max_tokens=4)
        [embedding] = ask(server.url, "embeddings", input=["A red circle", "x"])["data"]
        window = requests.get(f"{server.url}/v1/models", timeout=30).json()["data"][0]["max_model_len"]

    model = with_scaled_base(changed)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip().rstrip("\ufffd")
    assert chat["model"] == "chinese-llama-alpaca"
    assert [choice["message"]["role"] for choice in chat["choices"]] == ["user", "assistant"]
    assert chat["choices"][1]["message"]["content"] == expected
    assert set(sampled["choices"][0]) == {"index", "text"}
    assert torch.tensor(embedding["embedding"]).shape == (2, model.config.hidden_size)
    assert window == round(model.config.max_position_embeddings * (NTK / 1.1 + 1) / 2)


GREEDY = {"do_sample": False, "max_tokens": 12, "ignore_eos": True}


def ask(url: str, path: str, **fields: Any) -> Any:
    response = requests.post(f"{url}/v1/{path}", json=fields, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def with_scaled_base(model: Any) -> Any:
    """The model with the rotary frequencies of a base that NTK's factor scales."""
    dim = model.config.hidden_size // model.config.num_attention_heads
    base = model.config.rope_parameters["rope_theta"] * NTK ** (dim / (dim - 2))
    model.model.rotary_emb.inv_freq = 1.0 / base ** (torch.arange(0, dim, 2) / dim)
    model.generation_config.eos_token_id = None
    return model
