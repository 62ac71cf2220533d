"""A picture's whole way in the server: URL → bytes → pixels → what the vision encoder takes, many pictures at once.

Every stage has its limit, its timing and its gauge. Knows nothing of HTTP routes, prompts or scheduling.
"""

import asyncio
import contextlib
import errno
import hashlib
import logging
import math
import os
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec

from vision.addresses import LookUp
from vision.budget import Budget, BudgetFullError, BudgetStats, Reservation, SharedReservations, places_for
from vision.cache import ByteBoundedCache
from vision.config import VisionConfig
from vision.decode_pool import DecodePool
from vision.fetcher import Fetcher
from vision.image import ImageOptions, ImageRef, MeasuredImage, MediaError, ProcessedImage, salted_hash
from vision.media_budgets import BYTES_PER_PIXEL, MediaBudgets, hold_bytes, keep, keep_arrays, owner_or
from vision.preprocess import DEFAULT_PROCESSOR, PreprocessSettings
from vision.preprocess_pool import PreprocessPool
from vision.request_room import RequestRoom
from vision.shared_array import SharedArray
from vision.single_flight import SingleFlight
from vision.workers import WorkerError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_IN_PLACE_BYTES = 256 << 10  # hashed in less than a millisecond; more is hashed beside the event loop
STAGES = ("fetch", "decode", "preprocess")
STAGE_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # of the buckets of durations


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionStats:
    """Gauges of this moment and counters since the start."""

    is_ready: bool = False
    num_in_flight: dict[str, int] = field(default_factory=dict)  # stage → pictures
    num_done: dict[str, int] = field(default_factory=dict)  # stage → pictures, failed ones too
    time_s: dict[str, float] = field(default_factory=dict)  # stage → sum
    durations: dict[str, list[int]] = field(default_factory=dict)  # stage → pictures by time, up to each of STAGE_BOUNDS_S and beyond
    oldest_in_flight_s: float = 0.0  # how long one picture is in its stage, at most
    num_failed: dict[str, int] = field(default_factory=dict)  # MediaError.code → pictures
    num_pictures: int = 0  # asked for
    num_cache_hits: int = 0
    num_cache_misses: int = 0
    cache_bytes: int = 0
    num_http_fresh: int = 0  # downloads that were not needed
    num_http_revalidated: int = 0  # answered with 304
    num_http_misses: int = 0  # of a whole picture
    http_cache_bytes: int = 0
    budgets: dict[str, BudgetStats] = field(default_factory=dict)  # by name


@dataclass(frozen=True, slots=True)
class _Turns:
    """Of one request's pictures, which wait for each other without a limit. Only for others they wait briefly."""

    workers: asyncio.Semaphore
    pixels: asyncio.Lock  # one at a time waits for room: its brief wait begins when it is the next


