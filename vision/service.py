"""A picture's whole way in the server: URL → bytes → pixels → what the vision encoder takes, many pictures at once.

Every stage has its limit, its timing and its gauge. Knows nothing of HTTP routes, prompts or scheduling.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from vision.addresses import LookUp
from vision.cache import ByteBoundedCache
from vision.config import VisionConfig
from vision.decode_pool import DecodePool
from vision.fetcher import Fetcher
from vision.image import ImageOptions, ImageRef, MeasuredImage, MediaError, ProcessedImage
from vision.preprocess import DEFAULT_PROCESSOR, PreprocessSettings
from vision.preprocess_pool import PreprocessPool
from vision.shared_array import SharedArray
from vision.single_flight import SingleFlight
from vision.workers import WorkerError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_IN_PLACE_BYTES = 256 << 10  # hashed in less than a millisecond; more is hashed beside the event loop
STAGES = ("fetch", "decode", "preprocess")


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionStats:
    """Gauges of this moment and counters since the start."""

    is_ready: bool = False
    num_in_flight: dict[str, int] = field(default_factory=dict)  # stage → pictures
    num_done: dict[str, int] = field(default_factory=dict)  # stage → pictures, failed ones too
    time_s: dict[str, float] = field(default_factory=dict)  # stage → sum
    num_failed: dict[str, int] = field(default_factory=dict)  # MediaError.code → pictures
    num_pictures: int = 0  # asked for
    num_cache_hits: int = 0
    num_cache_misses: int = 0
    cache_bytes: int = 0


class VisionService:
    """One per server. `open()` leaves the workers starting in the background, `ready()` waits for them, `close()` ends all."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        model_folder: str,
        trust_remote_code: bool = False,
        processor: str = DEFAULT_PROCESSOR,
        look_up: LookUp | None = None,
    ) -> None:
        """`processor`: `module:class` in place of the model's own. `look_up`: host name → addresses in place of the system's resolver."""
        settings = PreprocessSettings(model_folder, trust_remote_code, processor)
        self._fetcher = Fetcher(config, look_up=look_up)
        self._decode_pool = DecodePool(config)
        self._preprocess_pool = PreprocessPool(config, settings)
        self._cache: ByteBoundedCache[tuple[str, bytes], ProcessedImage] = ByteBoundedCache(
            config.processed_cache_bytes, max_entries=config.processed_cache_pictures
        )
        self._flights: SingleFlight[tuple[str, bytes], ProcessedImage] = SingleFlight()
        self._pictures = asyncio.Semaphore(config.max_pictures_in_flight)
        self._decoded = asyncio.Semaphore(config.num_decode_workers + config.num_preprocess_workers)  # pictures held as pixels
        self._starting: asyncio.Task[str] | None = None  # its result: the processor's fingerprint
        self._clock = StageClock()
        self._num_pictures = 0
        self._num_failed: dict[str, int] = {}

    async def open(self) -> None:
        await self._fetcher.open()
        self._starting = asyncio.create_task(self._start_workers())
        self._starting.add_done_callback(_log_failure)

    async def ready(self) -> None:
        """Waits until pictures can be processed. Raises WorkerError when a worker cannot start."""
        await self._fingerprint()

    async def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await asyncio.gather(self._fetcher.close(), self._decode_pool.close(), self._preprocess_pool.close())
        self._cache.clear()

    async def load(self, refs: Sequence[ImageRef], *, tenant: str = "") -> list[ProcessedImage]:
        """The pictures in the order of `refs`, worked on side by side; their arrays are the caller's to close.

        What one tenant sent is not looked up for another. Raises MediaError with the `param` of the first picture that failed; the others
        are cancelled, as all are when the caller is.
        """
        self._num_pictures += len(refs)
        return await self._side_by_side(refs, lambda ref: self._fetch_and_process(ref, tenant))

    async def measure(self, refs: Sequence[ImageRef], *, tenant: str = "") -> list[MeasuredImage]:
        """What the pictures take of a prompt, from their headers: nothing is decoded. Raises as `load`, save for damage behind a header."""
        self._num_pictures += len(refs)
        return await self._side_by_side(refs, lambda ref: self._fetch_and_measure(ref, tenant))

    async def fetch(self, refs: Sequence[ImageRef], *, limit_bytes: int, tenant: str = "") -> list[bytes]:
        """The pictures' files as they are, for a caller who keeps them and gives them to `load` as `ImageRef.data`.

        limit_bytes: of all together. Raises as `load`.
        """
        room_bytes = limit_bytes

        async def fetch_within(ref: ImageRef) -> bytes:
            nonlocal room_bytes
            data = await self._fetch(ref, tenant, {})
            room_bytes -= len(data)
            if room_bytes < 0:
                raise MediaError("image_too_large", f"the pictures together have more than the {limit_bytes} bytes that can be kept")
            return data

        return await self._side_by_side(refs, fetch_within)

    async def try_out(self, data: bytes, options: ImageOptions, *, on_stage: Callable[[str], None]) -> ProcessedImage:
        """One picture through the workers, past caches, limits and counters: whether they work. Its arrays are the caller's to close.

        Its content hash is of nothing: what the engine has of it is never another picture's. on_stage: told each stage as it begins.
        Raises MediaError, WorkerError.
        """
        on_stage("decode")
        await self._fingerprint()
        clock, timings_s = StageClock(), dict[str, float]()
        with clock.stage("decode", timings_s):
            pixels = await self._decode_pool.decode(data)
        height, width, _ = pixels.shape
        on_stage("preprocess")
        with clock.stage("preprocess", timings_s):
            result, arrays = await self._preprocess_pool.process(pixels, options)
        return ProcessedImage(os.urandom(32), result.num_tokens, arrays, result.layout, width, height, timings_s)

    def stats(self) -> VisionStats:
        return VisionStats(
            is_ready=self.is_ready,
            num_in_flight=dict(self._clock.num_in_flight),
            num_done=dict(self._clock.num_done),
            time_s=dict(self._clock.time_s),
            num_failed=dict(self._num_failed),
            num_pictures=self._num_pictures,
            num_cache_hits=self._cache.num_hits,
            num_cache_misses=self._cache.num_misses,
            cache_bytes=self._cache.num_bytes,
        )

    @property
    def process_ids(self) -> list[int]:
        """Of the decode workers, then of the preprocessing workers."""
        return self._decode_pool.process_ids + self._preprocess_pool.process_ids

    @property
    def is_ready(self) -> bool:
        starting = self._starting
        return starting is not None and starting.done() and not starting.cancelled() and starting.exception() is None

    async def _start_workers(self) -> str:
        _, fingerprint = await asyncio.gather(self._decode_pool.open(), self._preprocess_pool.open())
        return fingerprint

    async def _fingerprint(self) -> str:
        assert self._starting is not None, "the vision service is not open"
        return await asyncio.shield(self._starting)

    async def _side_by_side(self, refs: Sequence[ImageRef], work: Callable[[ImageRef], Coroutine[Any, Any, Result]]) -> list[Result]:
        tasks = [asyncio.create_task(self._one(ref, work)) for ref in refs]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, ProcessedImage):
                    _close(result)
            raise

    async def _one(self, ref: ImageRef, work: Callable[[ImageRef], Coroutine[Any, Any, Result]]) -> Result:
        """One picture; names its part of the request in the error."""
        try:
            async with self._pictures:
                return await work(ref)
        except MediaError as error:
            self._num_failed[error.code] = self._num_failed.get(error.code, 0) + 1
            raise MediaError(error.code, error.message, param=ref.param, status=error.status) from None
        except WorkerError:
            raise MediaError("vision_not_ready", "the server cannot process pictures now; try again", param=ref.param, status=503) from None

    async def _fetch(self, ref: ImageRef, tenant: str, timings_s: dict[str, float]) -> bytes:
        if ref.data is not None:
            return ref.data
        with self._clock.stage("fetch", timings_s):
            return await self._fetcher.fetch(ref.url, tenant=tenant)

    async def _fetch_and_process(self, ref: ImageRef, tenant: str) -> ProcessedImage:
        timings_s: dict[str, float] = {}
        data = await self._fetch(ref, tenant, timings_s)
        fingerprint = await self._fingerprint()
        key = tenant, await _content_hash(data, ref.options, fingerprint)
        image = self._cache.get(key)
        if image is None:
            image = await self._flights.run(key, lambda: self._process(key, data, ref.options))
            timings_s |= image.timings_s
        return _own_copy(image, timings_s)

    async def _fetch_and_measure(self, ref: ImageRef, tenant: str) -> MeasuredImage:
        data = await self._fetch(ref, tenant, {})
        await self._fingerprint()  # the workers are there
        result = await self._preprocess_pool.measure(await self._decode_pool.measure(data), ref.options)
        return MeasuredImage(result.num_tokens, result.layout)

    async def _process(self, key: tuple[str, bytes], data: bytes, options: ImageOptions) -> ProcessedImage:
        timings_s: dict[str, float] = {}
        async with self._decoded:
            with self._clock.stage("decode", timings_s):
                pixels = await self._decode_pool.decode(data)
            height, width, _ = pixels.shape
            with self._clock.stage("preprocess", timings_s):
                result, arrays = await self._preprocess_pool.process(pixels, options)
        image = ProcessedImage(key[1], result.num_tokens, arrays, result.layout, width, height, timings_s)
        self._cache.put(key, image, sum(shared.num_bytes for shared in arrays.values()))
        return image


