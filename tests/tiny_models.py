"""Tiny random checkpoints in the standard layout: two layers, 64 wide, float32, seeded.

`write_tiny("llama", folder)` leaves config, safetensors, tokenizer, chat template and generation config, so that the folder loads in
`AutoModelForCausalLM` (text) or `AutoModelForImageTextToText` and `AutoProcessor` (image and text) without a network.
The weights are scaled so that every layer and every head changes the logits.
"""

import vision  # noqa: F401  first: it makes torchvision, and so transformers, importable

# isort: split
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, INTERMEDIATE_SIZE = 64, 2, 4, 2, 96
MAX_POSITIONS = 4096

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog. A red circle is left of the blue square.",
    "Describe the image please: there are three small green triangles and one large yellow star at the top.",
    "user assistant system You are a helpful assistant. What is in this picture? How many? Answer in one word, 12345.",
    "def main(): return {'json': [1, 2, 3], \"key\": null}\n\n    你好！有什么我可以帮你的吗？ 写一首诗歌 émile naïve",
)


def write_tiny(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Writes the checkpoint called `name` into `folder` (made if need be), and returns the folder.

    `internlm` and `internlm2` also leave the Llama checkpoint with the same weights in `folder / "as_llama"`.
    """
    writers = {**_TEXT_WRITERS, **_image_writers()}
    folder.mkdir(parents=True, exist_ok=True)
    writers[name](folder, seed + zlib.crc32(name.encode()) % 1000)
    return folder


def text_model_names() -> tuple[str, ...]:
    return tuple(_TEXT_WRITERS)


def image_model_names() -> tuple[str, ...]:
    return tuple(_image_writers())


def make_tokenizer(special_tokens: tuple[str, ...], **roles: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges; `roles` name the special tokens, e.g. eos_token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(special_tokens),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, **roles)


def randomise(model: nn.Module, *, seed: int) -> None:
    """Draws every parameter: matrices by their fan-in, vectors around what they were initialised to.

    Embeddings are small, so that tied ones do not only repeat their input.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(noise, alpha=0.1)
            elif id(parameter) in embeddings:
                parameter.copy_(noise * 0.1)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)


def token_ids_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The config's fields that name tokens."""
    roles = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {role: token_id for role, token_id in roles.items() if token_id is not None}


def llama_shape(**changes: Any) -> dict[str, Any]:
    """The fields that Llama-shaped configs share."""
    return {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "dtype": "float32",
        **changes,
    }


def _chatml_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _text_writer(model_type: str, **fields: Any) -> Callable[[Path, int], None]:
    def write(folder: Path, seed: int) -> None:
        tokenizer = _chatml_tokenizer()
        config = AutoConfig.for_model(model_type, **{**llama_shape(vocab_size=len(tokenizer)), **token_ids_of(tokenizer), **fields})
        model = _random_text_model(config, seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write


def _random_text_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float()
    randomise(model, seed=seed)
    model.generation_config.eos_token_id = config.eos_token_id
    return model


def _write_internlm2(folder: Path, seed: int) -> None:
    """A tiny Llama in InternLM2's layout, with its sentencepiece tokenizer and the remote classes that its files name."""
    vocab_size = _write_internlm2_tokenizer(folder)
    config = AutoConfig.for_model(
        "llama",
        **llama_shape(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=2, rms_norm_eps=1e-5),
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1_000_000.0, "factor": 2.0},
    )
    llama = _random_text_model(config, seed)
    llama.save_pretrained(folder / "as_llama")
    _save_as_internlm2(llama, folder)
    remote = {name: f"{file}.{cls}" for name, file, cls in _INTERNLM2_REMOTE_CLASSES}
    fields = llama_shape(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=2, rms_norm_eps=1e-5)
    fields.pop("dtype")
    _write_json(
        folder / "config.json",
        {
            **fields,
            "architectures": ["InternLM2ForCausalLM"],
            "attn_implementation": "eager",
            "auto_map": remote,
            "bias": False,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "model_type": "internlm2",
            "pretraining_tp": 1,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_cache": True,
        },
    )
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, vocab_size - 2], "pad_token_id": 2})


