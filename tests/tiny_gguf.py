"""A GGUF file of a tiny Llama: its tokenizer and, where a model is given, its weights in llama.cpp's layout."""

import json
from pathlib import Path

import gguf
import numpy as np
from transformers import LlamaForCausalLM

from vlm_server.tokenizer import TextTokenizer

TEMPLATE = "gguf: {{ messages[0]['content'] }}"


def write_gguf(file: Path, tokenizer: TextTokenizer, llama: LlamaForCausalLM | None = None) -> None:
    """Metadata of a Llama with the byte-level tokenizer in it."""
    config = llama.config if llama else None
    model = json.loads(tokenizer.reference.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.reference.get_vocab().items(), key=lambda item: item[1])]
    special = set(tokenizer.reference.all_special_tokens)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(config.intermediate_size if config else 96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps if config else 1e-5)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"] if config else 10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(TEMPLATE)
    for name, tensor in _tensors(llama).items() if llama else ():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _tensors(llama: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """float32, by GGUF's names; rows of queries and keys in llama.cpp's order, which pairs neighbours where the reference pairs halves."""
    source = {name: tensor.numpy() for name, tensor in llama.state_dict().items()}
    tensors = {
        "token_embd.weight": source["model.embed_tokens.weight"],
        "output_norm.weight": source["model.norm.weight"],
        "output.weight": source["lm_head.weight"],
    }
    heads = {"attn_q": llama.config.num_attention_heads, "attn_k": llama.config.num_key_value_heads}
    for layer in range(llama.config.num_hidden_layers):
        for theirs, ours in _NAMES.items():
            tensor = source[f"model.layers.{layer}.{theirs}.weight"]
            if ours in heads:
                tensor = tensor.reshape(heads[ours], 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
            tensors[f"blk.{layer}.{ours}.weight"] = np.ascontiguousarray(tensor)
    return tensors