class StageClock:
    """Measures the stages of all pictures."""

    def __init__(self) -> None:
        self.num_in_flight = dict.fromkeys(STAGES, 0)
        self.num_done = dict.fromkeys(STAGES, 0)
        self.time_s = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def stage(self, name: str, timings_s: dict[str, float]) -> Iterator[None]:
        started_s = time.perf_counter()
        self.num_in_flight[name] += 1
        try:
            yield
        finally:
            timings_s[name] = time.perf_counter() - started_s
            self.num_in_flight[name] -= 1
            self.num_done[name] += 1
            self.time_s[name] += timings_s[name]


async def _content_hash(data: bytes, options: ImageOptions, fingerprint: str) -> bytes:
    """Of everything that changes what the encoder sees; lengths keep the parts apart."""
    settings = msgspec.msgpack.encode((options, fingerprint))
    digest = hashlib.blake2b(len(settings).to_bytes(8, "little") + settings, digest_size=32)
    if len(data) <= _IN_PLACE_BYTES:
        digest.update(data)
    else:
        await asyncio.to_thread(digest.update, data)
    return digest.digest()


def _own_copy(image: ProcessedImage, timings_s: dict[str, float]) -> ProcessedImage:
    """Other descriptors of the same memory: the cache and each caller close their own."""
    arrays = {name: SharedArray(os.dup(shared.fd), shared.shape, shared.dtype.name) for name, shared in image.arrays.items()}
    return replace(image, arrays=arrays, layout=dict(image.layout), timings_s=timings_s)


def _close(image: ProcessedImage) -> None:
    for shared in image.arrays.values():
        shared.close()


def _log_failure(starting: "asyncio.Task[str]") -> None:
    if not starting.cancelled() and (error := starting.exception()) is not None:
        logger.error("pictures cannot be processed: %s", error)
