"""Tensor-parallel ranks: this process is rank 0, each other rank a process of its own that executes the plans it is sent.

Plans travel as plain messages over private sockets, tensors through gloo (CPU) or nccl (CUDA). The ranks meet through a file in a private
folder and gloo stays on loopback: nothing listens on another interface. A rank whose rank 0 is gone ends; a dead rank is noticed between
steps, or makes a collective fail, and either ends the engine process. So does a rank that runs out of memory within a step.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.channel import Channel
from engine.config import FOLDER_VARIABLE, EngineConfig
from engine.garbage import spare_loaded_objects
from engine.layers.parallel import ParallelGroup
from engine.messages import Execute, StartRank, ToRank
from engine.model_runner import Executed, ModelRunner, check_devices, resolve_device
from engine.request import Plan

COLLECTIVE_TIMEOUT_S = 300
_PR_SET_PDEATHSIG = 1
EXIT_TIMEOUT_S = 10


class RankDeadError(Exception):
    """A rank ended by itself, was killed, or does not compute what the others do: the engine cannot go on."""


class Ranks:
    """All ranks of one engine as one callable."""

    def __init__(self, config: EngineConfig, *, on_progress: Callable[[float], None]) -> None:
        check_devices(config)
        set_threads(config)
        self._channels: list[Channel] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder: str | None = None
        self._is_out_of_step = False
        try:
            group = self._start_others(config) if config.tp > 1 else ParallelGroup()
            self.runner = ModelRunner(config, group, on_progress=on_progress)
        except BaseException:
            self.close()
            raise

    def execute(self, plan: Plan, embeddings: Mapping[bytes, Tensor]) -> Executed:
        """As `ModelRunner.execute`, on every rank at once.

        Raises torch.OutOfMemoryError; with more ranks than one `check` fails from then on, since the others wait in a collective of this
        plan, which would meet one of the next plan's. Raises RankDeadError where that is so, or where a rank has ended.
        """
        self._check_step()
        for rank, channel in enumerate(self._channels, start=1):
            _send(channel, Execute(plan), rank)
        try:
            return self.runner.execute(plan, embeddings)
        except torch.OutOfMemoryError:
            self._is_out_of_step = bool(self._channels)
            raise

    def check(self) -> None:
        """Raises RankDeadError where a rank has ended; without it an idle engine would learn that from its next request."""
        self._check_step()
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                raise RankDeadError(f"rank {rank} ended with status {process.returncode}")

    def _check_step(self) -> None:
        if self._is_out_of_step:
            raise RankDeadError("rank 0 ran out of device memory within a step, for which the others wait; the engine has to start again")

    def close(self) -> None:
        """Blocks until every rank has ended."""
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            try:
                process.wait(0 if self._is_out_of_step else EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._processes and dist.is_initialized():
            dist.destroy_process_group()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start_others(self, config: EngineConfig) -> ParallelGroup:
        self._folder = tempfile.mkdtemp(prefix="vlm-ranks-", dir=os.environ.get(FOLDER_VARIABLE))  # mode 0700
        rendezvous = str(Path(self._folder) / "rendezvous")
        for rank in range(1, config.tp):
            self._spawn(StartRank(config, rank, rendezvous))
        return join(config, 0, rendezvous)

    def _spawn(self, start: StartRank) -> None:
        ours, theirs = socket.socketpair()
        process = subprocess.Popen([sys.executable, "-m", "engine.workers", str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        channel = Channel(ours, ToRank)
        self._channels.append(channel)
        self._processes.append(process)
        _send(channel, start, start.rank)


def _send(channel: Channel, message: StartRank | Execute, rank: int) -> None:
    """Raises RankDeadError, not EOFError, which is the end of the server."""
    try:
        channel.send(message)
    except EOFError as error:
        raise RankDeadError(f"rank {rank} ended") from error


def join(config: EngineConfig, rank: int, rendezvous: str) -> ParallelGroup:
    """Meet the other ranks. Blocks until all are there."""
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    backend = "nccl" if resolve_device(config.device, rank).type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=config.tp,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    return ParallelGroup(rank, config.tp)


def set_threads(config: EngineConfig) -> None:
    """Threads of one rank: its share of the cores, or what the config says."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.num_threads or max(1, num_cores // config.tp))


def _end_with_rank_0() -> None:
    """Also where this process is stopped and could not see its channel close (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(fd: int) -> None:
    """One rank above 0, until rank 0 closes the channel."""
    _end_with_rank_0()
    channel = Channel(socket.socket(fileno=fd), ToRank)
    start = channel.receive(None)
    assert isinstance(start, StartRank)
    set_threads(start.config)
    runner = ModelRunner(start.config, join(start.config, start.rank, start.rendezvous))
    spare_loaded_objects()
    try:
        while True:
            message = channel.receive(None)
            assert isinstance(message, Execute)
            runner.execute(message.plan, {})
    except EOFError:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