def _write_internlm(folder: Path, seed: int) -> None:
    """The first InternLM: a tiny Llama whose attention has biases, under a config that names remote classes."""
    vocab_size = _write_internlm2_tokenizer(folder)
    shape = llama_shape(vocab_size=vocab_size, num_key_value_heads=NUM_HEADS, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    llama = _random_text_model(AutoConfig.for_model("llama", **shape, attention_bias=True), seed)
    llama.save_pretrained(folder / "as_llama")
    llama.save_pretrained(folder)
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    fields = {name: getattr(llama.config, name) for name in (*kept, "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")}
    remote = {"AutoConfig": "configuration_internlm.InternLMConfig", "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"}
    _write_json(
        folder / "config.json",
        {
            **fields,
            "architectures": ["InternLMForCausalLM"],
            "auto_map": remote,
            "bias": True,
            "hidden_act": "silu",
            "model_type": "internlm",
            "rotary": {"base": 10000, "type": "dynamic"},
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
        },
    )


_INTERNLM2_REMOTE_CLASSES = (
    ("AutoConfig", "configuration_internlm2", "InternLM2Config"),
    ("AutoModelForCausalLM", "modeling_internlm2", "InternLM2ForCausalLM"),
    ("AutoModel", "modeling_internlm2", "InternLM2ForCausalLM"),
)
_INTERNLM2_SPECIAL_TOKENS = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")


def _save_as_internlm2(llama: PreTrainedModel, folder: Path) -> None:
    from safetensors.torch import save_file

    source = llama.state_dict()
    tensors = {
        "model.tok_embeddings.weight": source["model.embed_tokens.weight"],
        "model.norm.weight": source["model.norm.weight"],
        "output.weight": source["lm_head.weight"],
    }
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{new}.weight": source[f"{prefix}{old}.weight"] for old, new in names.items()}
        projections = (source[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv")
        tensors[f"{prefix}attention.wqkv.weight"] = _packed_qkv(*projections)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def _packed_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Per KV head: its query heads, then its key, then its value."""
    head_size = HIDDEN_SIZE // NUM_HEADS
    groups = (part.view(NUM_KV_HEADS, -1, head_size, HIDDEN_SIZE) for part in (query, key, value))
    return torch.cat(tuple(groups), dim=1).reshape(-1, HIDDEN_SIZE)


def _write_internlm2_tokenizer(folder: Path) -> int:
    """`tokenizer.model` with byte fallback, whose last pieces the config replaces by special tokens. Returns the vocabulary's size."""
    import sentencepiece

    unused = [f"[UNUSED_TOKEN_{number}]" for number in range(len(_INTERNLM2_SPECIAL_TOKENS))]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 4),
            model_writer=file,
            model_type="bpe",
            vocab_size=440,
            byte_fallback=True,
            character_coverage=0.98,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            allow_whitespace_only_pieces=True,
            split_digits=True,
            minloglevel=2,
        )
    pieces = _append_pieces(folder / "tokenizer.model", unused)
    first = pieces - len(unused)
    special = {0: "<unk>", 1: "<s>", 2: "</s>"} | {first + i: token for i, token in enumerate(_INTERNLM2_SPECIAL_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {str(number): {"content": token, **flags} for number, token in special.items()},
            "additional_special_tokens": list(reversed(_INTERNLM2_SPECIAL_TOKENS)),
            "auto_map": {
                "AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", "tokenization_internlm2_fast.InternLM2TokenizerFast"]
            },
            "bos_token": "<s>",
            "chat_template": "{{ bos_token }}" + CHATML,
            "clean_up_tokenization_spaces": False,
            "decode_with_prefix_space": False,
            "eos_token": "</s>",
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "</s>",
            "sp_model_kwargs": None,
            "tokenizer_class": "InternLM2Tokenizer",
            "unk_token": "<unk>",
        },
    )
    return pieces


def _append_pieces(file: Path, pieces: list[str]) -> int:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    for piece in pieces:
        model.pieces.add(piece=piece, score=0.0, type=model.SentencePiece.USER_DEFINED)
    file.write_bytes(model.SerializeToString())
    return len(model.pieces)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def _image_writers() -> dict[str, Callable[[Path, int], None]]:
    from tests.tiny_image_models import IMAGE_WRITERS  # which builds on this file

    return IMAGE_WRITERS


_TEXT_WRITERS: dict[str, Callable[[Path, int], None]] = {
    "llama": _text_writer("llama"),
    "qwen2": _text_writer("qwen2", tie_word_embeddings=True),
    "qwen3": _text_writer("qwen3", head_dim=24),
    "mistral": _text_writer("mistral", head_dim=16, sliding_window=None),
    "internlm": _write_internlm,
    "internlm2": _write_internlm2,
    "gemma3_text": _text_writer("gemma3_text", head_dim=16, sliding_window=24, layer_types=["sliding_attention", "full_attention"]),
    "gpt_neox": _text_writer("gpt_neox", rotary_pct=0.25, hidden_act="gelu"),
}
