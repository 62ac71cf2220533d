"""`num_beams` over HTTP: the reference's beam search, for texts and for pictures."""

import openai
import pytest
import torch
from PIL import Image

from tests.end_to_end.test_families_served import NUM_NEW_TOKENS, QUESTION, SIZE, messages, png
from tests.image_fixtures import picture, reference_model, reference_processor, tiny_folder
from tests.server_process import data_url, server_process
from tests.tiny_models import image_model_names


@pytest.mark.full
@pytest.mark.parametrize("name", image_model_names())
def test_one_two_and_four_beams_give_the_references_answer(name: str) -> None:
    picture_part = {"type": "image_url", "image_url": {"url": data_url(png())}}
    ours = {}
    with server_process(tiny_folder(name), "--session-len", "1024") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        for kind, content in (("text", [{"type": "text", "text": QUESTION}]), ("picture", messages(picture_part)[0]["content"])):
            for num_beams in (1, 2, 4):
                answer = client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": content}],
                    max_tokens=NUM_NEW_TOKENS,
                    extra_body={"num_beams": num_beams, "do_sample": False},
                )
                ours[kind, num_beams] = str(answer.choices[0].message.content).rstrip("\ufffd")

    assert ours == {(kind, beams): reference(name, kind, beams) for kind in ("text", "picture") for beams in (1, 2, 4)}


def reference(name: str, kind: str, num_beams: int) -> str:
    image = [{"type": "image", "image": Image.fromarray(picture(SIZE))}] if kind == "picture" else []
    processor = reference_processor(name)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*image, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        ids = reference_model(name).generate(**inputs, num_beams=num_beams, do_sample=False, max_new_tokens=NUM_NEW_TOKENS)
    text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text.rstrip("\ufffd")  # we end before half a character
