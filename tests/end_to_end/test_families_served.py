"""`vlm-server serve FOLDER` with a tiny checkpoint of each kind: the answer over HTTP is the reference's, token by token."""

import io
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.equality.harness import reference_answer
from tests.image_fixtures import picture, reference_model, reference_processor, tiny_folder
from tests.server_process import data_url, server_process
from tests.tiny_models import image_model_names
from vlm_server.tokenizer import TextTokenizer, load_tokenizer

NUM_NEW_TOKENS = 24
QUESTION = "Describe the image please"
SIZE = (70, 110)
QUICK = {("llava", 1)}  # the others in the full run
SERVED = [(name, 1) for name in image_model_names()] + [("llava", 2), ("qwen2_5_vl", 2)]


@pytest.mark.parametrize(
    ("name", "tp"), [pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.full]) for pair in SERVED], ids=str
)
def test_an_image_chat_over_http_gives_the_references_tokens(name: str, tp: int) -> None:
    expected = reference_bytes(name)

    with server_process(tiny_folder(name), "--tp", str(tp), "--session-len", "1024") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0]
        answer = client.chat.completions.create(
            model=model.id,
            messages=messages({"type": "image_url", "image_url": {"url": data_url(png())}}),
            temperature=0,
            max_tokens=NUM_NEW_TOKENS,
            logprobs=True,
            extra_body={"ignore_eos": True},
        )

    tokens = answer.choices[0].logprobs.content
    assert [bytes(token.bytes or ()) for token in tokens] == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens_details.model_dump()["image_tokens"] > 0
    assert model.model_dump()["root"] == str(tiny_folder(name))


def messages(picture_part: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [picture_part, {"type": "text", "text": QUESTION}]}]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(SIZE)).save(buffer, "PNG")
    return buffer.getvalue()


def reference_bytes(name: str) -> list[bytes]:
    """The bytes of each token that the reference generates."""
    inputs = reference_processor(name).apply_chat_template(
        messages({"type": "image", "image": Image.fromarray(picture(SIZE))}),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model = reference_model(name)
    ends = model.generation_config.eos_token_id
    end_ids = ends if isinstance(ends, list) else [ends]
    answer = reference_answer(model, dict(inputs), num_new_tokens=NUM_NEW_TOKENS, eos_token_ids=end_ids)
    tokenizer = TextTokenizer(load_tokenizer(Path(tiny_folder(name))))
    return [tokenizer.token_bytes(token_id) for token_id in answer.token_ids]
