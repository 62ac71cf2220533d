"""Tiny random image-text checkpoints: model, tokenizer, image processor, processor and chat template of each family."""

import vision  # noqa: F401  first: it makes torchvision, and so transformers, importable

# isort: split
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

from tests.tiny_models import llama_shape, make_tokenizer, randomise, token_ids_of

VISION_SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML_ROLES = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}

VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _write(folder: Path, config: PreTrainedConfig, processor: ProcessorMixin, seed: int) -> None:
    model = AutoModelForImageTextToText.from_config(config).float()
    randomise(model, seed=seed)
    model.generation_config.eos_token_id = config.get_text_config().eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _text_config(model_type: str, tokenizer: PreTrainedTokenizerFast, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **llama_shape(vocab_size=len(tokenizer)), **token_ids_of(tokenizer), **fields}


def _write_llava(folder: Path, seed: int) -> None:
    """A CLIP tower whose class token is dropped: 16 patches of 8 by 8 pixels."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = make_tokenizer(("<s>", "</s>", "<image>"), bos_token="<s>", eos_token="</s>", pad_token="</s>")
    config = AutoConfig.for_model(
        "llava",
        vision_config={"model_type": "clip_vision_model", **VISION_SHAPE, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
        text_config=_text_config("llama", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )
    _write(folder, config, processor, seed)


def _write_llava_next(folder: Path, seed: int) -> None:
    """Tiles of 32 by 32 pixels, 16 patches each, in grids of up to four."""
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    tokenizer = make_tokenizer(("<s>", "</s>", "<image>"), bos_token="<s>", eos_token="</s>", pad_token="</s>")
    pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    config = AutoConfig.for_model(
        "llava_next",
        vision_config={"model_type": "clip_vision_model", **VISION_SHAPE, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
        text_config=_text_config("mistral", tokenizer, sliding_window=None),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )
    _write(folder, config, processor, seed)


_IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _idefics_tokenizer() -> PreTrainedTokenizerFast:
    places = tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
    special = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places)
    return make_tokenizer(CHATML_TOKENS + special, **{**CHATML_ROLES, "bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>"})


def _write_idefics3(folder: Path, seed: int) -> None:
    """Tiles of 32 by 32 pixels in up to 3 by 3, each 16 patches that are shuffled into 4 rows of its embedding."""
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    tokenizer = _idefics_tokenizer()
    image_processor = Idefics3ImageProcessor(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=_IDEFICS_TEMPLATE)
    _write(folder, _idefics_config("idefics3", "idefics3_vision", tokenizer), processor, seed)


def _write_smolvlm(folder: Path, seed: int) -> None:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    tokenizer = _idefics_tokenizer()
    image_processor = SmolVLMImageProcessor(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    video_processor = SmolVLMVideoProcessor()
    processor = SmolVLMProcessor(image_processor, tokenizer, video_processor, image_seq_len=4, chat_template=_IDEFICS_TEMPLATE)
    _write(folder, _idefics_config("smolvlm", "smolvlm_vision", tokenizer), processor, seed)


def _idefics_config(model_type: str, vision_type: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return AutoConfig.for_model(
        model_type,
        vision_config={"model_type": vision_type, **VISION_SHAPE, "image_size": 32, "patch_size": 8},
        text_config=_text_config("llama", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )


_QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen_vl_writer(model_type: str, vision_config: dict[str, Any]) -> Callable[[Path, int], None]:
    """Patches of 4 by 4 pixels, merged by four; windows of 2 by 2 merged patches where the tower has windows."""

    def write(folder: Path, seed: int) -> None:
        import transformers

        tokenizer = make_tokenizer(CHATML_TOKENS + _QWEN_TOKENS, **CHATML_ROLES)
        ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), _QWEN_TOKENS, strict=True))
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        config = AutoConfig.for_model(
            model_type,
            vision_config={"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision_config},
            text_config=_text_config(f"{model_type}_text", tokenizer, rope_parameters=rope),
            **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
        )
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 8 * 8 * 4, "max_pixels": 8 * 8 * 60}
        processor_class = {"qwen2_vl": transformers.Qwen2VLProcessor, "qwen2_5_vl": transformers.Qwen2_5_VLProcessor}[model_type]
        processor = processor_class(
            transformers.Qwen2VLImageProcessor(**sizes), tokenizer, transformers.Qwen2VLVideoProcessor(), chat_template=_QWEN_TEMPLATE
        )
        _write(folder, config, processor, seed)

    return write


_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _write_gemma3(folder: Path, seed: int) -> None:
    """A SigLIP tower of 16 patches, pooled to 4 rows of the embedding; one sliding and one full layer."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    images = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = make_tokenizer(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *images.values()),
        pad_token="<pad>",
        eos_token="<end_of_turn>",
        bos_token="<bos>",
        extra_special_tokens=images,
    )
    ids = {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>", "image_token_index": "<image_soft_token>"}
    layer_types = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        "gemma3",
        vision_config={"model_type": "siglip_vision_model", **VISION_SHAPE, "image_size": 32, "patch_size": 8, "vision_use_head": False},
        text_config=_text_config("gemma3_text", tokenizer, head_dim=16, sliding_window=24, layer_types=layer_types),
        mm_tokens_per_image=4,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )
    image_processor = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    _write(folder, config, Gemma3Processor(image_processor, tokenizer, chat_template=_GEMMA_TEMPLATE, image_seq_length=4), seed)


IMAGE_WRITERS: dict[str, Callable[[Path, int], None]] = {
    "llava": _write_llava,
    "llava_next": _write_llava_next,
    "idefics3": _write_idefics3,
    "smolvlm": _write_smolvlm,
    "qwen2_vl": _qwen_vl_writer("qwen2_vl", {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
    "qwen2_5_vl": _qwen_vl_writer(
        "qwen2_5_vl", {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1]}
    ),
    "gemma3": _write_gemma3,
}
