"""`/v1/embeddings` of texts and pictures over HTTP: the normalised mean of the reference's last hidden states."""

from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from tests.end_to_end.test_families_served import SIZE, png
from tests.image_fixtures import picture, reference_model, reference_processor, tiny_folder
from tests.server_process import data_url, server_process
from tests.tiny_models import image_model_names
from vision.families import load_family

TOLERANCE = 1e-4
TEXT = "A red circle is left of the blue square."


@pytest.mark.full
@pytest.mark.parametrize("name", image_model_names())
def test_embeddings_of_texts_and_pictures_are_the_references(name: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": TEXT}]
    with server_process(tiny_folder(name), "--session-len", "1024") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        first = client.embeddings.create(model=model, input=[TEXT, parts])  # type: ignore[list-item]
        again = client.embeddings.create(model=model, input=[TEXT, parts])  # type: ignore[list-item]

    placeholder = load_family(tiny_folder(name)).placeholder
    theirs = [reference(name, TEXT, None), reference(name, placeholder + TEXT, Image.fromarray(picture(SIZE)))]
    for answer in (first, again):
        for entry, expected in zip(answer.data, theirs, strict=True):
            np.testing.assert_allclose(entry.embedding, expected, atol=TOLERANCE)


def reference(name: str, text: str, image: Image.Image | None) -> np.ndarray:
    pictures: dict[str, Any] = {} if image is None else {"images": [image]}
    inputs = reference_processor(name)(text=[text], return_tensors="pt", **pictures)
    model = reference_model(name)
    with torch.inference_mode():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    return torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