@dataclass(frozen=True, slots=True)
class _Processed:
    """A picture, and how to let go of the pixels that it counts for."""

    image: ProcessedImage
    let_go: Callable[[], None]

    def give_back(self) -> None:
        self.let_go()
        _close(self.image)


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
        budgets: MediaBudgets | None = None,
        max_tokens: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`processor`: `module:class` in place of the model's own. `look_up`: host name → addresses in place of the system's resolver.

        budgets: of all that this process does; None: of its own. max_tokens: of a picture that is loaded; None: any number.
        """
        self._config = config
        self._max_tokens = max_tokens
        settings = PreprocessSettings(model_folder, trust_remote_code, processor)
        self._budgets = budgets or MediaBudgets(config)
        self._fetcher = Fetcher(config, self._budgets, look_up=look_up)
        self._decode_pool = DecodePool(config)
        self._preprocess_pool = PreprocessPool(config, settings)
        self._cache: ByteBoundedCache[tuple[str, bytes], ProcessedImage] = ByteBoundedCache(
            config.processed_cache_bytes, max_entries=config.processed_cache_pictures
        )
        # Each picture of which anybody has a copy, the cache or a request: it is in memory once, as the budgets count it.
        self._live: WeakValueDictionary[tuple[str, bytes], ProcessedImage] = WeakValueDictionary()
        self._flights: SingleFlight[tuple[str, bytes], _Processed] = SingleFlight()
        self._arrays = SharedReservations(self._budgets.pixels)  # of processed pictures that requests hold
        self._descriptors = SharedReservations(self._budgets.descriptors)  # the same
        num_workers = config.num_decode_workers + config.num_preprocess_workers
        self._decoded = Budget("decoded pictures", places_for(num_workers), wait_s=None)  # held as pixels
        self._num_processed_at_once = 2 * num_workers  # of one request: those behind wait for their own, and may do so for long
        self._num_at_once = config.max_pictures_per_request_in_flight
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

    def request_room(self) -> RequestRoom:
        """For a request that loads its pictures in several calls."""
        return RequestRoom(self._config)

    async def load(
        self,
        refs: Sequence[ImageRef],
        *,
        tenant: str = "",
        room: RequestRoom | None = None,
        on_loaded: Callable[[ProcessedImage], None] | None = None,
    ) -> list[ProcessedImage | MediaError]:
        """The pictures in the order of `refs`, worked on side by side; their arrays are the caller's to close.

        room: of the request that they belong to, where that has others beside them. What one tenant sent is not looked up for another.
        Raises MediaError with the `param` of the first picture that failed; the others are cancelled, as all are when the caller is. A
        picture that may fail has its MediaError in its place, where the picture is to blame and not this server. on_loaded: told of each
        picture as soon as it is there; its arrays are not its own.
        """
        self._num_pictures += len(refs)
        turns = _Turns(asyncio.Semaphore(self._num_processed_at_once), asyncio.Lock())
        shared = room or self.request_room()

        async def load_one(ref: ImageRef) -> ProcessedImage:
            image = await self._fetch_and_process(ref, tenant, turns, shared)
            if on_loaded is not None:
                on_loaded(image)
            return image

        return await self._side_by_side(refs, load_one)

    async def measure(self, refs: Sequence[ImageRef], *, tenant: str = "") -> list[MeasuredImage | MediaError]:
        """What the pictures take of a prompt, from their headers: nothing is decoded.

        Raises as `load`, save for damage behind a header and for pictures of more than `max_tokens`, which are measured like others.
        """
        self._num_pictures += len(refs)
        room = self.request_room()
        return await self._side_by_side(refs, lambda ref: self._fetch_and_measure(ref, tenant, room))

    async def fetch(
        self, refs: Sequence[ImageRef], *, limit_bytes: int, tenant: str = "", kept: Mapping[str, bytes] | None = None
    ) -> list[bytes | MediaError]:
        """The pictures' files as they are, for a caller who keeps them and gives them to `load` as `ImageRef.data`.

        kept: files that the caller has already, by their SHA-256 in hexadecimal. Equal files are one object, one of these if it is here.
        limit_bytes: of all others together. Raises as `load`.
        """
        files, room_bytes, room = dict(kept or {}), limit_bytes, self.request_room()

        async def fetch_within(ref: ImageRef) -> bytes:
            nonlocal room_bytes
            async with self._file(ref, tenant, {}) as data:
                room.take_bytes(len(data))  # equal files too: what is downloaded for one request has a limit
                digest = await _file_digest(data)
                if digest in files:
                    return files[digest]
                if len(data) > room_bytes:
                    raise MediaError("image_too_large", f"the pictures together have more than the {limit_bytes} bytes that can be kept")
                room_bytes -= len(data)
                files[digest] = data
                await hold_bytes(len(data) if ref.data is None else 0)
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
            durations={stage: list(counts) for stage, counts in self._clock.durations.items()},
            oldest_in_flight_s=self._clock.oldest_s(),
            num_failed=dict(self._num_failed),
            num_pictures=self._num_pictures,
            num_cache_hits=self._cache.num_hits,
            num_cache_misses=self._cache.num_misses,
            cache_bytes=self._cache.num_bytes,
            num_http_fresh=self._fetcher.cache.num_fresh,
            num_http_revalidated=self._fetcher.cache.num_revalidated,
            num_http_misses=self._fetcher.cache.num_missed,
            http_cache_bytes=self._fetcher.cache.num_bytes,
            budgets={budget.name: budget.stats() for budget in self._budgets.all()},
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

    async def _side_by_side(
        self, refs: Sequence[ImageRef], work: Callable[[ImageRef], Coroutine[Any, Any, Result]]
    ) -> list[Result | MediaError]:
        """Some at once: a request with many pictures has no more of them in memory. Nobody waits for another request's slow hosts."""
        places = asyncio.Semaphore(self._num_at_once)
        tasks = [asyncio.create_task(self._one(ref, work, places)) for ref in refs]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, ProcessedImage):
                    _close(result)
            raise

    async def _one(
        self, ref: ImageRef, work: Callable[[ImageRef], Coroutine[Any, Any, Result]], places: asyncio.Semaphore
    ) -> Result | MediaError:
        """One picture; names its part of the request in the error."""
        try:
            async with places:
                return await work(ref)
        except (MediaError, WorkerError, BudgetFullError, OSError) as error:
            failure = _as_media_error(error, ref.param)
            if failure is None:
                raise
            self._num_failed[failure.code] = self._num_failed.get(failure.code, 0) + 1
            if ref.may_fail and failure.is_of_the_picture:
                return failure
            raise failure from None

    @contextlib.asynccontextmanager
    async def _file(self, ref: ImageRef, tenant: str, timings_s: dict[str, float]) -> AsyncIterator[bytes]:
        """The picture's bytes, counted as in flight until the block ends; those that came with the request are counted there."""
        if ref.data is not None:
            yield ref.data
            return
        async with contextlib.AsyncExitStack() as stack:
            with self._clock.stage("fetch", timings_s):
                data = await stack.enter_async_context(self._fetcher.hold(ref.url, tenant=tenant))
            yield data

    async def _fetch_and_process(self, ref: ImageRef, tenant: str, turns: _Turns, room: RequestRoom) -> ProcessedImage:
        timings_s: dict[str, float] = {}
        async with self._file(ref, tenant, timings_s) as data:
            room.take_bytes(len(data))
            fingerprint = await self._fingerprint()
            key = tenant, await _content_hash(data, ref.options, fingerprint)
            self._cache.get(key)  # for its order and its counters: what it has is live
            if (known := self._copy_of_live(key, timings_s)) is not None:
                return await self._handed_out(key, known, room)
            async with turns.workers:
                if (known := self._copy_of_live(key, timings_s)) is not None:  # it came while this waited for its turn
                    return await self._handed_out(key, known, room)
                work = self._flights.hold(key, lambda: self._process(key, data, ref.options, turns.pixels), let_go=_Processed.give_back)
                async with work as processed:
                    return await self._handed_out(key, _own_copy(processed.image, timings_s | processed.image.timings_s), room)

    def _copy_of_live(self, key: tuple[str, bytes], timings_s: dict[str, float]) -> ProcessedImage | None:
        """The caller's own. What is live itself is for nobody's variables: an error's traceback would keep it in memory."""
        image = self._live.get(key)
        return None if image is None else _own_copy(image, timings_s)

    async def _handed_out(self, key: tuple[str, bytes], image: ProcessedImage, room: RequestRoom) -> ProcessedImage:
        """Takes over a copy and gives it to the caller, counted once for all who have one.

        In pixels it counts until the engine has it, in descriptors until the request ends.
        """
        try:
            room.take_pixels(image.width * image.height)
            engine_hash = salted_hash(image.content_hash, key[0])  # as the prompt will name the picture
            keep_arrays(engine_hash, await self._arrays.hold(key, _num_pixels(image), owner_or(key[0])))
            keep(await self._descriptors.hold(key, len(image.arrays), owner_or(key[0])))
        except BaseException:
            _close(image)
            raise
        return image

    async def _fetch_and_measure(self, ref: ImageRef, tenant: str, room: RequestRoom) -> MeasuredImage:
        async with self._file(ref, tenant, {}) as data:
            room.take_bytes(len(data))
            await self._fingerprint()  # the workers are there
            height, width = await self._decode_pool.measure(data, owner=owner_or(tenant))
            room.take_pixels(width * height)
            result = await self._preprocess_pool.measure((height, width), ref.options, owner=owner_or(tenant))
            return MeasuredImage(result.num_tokens, result.layout)

    async def _process(self, key: tuple[str, bytes], data: bytes, options: ImageOptions, turn: asyncio.Lock) -> _Processed:
        timings_s: dict[str, float] = {}
        async with self._decoded_pixels(data, owner_or(key[0]), turn, timings_s) as (pixels, held):
            height, width, _ = pixels.shape
            with self._clock.stage("preprocess", timings_s):
                result, arrays = await self._preprocess_pool.process(pixels, options, owner=owner_or(key[0]), max_tokens=self._max_tokens())
            image = ProcessedImage(key[1], result.num_tokens, arrays, result.layout, width, height, timings_s, result.views)
            await held.resize(_num_pixels(image))
            live = self._live.setdefault(key, image)
            self._cache.put(key, _own_copy(live, timings_s), sum(shared.num_bytes for shared in arrays.values()))
            return _Processed(_own_copy(live, timings_s), self._arrays.adopt(key, held.moved()))

    @contextlib.asynccontextmanager
    async def _decoded_pixels(
        self, data: bytes, owner: str, turn: asyncio.Lock, timings_s: dict[str, float]
    ) -> AsyncIterator[tuple[SharedArray, Reservation]]:
        """The pixels, and what counts them from before they exist: as many as the header says."""
        async with contextlib.AsyncExitStack() as stack:
            with self._clock.stage("decode", timings_s):
                height, width = await self._decode_pool.measure(data, owner=owner)
                async with turn:
                    held = stack.enter_context(await self._budgets.pixels.reserve(height * width, owner))
                stack.enter_context(await self._decoded.reserve(1, owner))
                pixels = await self._decode_pool.decode(data, owner=owner)
            yield pixels, held


