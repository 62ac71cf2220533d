"""What the processes of a server hold, over time: samples from /proc, and whether a row of samples grows.

Counts what a process holds beside shared memory, and all of the server's shared memory once, in a row of its own. Sends nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

MIB = 1 << 20
SHARED = "shared memory"
_ROLES = ("engine.process", "engine.workers", "vision.decode", "vision.preprocess", "vlm_server.jinja_worker", "vlm_server.cli")


def sample(process_id: int) -> dict[str, int]:
    """Bytes by process, `role pid`, of a process and all that it started; and of the memory files that they have open."""
    root = psutil.Process(process_id)
    processes = [root, *root.children(recursive=True)]
    held = {f"{_role(process)} {process.pid}": held_by(process.pid) for process in processes}
    return {**{name: size for name, size in held.items() if size}, SHARED: _shared_bytes([process.pid for process in processes])}


def held_by(process_id: int) -> int:
    """Bytes of its own and of files that it maps, shared memory left out; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "RssFile", "VmSwap")))
    return sum(int(value.split()[0]) << 10 for value in fields.values())


def _role(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.Error:
        return "ended"
    return next((role for role in _ROLES if role in words), words[0] if words else "ended")


def _shared_bytes(process_ids: Sequence[int]) -> int:
    """Each memory file once, in whatever processes it is open."""
    files: dict[int, int] = {}
    for process_id in process_ids:
        folder = f"/proc/{process_id}/fd"
        try:
            for name in os.listdir(folder):
                files.update(_memory_file(f"{folder}/{name}"))
        except OSError:
            continue
    return sum(files.values())


def _memory_file(path: str) -> dict[int, int]:
    try:
        if not os.readlink(path).startswith("/memfd:"):
            return {}
        status = os.stat(path)
    except OSError:
        return {}
    return {status.st_ino: status.st_blocks * 512}


@dataclass
class History:
    """Samples of one process or of the shared memory."""

    times_s: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, time_s: float, size: int) -> None:
        self.times_s.append(time_s)
        self.sizes.append(size)

    def floors(self, *, since_s: float, step_s: float) -> tuple[list[float], list[int]]:
        """The least of every `step_s` seconds: what is held whether or not a request is being worked on."""
        least: dict[int, int] = {}
        for time_s, size in zip(self.times_s, self.sizes, strict=True):
            if time_s >= since_s:
                step = int((time_s - since_s) / step_s)
                least[step] = min(size, least.get(step, size))
        return [since_s + step * step_s for step in least], list(least.values())

    def growth(self, *, since_s: float, step_s: float) -> tuple[int, int]:
        """Bytes at `since_s`, and bytes that came since."""
        _, sizes = self.floors(since_s=since_s, step_s=step_s)
        return (sizes[0], sizes[-1] - sizes[0]) if sizes else (0, 0)

    def slope(self, *, since_s: float, step_s: float) -> float:
        """Bytes per 10 minutes, by least squares over the floors; 0 where there are too few."""
        times_s, sizes = self.floors(since_s=since_s, step_s=step_s)
        return float(np.polyfit(times_s, sizes, 1)[0] * 600) if len(times_s) > 2 else 0.0
