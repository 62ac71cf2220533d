"""A GGUF file with a tokenizer and no weights."""

import json
from pathlib import Path

import gguf

from vlm_server.tokenizer import TextTokenizer

TEMPLATE = "gguf: {{ messages[0]['content'] }}"


def write_gguf(file: Path, tokenizer: TextTokenizer) -> None:
    """Metadata of a Llama with the byte-level tokenizer in it, and no weights."""
    model = json.loads(tokenizer.reference.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.reference.get_vocab().items(), key=lambda item: item[1])]
    special = set(tokenizer.reference.all_special_tokens)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
