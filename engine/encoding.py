"""Pictures become embeddings beside the decode steps: batches across requests, slices of layers, and a cache by content hash.

The vision encoder runs as a greenlet, which goes back to its caller before an operator of the tower once its time is up: a picture that
takes a second costs the running rows a bounded wait per step. A greenlet and not a thread, since on CPU each thread that calls operators
has a team of computing threads of its own: with more of these than cores all of them wait asleep, and decode steps took twice the time.
"""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn

from engine.request import ImageInput
from engine.slices import Slices
from vision.encoder import VisionEncoder

logger = logging.getLogger(__name__)

MAX_BATCH_TOKENS = 2048  # image tokens encoded together; one picture may have more


class EmbeddingCache:
    """Embeddings by content hash, least recently used first out. Pinned ones stay even over the budget."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self.tensors: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def is_over_limit(self) -> bool:
        return self.num_bytes > self.limit_bytes

    def add(self, content_hash: bytes, embedding: Tensor) -> None:
        self.tensors[content_hash] = embedding
        self.num_bytes += embedding.nbytes

    def touch(self, content_hash: bytes) -> bool:
        """Whether it is here; if so it is now the most recently used."""
        if content_hash not in self.tensors:
            return False
        self.tensors.move_to_end(content_hash)
        return True

    def discard(self, content_hash: bytes) -> None:
        if content_hash in self.tensors:
            self.num_bytes -= self.tensors.pop(content_hash).nbytes

    def shrink(self, pinned: set[bytes]) -> list[bytes]:
        """Forget unpinned embeddings until the budget is kept; the hashes forgotten."""
        forgotten = []
        for content_hash in list(self.tensors):
            if not self.is_over_limit:
                break
            if content_hash not in pinned:
                self.num_bytes -= self.tensors.pop(content_hash).nbytes
                forgotten.append(content_hash)
        return forgotten


class Encoding:
    """One batch of pictures on its way through the encoder."""

    def __init__(
        self,
        encoder: VisionEncoder,
        images: Sequence[ImageInput],
        device: torch.device,
        *,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.images = tuple(images)
        self.result: list[Tensor] | None = None
        self.error: Exception | None = None
        self._encoder = encoder
        self._device = device
        self._now_s = now_s
        self._slices = Slices()
        self._work = greenlet(self._encode_all)

    def __contains__(self, image: ImageInput) -> bool:
        return any(image.content_hash == other.content_hash for other in self.images)

    @property
    def is_done(self) -> bool:
        return self.result is not None or self.error is not None

    def run(self, budget_s: float) -> None:
        """Compute for about `budget_s`: what one call takes too long, or leaves, the next ones have less or more."""
        if self._slices.begin(budget_s, self._now_s()):
            with torch.inference_mode():  # the thread's, so it has to be as the work left it whenever that goes on
                self._work.switch()
            self._slices.end(self._now_s())

    def cancel(self) -> None:
        """Give up what is left."""
        with torch.inference_mode():
            self._work.throw(GreenletExit)

    def _encode_all(self) -> None:
        hooks = [module.register_forward_pre_hook(partial(self._pause, place)) for place, module in _pause_places(self._encoder.layers)]
        try:
            self.result = self._encode()
        except Exception as error:  # one picture's batch fails, not the engine
            logger.exception("the vision encoder failed")
            self.error = error.with_traceback(None)  # whose frames hold the batch's tensors, and this
        finally:
            for hook in hooks:
                hook.remove()

    def _encode(self) -> list[Tensor]:
        arrays = [{name: torch.from_numpy(array.numpy()).to(self._device) for name, array in image.arrays.items()} for image in self.images]
        embeddings = self._encoder.encode(arrays)
        for image, embedding in zip(self.images, embeddings, strict=True):
            if embedding.shape[0] != image.num_tokens:
                raise ValueError(f"the encoder gave {embedding.shape[0]} tokens for a picture of {image.num_tokens}")
        return [embedding.clone() for embedding in embeddings]  # a view would keep its whole batch alive

    def _pause(self, place: str, module: nn.Module, inputs: object) -> None:
        if not self._slices.passes(place, self._now_s()):
            caller = self._work.parent
            assert caller is not None
            caller.switch()
            self._slices.resume(self._now_s())


def _pause_places(layers: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every operator of every layer, under a name that is the same in all layers; between two at most an attention's part computes."""
    for layer in layers:
        for name, module in layer.named_modules():
            if next(module.children(), None) is None:
                yield name, module


def choose_batch(encoder: VisionEncoder, needed: Sequence[ImageInput], *, max_pixels: int | None = None) -> list[ImageInput]:
    """The first picture and those behind it of the same shape, as many as the batch takes.

    max_pixels: of all of them together, where a larger batch is not faster and only keeps its first pictures waiting.
    """
    key = encoder.batch_key(needed[0].arrays)
    chosen = [image for image in needed if encoder.batch_key(image.arrays) == key]
    tokens = accumulate(image.num_tokens for image in chosen)
    pixels = accumulate(_num_pixels(image) for image in chosen)
    fits = (
        num_tokens <= MAX_BATCH_TOKENS and (max_pixels is None or num_pixels <= max_pixels)
        for num_tokens, num_pixels in zip(tokens, pixels, strict=True)
    )
    return [image for image, is_within in zip(chosen, fits, strict=True) if is_within] or chosen[:1]


def _num_pixels(image: ImageInput) -> int:
    """Of all tiles, or of all patches."""
    return math.prod(image.arrays["pixel_values"].shape) // 3
