"""What a step of the scheduler costs: `schedule` and `commit` without tensor work, in microseconds.

    python benchmarks/scheduler_overhead.py

Prints, for 16 and 64 rows: a step in which all rows decode, with nobody and with many waiting, and a step that admits every row.
"""

import random
import statistics
import time

from engine.config import EngineConfig
from engine.request import ImageInput, ImageSpan, Prompt, Request, SampledToken, SamplingParams, make_cache_keys
from engine.scheduler import Scheduler

NUM_STEPS = 200
PROMPT_LEN = 600
IMAGE_LEN = 64


def make_request(request_id: str, random_: random.Random) -> Request:
    """A prompt with one picture, like no other from its first token on."""
    token_ids = [random_.randrange(50_000) for _ in range(PROMPT_LEN)]
    image = ImageInput(random_.randbytes(32), IMAGE_LEN, {})
    spans = (ImageSpan(10, IMAGE_LEN, 0),)
    keys = make_cache_keys(token_ids, (image,), spans)
    prompt = Prompt(token_ids=tuple(token_ids), cache_keys=keys, images=(image,), spans=spans)
    return Request(request_id, prompt, SamplingParams(ignore_eos=True))


def make_scheduler(num_rows: int, num_waiting: int) -> Scheduler:
    config = EngineConfig(
        model_folder="", session_len=2048, max_batch_size=num_rows, max_prefill_token_num=1 << 20, max_waiting=num_rows + num_waiting
    )
    scheduler = Scheduler(config, num_blocks=num_rows * 128, eos_token_ids=())
    random_ = random.Random(0)
    for index in range(num_rows + num_waiting):
        request = make_request(str(index), random_)
        scheduler.add(request)
        if index < num_rows:
            scheduler.image_ready(request.prompt.images[0].content_hash)
    return scheduler


def step_us(scheduler: Scheduler) -> float:
    """One step as the engine makes it, with everything that it asks the scheduler."""
    start = time.perf_counter()
    scheduler.images_needed()
    scheduler.pinned_images()
    plan = scheduler.schedule()
    scheduler.commit(plan, {chunk.request_id: SampledToken(7) for chunk in plan.chunks if chunk.samples})
    return (time.perf_counter() - start) * 1e6


def main() -> None:
    for num_rows in (16, 64):
        for num_waiting in (0, 1000):
            scheduler = make_scheduler(num_rows, num_waiting)
            admission = step_us(scheduler)
            steps = sorted(step_us(scheduler) for _ in range(NUM_STEPS))
            scheduler.check()
            print(
                f"{num_rows} rows, {num_waiting} waiting: decode step {statistics.median(steps):.0f} µs median, "
                f"{steps[int(0.99 * NUM_STEPS)]:.0f} µs p99; step that admits all rows ({num_rows * PROMPT_LEN} slots) {admission:.0f} µs"
            )


if __name__ == "__main__":
    main()