class StageClock:
    """Measures the stages of all pictures."""

    def __init__(self) -> None:
        self.num_in_flight = dict.fromkeys(STAGES, 0)
        self.num_done = dict.fromkeys(STAGES, 0)
        self.time_s = dict.fromkeys(STAGES, 0.0)
        self.durations = {stage: [0] * (len(STAGE_BOUNDS_S) + 1) for stage in STAGES}
        self._began_s: dict[object, float] = {}  # of those in flight, the oldest first

    def oldest_s(self) -> float:
        """How long the oldest picture is in its stage; 0 without any."""
        began_s = next(iter(self._began_s.values()), None)
        return 0.0 if began_s is None else time.perf_counter() - began_s

    @contextlib.contextmanager
    def stage(self, name: str, timings_s: dict[str, float]) -> Iterator[None]:
        run = object()
        self._began_s[run] = time.perf_counter()
        self.num_in_flight[name] += 1
        try:
            yield
        finally:
            timings_s[name] = time.perf_counter() - self._began_s.pop(run)
            self.durations[name][bisect_left(STAGE_BOUNDS_S, timings_s[name])] += 1
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


async def _file_digest(data: bytes) -> str:
    if len(data) <= _IN_PLACE_BYTES:
        return hashlib.sha256(data).hexdigest()
    return (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()


def _own_copy(image: ProcessedImage, timings_s: dict[str, float]) -> ProcessedImage:
    """The same memory: the cache and each caller close their own. While one of its arrays is open, all of `image` is there."""
    arrays = {name: shared.duplicate(belongs_to=image) for name, shared in image.arrays.items()}
    return replace(image, arrays=arrays, layout=dict(image.layout), timings_s=timings_s)


def _num_pixels(image: ProcessedImage) -> int:
    """That its arrays count for."""
    return math.ceil(sum(shared.num_bytes for shared in image.arrays.values()) / BYTES_PER_PIXEL)


def _as_media_error(error: MediaError | WorkerError | BudgetFullError | OSError, param: str) -> MediaError | None:
    """What the client is told; None of what it has no part in."""
    match error:
        case MediaError():
            return MediaError(error.code, error.message, param=param, status=error.status, retry_after_s=error.retry_after_s)
        case BudgetFullError():
            return MediaError("server_busy", str(error), param=param, status=503, retry_after_s=error.retry_after_s)
        case OSError(errno=errno.EMFILE | errno.ENFILE):
            return MediaError(
                "server_busy", "the server has no file descriptors left for pictures; try again later", param=param, status=503
            )
        case WorkerError():
            return MediaError("vision_not_ready", "the server cannot process pictures now; try again", param=param, status=503)
        case _:
            return None


def _close(image: ProcessedImage) -> None:
    for shared in image.arrays.values():
        shared.close()


def _log_failure(starting: "asyncio.Task[str]") -> None:
    if not starting.cancelled() and (error := starting.exception()) is not None:
        logger.error("pictures cannot be processed: %s", error)
