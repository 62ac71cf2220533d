"""The server's side of decoding: pictures' bytes in, pixels in shared memory out, by a pool of decode workers."""

import asyncio
from typing import Annotated

import msgspec
import numpy as np

from vision.budget import Budget, places_for
from vision.config import VisionConfig
from vision.decode import MEASURE, DecodeLimits
from vision.frames import Frame
from vision.image import MediaError
from vision.shared_array import SharedArray
from vision.workers import WorkerError, WorkerKilledError, WorkerPool, WorkerTimeoutError

_IN_PLACE_BYTES = 256 << 10  # copied in less time than a thread takes to start; more is copied beside the event loop
_ABANDON_S = 0.5  # a new decode worker is ready in less
_Side = Annotated[int, msgspec.Meta(gt=0)]


class DecodePool:
    """`open()` before use, `close()` after."""

    def __init__(self, config: VisionConfig) -> None:
        limits = DecodeLimits(config.max_picture_pixels, config.decode_memory_bytes, config.decode_timeout_s)
        self._timeout_s = config.decode_timeout_s
        self._places = Budget("pictures to be decoded", places_for(config.num_decode_workers), wait_s=None)  # copied for a worker
        self._pool = WorkerPool(
            "vision.decode",
            num_workers=config.num_decode_workers,
            settings=msgspec.msgpack.encode(limits),
            timeout_s=config.decode_timeout_s,
            start_timeout_s=config.worker_start_timeout_s,
            abandon_s=_ABANDON_S,
        )

    async def open(self) -> None:
        """Raises WorkerError."""
        await self._pool.open_confined("decode")

    async def close(self) -> None:
        await self._pool.close()

    @property
    def num_idle(self) -> int:
        return self._pool.num_idle

    @property
    def process_ids(self) -> list[int]:
        return self._pool.process_ids

    async def decode(self, data: bytes, *, owner: str = "") -> SharedArray:
        """`(height, width, 3)` uint8, the caller's. Raises MediaError: image_decode_failed, image_too_large.

        owner: whose others it waits behind, and hardly behind those of others.
        """
        pixels = SharedArray.create((0,), "uint8")
        try:
            height, width = await self._call(b"", data, owner, pixels)
        except BaseException:
            pixels.close()
            raise
        pixels.shape = (height, width, 3)  # the worker has made it as large
        return pixels

    async def measure(self, data: bytes, *, owner: str = "") -> tuple[int, int]:
        """(height, width) of the pixels that `decode` would give, from the header alone. Raises as `decode`."""
        return await self._call(MEASURE, data, owner)

    async def _call(self, job: bytes, data: bytes, owner: str, pixels: SharedArray | None = None) -> tuple[int, int]:
        """(height, width)."""
        try:
            with await self._places.reserve(1, owner):
                arrays = {"data": await _copy_of(data)}
                if pixels is not None:
                    arrays["pixels"] = pixels.duplicate()
                reply = await self._pool.call(Frame(job, arrays))
                return msgspec.msgpack.decode(reply.body, type=tuple[_Side, _Side])
        except WorkerTimeoutError:
            raise MediaError("image_decode_failed", f"the picture takes longer than the allowed {self._timeout_s:g} s to decode") from None
        except WorkerKilledError:
            raise MediaError("image_decode_failed", "the decoder was killed over and over; try again", status=503) from None
        except (WorkerError, msgspec.MsgspecError):
            raise MediaError("image_decode_failed", "the decoder broke down over the picture") from None


async def _copy_of(data: bytes) -> SharedArray:
    source = np.frombuffer(data, np.uint8)
    return SharedArray.copy_of(source) if len(data) <= _IN_PLACE_BYTES else await asyncio.to_thread(SharedArray.copy_of, source)
