"""A client that leaves while its picture is being encoded: a tower that is slow on purpose, with random weights from its config alone."""

import asyncio
import json
import shutil
import time
from pathlib import Path

import openai
import pytest

from tests.end_to_end.pictures import drawn
from tests.image_fixtures import tiny_folder
from tests.server_process import ServerProcess, data_url, server_process

SLOW_TOWER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 32, "num_attention_heads": 8}
GAUGES = ("vlm:num_images_waiting", "vlm:num_referenced_blocks", "vlm:num_requests_running", "vlm:num_requests_waiting")


def slow_folder(folder: Path) -> Path:
    """The tiny LLaVA's files without its weights, its tower 256 pixels wide and 32 layers deep: 1,024 patches."""
    source = tiny_folder("llava")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    config["vision_config"] |= {**SLOW_TOWER, "image_size": 256}
    config["image_seq_length"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("*processor_config.json"):
        file.write_text(_with_size(json.loads(file.read_text()), 256))
    return folder


def _with_size(settings: dict, side_px: int) -> str:
    inner = settings.get("image_processor", settings)
    inner["size"] = {"shortest_edge": side_px}
    inner["crop_size"] = {"height": side_px, "width": side_px}
    return json.dumps(settings)


@pytest.mark.full
async def test_the_encoding_stops_and_everything_is_free_within_a_second(tmp_path):
    with server_process(slow_folder(tmp_path / "slow"), "--load-format", "dummy", "--session-len", "2048") as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            await until(server, lambda: is_idle(server), seconds=60)  # the picture of /health/ready has gone through
            num_encoded = server.metric("vlm:images_encoded_total")
            model = (await client.models.list()).data[0].id
            content = [{"type": "image_url", "image_url": {"url": data_url(drawn(1, side_px=256))}}]
            asking = asyncio.create_task(
                client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], max_tokens=4)
            )
            await until(server, lambda: server.metric("vlm:num_images_waiting") == 1, seconds=20)

            asking.cancel()

            await until(server, lambda: is_idle(server), seconds=1)
            assert server.metric("vlm:images_encoded_total") == num_encoded


def is_idle(server: ServerProcess) -> bool:
    return not any(server.metric(gauge) for gauge in GAUGES)


async def until(server: ServerProcess, is_true, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(is_true):
        assert time.monotonic() < deadline, {gauge: server.metric(gauge) for gauge in GAUGES}
