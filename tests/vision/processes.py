"""What tests see of processes."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_REPOSITORY = Path(__file__).parent.parent.parent


def python_prints(program: str) -> str:
    """What a fresh interpreter prints; fails when it fails."""
    done = subprocess.run([sys.executable, "-c", program], cwd=_REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """This process can open so many, 0 or 1."""
    lowest = os.dup(0)
    os.close(lowest)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + number, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def freeze(process_id: int) -> None:
    """Returns when the child process cannot run any more."""
    os.kill(process_id, signal.SIGSTOP)
    os.waitid(os.P_PID, process_id, os.WSTOPPED | os.WNOWAIT)


def await_end(process_id: int) -> None:
    """Returns when the child process has ended; somebody else is to collect it."""
    os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOWAIT)


def is_gone(process_id: int) -> bool:
    """Ended; collected too if it was our child."""
    try:
        state, parent_id, *_ = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return True
    return state == "Z" and int(parent_id) != os.getpid()


def memory_map(process_id: int) -> str:
    return Path(f"/proc/{process_id}/maps").read_text()


async def until(condition: Callable[[], bool]) -> None:
    """Lets others run until the condition holds, and then whoever is ready; fails after 10 seconds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0.002)
    for _ in range(5):
        await asyncio.sleep(0)
