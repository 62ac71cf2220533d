"""Who computes and who does not, as the kernel counts it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from engine.pulse import Pulse

COMPUTES = "print(flush=True)\nwhile True: pass"
WAITS = "import sys; print(flush=True); sys.stdin.read()"
HAS_A_CHILD_THAT_COMPUTES = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {COMPUTES!r}])"


@contextmanager
def process_that(program: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Begun; ended with its children at the end."""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout
        process.stdout.readline()
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def was_busy(pulse: Pulse) -> bool:
    """Within so many looks as take a small part of a second: a tick is 10 ms."""
    return any(not pulse.is_still() for _ in range(20_000))


@pytest.mark.parametrize("program", [COMPUTES, HAS_A_CHILD_THAT_COMPUTES])
def test_a_process_that_computes_or_whose_child_does_is_not_still(program: str) -> None:
    with process_that(program) as process:
        assert was_busy(Pulse(process.pid))


def test_a_process_that_waits_or_is_stopped_is_still() -> None:
    with process_that(WAITS) as waiting, process_that(COMPUTES) as stopped:
        os.kill(stopped.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
        pulses = [Pulse(waiting.pid), Pulse(stopped.pid)]

        for pulse in pulses:
            pulse.is_still()  # what it still did while the other one was started

        assert all(pulse.is_still() for pulse in pulses)


def test_what_cannot_be_looked_at_counts_as_busy() -> None:
    with process_that(WAITS) as process:
        pass

    assert not Pulse(process.pid).is_still()
