"""What one API key's picture leaves behind for another key: all work on a picture is counted, before and after another sent it."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.request import SamplingParams
from tests.image_fixtures import tiny_folder
from tests.vision.picture_server import PictureServer, body
from tests.vision.pictures import png
from vision.config import VisionConfig
from vision.service import VisionService
from vlm_server.pipeline import Pipeline

FOLDER = tiny_folder("llava")
NOTHING = {"downloads": 0, "decodes": 0, "preprocessings": 0, "encodings": 0}


@dataclass
class Stack:
    """All that caches anything, without HTTP before it."""

    origin: PictureServer
    vision: VisionService
    engine: Engine

    def counts(self) -> dict[str, int]:
        stages, engine = self.vision.stats().num_done, self.engine.stats()
        return {
            "downloads": len(self.origin.requests),
            "decodes": stages["decode"],
            "preprocessings": stages["preprocess"],
            "encodings": engine.num_images_encoded,
            "computed tokens": engine.num_prompt_tokens - engine.num_cached_prompt_tokens,
        }

    async def work(self, pipeline: Pipeline, tenant: str) -> dict[str, int]:
        """What the same chat costs this tenant now, until its first token."""
        before = self.counts()
        picture = {"type": "image_url", "image_url": {"url": self.origin.url("/kept")}}
        content: list[dict[str, Any]] = [{"type": "text", "text": "Look at this one: "}, picture]
        prompt = await pipeline.chat_prompt([{"role": "user", "content": content}], tenant=tenant)
        self.engine.add(f"of {tenant}", prompt, SamplingParams(max_tokens=1, temperature=0))
        while self.engine.has_work:
            self.engine.step()
        return {name: count - before[name] for name, count in self.counts().items()}


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    origin = PictureServer()
    origin.pages["/kept"] = body(png(40, 30), Cache_Control="max-age=3600")
    await origin.open()
    vision = VisionService(VisionConfig(allow_private_media=("127.0.0.0/8",), num_decode_workers=1), model_folder=str(FOLDER))
    await vision.open()
    config = EngineConfig(model_folder=str(FOLDER), device="cpu", session_len=256, cache_block_seq_len=4)
    engine = Engine(config.resolve(json.loads((FOLDER / "config.json").read_text())))
    yield Stack(origin, vision, engine)
    engine.close()
    await vision.close()
    await origin.close()


@pytest.mark.full
async def test_what_one_key_sent_costs_another_key_as_much_as_if_nobody_had(stack: Stack) -> None:
    apart = Pipeline.load(FOLDER, images=stack.vision)

    first = await stack.work(apart, "key A")
    second = await stack.work(apart, "key B")
    again = await stack.work(apart, "key B")

    assert first == {"downloads": 1, "decodes": 1, "preprocessings": 1, "encodings": 1, "computed tokens": first["computed tokens"]}
    assert second == first
    assert again == NOTHING | {"computed tokens": again["computed tokens"]}
    assert again["computed tokens"] <= 4
    apart.close()


@pytest.mark.full
async def test_keys_that_share_caches_find_what_another_left(stack: Stack) -> None:
    shared = Pipeline.load(FOLDER, images=stack.vision, shares_caches=True)

    first = await stack.work(shared, "key A")
    second = await stack.work(shared, "key B")

    assert first["downloads"] == first["encodings"] == 1
    assert second == NOTHING | {"computed tokens": second["computed tokens"]}
    assert second["computed tokens"] <= 4
    shared.close()
