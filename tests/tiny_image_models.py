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


IMAGE_WRITERS: dict[str, Callable[[Path, int], None]] = {
    "llava": _write_llava,
}
