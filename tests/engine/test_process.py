"""What the engine process makes of messages, before the engine sees them."""

import gc
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.channel import Channel
from engine.config import EngineConfig
from engine.core import Engine
from engine.messages import Add, Announce, FromEngine, Outputs, Rejected, ToEngine
from engine.process import EngineLoop
from engine.request import FinishReason, ImageInput, Plan, Prompt, SamplingParams
from engine.workers import EXIT_TIMEOUT_S, RankDeadError
from tests.engine.fake_encoder import fake_image
from tests.tiny_models import write_tiny
from vision.shared_array import SharedArray

LOST = ImageInput(b"lost", 4, {"pixel_values": SharedArray(-1, (1, 3, 2, 2), "uint8")})


class TakingEngine:
    """Keeps what it is given."""

    has_work = False

    def __init__(self) -> None:
        self.prompts: dict[str, Prompt] = {}
        self.announced: list[ImageInput] = []
        self.encoding: ImageInput | None = None

    def add(self, request_id: str, prompt: Prompt, params: SamplingParams) -> None:
        self.prompts[request_id] = prompt

    def announce(self, owner: str, image: ImageInput) -> None:
        self.announced.append(image)

    def drop_unwanted_encoding(self) -> None:
        self.encoding = None


class Process:
    """A loop with an engine, and the server's ends of its channels."""

    def __init__(self) -> None:
        (ours, inbox), (outbox, theirs) = socket.socketpair(), socket.socketpair()
        self.channels = Channel(ours, ToEngine), Channel(inbox, ToEngine), Channel(outbox, FromEngine), Channel(theirs, FromEngine)
        self.to_engine, self.from_engine = self.channels[0], self.channels[3]
        self.engine = TakingEngine()
        self.loop = EngineLoop(self.engine, self.channels[1], self.channels[2])  # type: ignore[arg-type]

    def tell(self, message: object) -> None:
        self.to_engine.send(message)
        received = self.channels[1].receive(5.0)
        assert received is not None
        self.loop._handle(received)


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process()
    yield process
    for channel in process.channels:
        channel.close()


def add(name: str, *images: ImageInput) -> Add:
    return Add(name, Prompt(token_ids=(5,), cache_keys=(5,), images=images), SamplingParams())


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_pictures_that_several_requests_bring_are_held_once_and_given_back_with_the_last(process: Process) -> None:
    images = fake_image(1), fake_image(2)
    gc.collect()  # what tests before this one left
    before = num_descriptors()

    process.tell(Announce("a prompt", images[0]))
    for number in range(10):
        process.tell(add(f"answer {number}", *images))

    assert num_descriptors() == before + 2
    assert process.engine.prompts["answer 9"].images[0] is process.engine.announced[0]
    process.engine.prompts.clear()
    assert num_descriptors() == before + 1
    process.engine.announced.clear()
    assert num_descriptors() == before


def test_a_request_whose_pictures_found_no_descriptors_is_rejected_and_the_engine_goes_on(process: Process) -> None:
    process.loop._handle(add("lost", fake_image(1), LOST))
    process.loop._handle(Announce("a prompt", LOST))
    process.tell(add("next", fake_image(2)))

    rejected = process.from_engine.receive(5.0)
    assert isinstance(rejected, Rejected)
    assert (rejected.request_id, rejected.kind) == ("lost", "QueueFullError")
    assert "file descriptors" in rejected.message
    assert list(process.engine.prompts) == ["next"]
    assert process.engine.announced == []


def test_a_request_whose_pictures_found_no_descriptors_ends_the_encoding_that_was_announced_for_it(process: Process) -> None:
    process.engine.encoding = fake_image(1)
    process.tell(add("another", fake_image(2)))
    assert process.engine.encoding is not None

    process.loop._handle(add("lost", fake_image(1), LOST))

    assert process.engine.encoding is None


def test_a_picture_that_was_lost_is_taken_from_a_request_that_has_it(process: Process) -> None:
    there = fake_image(1)
    process.tell(add("first", there))

    process.loop._handle(add("second", ImageInput(there.content_hash, there.num_tokens, LOST.arrays)))

    first, second = process.engine.prompts.values()
    assert second.images[0] is first.images[0]


@pytest.mark.full
def test_an_engine_of_two_ranks_ends_at_once_where_one_runs_out_of_memory(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one waits within a layer, for a sum that would be paired with one of the next step."""
    folder = write_tiny("llama", tmp_path)
    config = EngineConfig(model_folder=str(folder), device="cpu", num_threads=1, tp=2, session_len=128, cache_max_entry_count=64)
    engine = Engine(config.resolve(json.loads((folder / "config.json").read_text())))
    layer = engine.runner.decoder.layers[1]
    forward = layer.mlp.forward  # type: ignore[union-attr]

    def short_of_memory(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[0] > 30:
            raise torch.OutOfMemoryError
        return forward(hidden)  # type: ignore[no-any-return]

    monkeypatch.setattr(layer.mlp, "forward", short_of_memory)
    for name, num_tokens in (("small", 3), ("large", 60)):
        token_ids = tuple(range(40, 40 + num_tokens))
        process.to_engine.send(Add(name, Prompt(token_ids=token_ids, cache_keys=token_ids), SamplingParams(max_tokens=2)))
    started_s = time.monotonic()

    with pytest.raises(RankDeadError, match="out of device memory"):
        EngineLoop(engine, *process.channels[1:3]).run()

    sent = process.from_engine.receive(5.0)
    assert isinstance(sent, Outputs)
    assert [(output.request_id, output.finish_reason) for output in sent.outputs] == [("large", FinishReason.ERROR)]
    assert "--max-prefill-token-num" in str(sent.outputs[0].error)
    with pytest.raises(RankDeadError):
        engine.ranks.execute(Plan(), {})
    engine.close()
    assert time.monotonic() - started_s < EXIT_TIMEOUT_S
