"""The server's side of preprocessing: pixels in, the encoder's inputs in shared memory out, by a pool of preprocessing workers."""

import asyncio
import os

import msgspec

from vision.budget import Budget, Reservation, places_for
from vision.config import VisionConfig
from vision.frames import Frame
from vision.image import ImageOptions, MediaError
from vision.preprocess import PreprocessInfo, PreprocessJob, PreprocessResult, PreprocessSettings
from vision.shared_array import SharedArray
from vision.workers import WorkerError, WorkerPool, WorkerTimeoutError

_HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "XDG_CACHE_HOME")


class PreprocessPool:
    """`open()` before use, which takes seconds, `close()` after."""

    def __init__(self, config: VisionConfig, settings: PreprocessSettings) -> None:
        self._timeout_s = config.preprocess_timeout_s
        self._places = Budget("pictures to be resized", places_for(config.num_preprocess_workers), wait_s=None)
        self._pool = WorkerPool(
            "vision.preprocess",
            num_workers=config.num_preprocess_workers,
            settings=msgspec.msgpack.encode(settings),
            timeout_s=config.preprocess_timeout_s,
            start_timeout_s=config.worker_start_timeout_s,
            abandon_s=config.preprocess_timeout_s,  # a new worker costs more than what is left of most jobs
            environment=_environment(),
        )

    async def open(self) -> str:
        """The processor's fingerprint: everything that changes its results. Raises WorkerError."""
        ready = await self._pool.open()
        return msgspec.msgpack.decode(ready.body, type=PreprocessInfo).fingerprint

    async def close(self) -> None:
        await self._pool.close()

    @property
    def num_idle(self) -> int:
        return self._pool.num_idle

    @property
    def process_ids(self) -> list[int]:
        return self._pool.process_ids

    async def process(
        self, pixels: SharedArray, options: ImageOptions, *, owner: str = "", max_tokens: int | None = None
    ) -> tuple[PreprocessResult, dict[str, SharedArray]]:
        """Takes over `pixels`, `(height, width, 3)` uint8; the arrays are the caller's. Raises MediaError, also for over `max_tokens`.

        Raises NoDescriptorsError where this process has none left for the arrays.
        owner: whose others it waits behind, and hardly behind those of others.
        """
        reply = await self._call(PreprocessJob(options, max_tokens=max_tokens), {"pixels": pixels}, owner)
        return msgspec.msgpack.decode(reply.body, type=PreprocessResult), reply.arrays

    async def measure(self, size: tuple[int, int], options: ImageOptions, *, owner: str = "") -> PreprocessResult:
        """What `process` says of a picture of `size` = (height, width). owner: as for `process`. Raises MediaError."""
        reply = await self._call(PreprocessJob(options, size), {}, owner)
        return msgspec.msgpack.decode(reply.body, type=PreprocessResult)

    async def _call(self, job: PreprocessJob, arrays: dict[str, SharedArray], owner: str) -> Frame:
        frame = Frame(msgspec.msgpack.encode(job), arrays)
        try:
            with await self._place(frame, owner):
                return await self._pool.call(frame)
        except WorkerTimeoutError:
            raise MediaError("image_preprocess_failed", f"the picture takes longer than {self._timeout_s:g} s to resize") from None
        except WorkerError:
            raise MediaError("image_preprocess_failed", "the image processor broke down; try again", status=503) from None

    async def _place(self, frame: Frame, owner: str) -> Reservation:
        """For one job; closes the frame of one that is not waited for any more."""
        try:
            return await self._places.reserve(1, owner)
        except asyncio.CancelledError:
            frame.close()
            raise


def _environment() -> dict[str, str]:
    """Where remote code and checkpoints lie, but no tokens: all is local by now. No device is for this worker."""
    found = {name: os.environ[name] for name in _HUB_VARIABLES if name in os.environ}
    return found | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
