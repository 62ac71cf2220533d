"""A model of SmolVLM-256M's shape with random weights, for benchmarks: its speed is that of the real one, its answers are not.

Tower: SigLIP-B/16 at 512 pixels (12 layers), pixel shuffle 4, so 64 tokens per picture. Language model: SmolLM2-135M's shape, with the
embedded model's tokenizer. Writes a folder without weights, to be served with `--load-format dummy`.
"""

import vision  # noqa: F401  first: it makes torchvision, and so transformers, importable

# isort: split
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, Idefics3ImageProcessor, Idefics3Processor, PreTrainedTokenizerFast

from vlm_server.embedded import embedded_model_folder

SIDE_PX = 512
TOKENS_PER_PICTURE = 64
VISION = {
    "model_type": "idefics3_vision",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": SIDE_PX,
    "patch_size": 16,
}
PICTURE_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_smolvlm_shape(folder: Path) -> Path:
    """Config, tokenizer, processor and template, in `folder`, which is returned."""
    embedded = embedded_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_special_tokens({"additional_special_tokens": list(PICTURE_TOKENS)})
    text = AutoConfig.from_pretrained(embedded).get_text_config()
    config = AutoConfig.for_model(
        "idefics3",
        vision_config=VISION,
        text_config=text.to_dict() | {"vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=4,
    )
    config.architectures = ["Idefics3ForConditionalGeneration"]
    config.save_pretrained(folder)
    edge = {"longest_edge": SIDE_PX}
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size=edge, max_image_size=edge), tokenizer, image_seq_len=TOKENS_PER_PICTURE, chat_template=TEMPLATE
    )
    processor.save_pretrained(folder)
    return folder
