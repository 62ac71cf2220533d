"""What a confined process can still do, tried out in processes of their own."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.vision.processes import python_prints
from vision.confinement import ALL, FILES, NETWORK, SIGNALS, confine

TRY = """
import json, mmap, os, socket, sys
from vision.confinement import confine
early = open("/dev/null", "rb")
memory = os.memfd_create("before")
pair = socket.socketpair()
granted = confine()
results = {{}}
def attempt(name, work):
    try:
        results[name] = repr(work())
    except OSError as error:
        results[name] = "refused"
{attempts}
print(json.dumps([granted, results]))
"""


def tried(**attempts: str) -> tuple[list[str], dict[str, str]]:
    """What was granted, and what came of each attempt."""
    lines = "\n".join(f"attempt({name!r}, lambda: {work})" for name, work in attempts.items())
    granted, results = json.loads(python_prints(TRY.format(attempts=lines)))
    return granted, results


def needs(right: str) -> None:
    granted, _ = tried()
    if right not in granted:
        pytest.skip(f"this kernel, or the rules around this process, cannot take {right} away")


def test_a_confined_process_opens_no_file_and_starts_no_program():
    needs(FILES)

    _, results = tried(
        reads="open('/etc/hostname').read()",
        lists="os.listdir('/')",
        writes="open('/tmp/from-a-confined-process', 'w')",
        starts="os.execv('/bin/true', ['true'])",
        devices="open('/dev/urandom', 'rb')",
    )

    assert set(results.values()) == {"refused"}


def test_a_confined_process_reaches_no_listener():
    needs(NETWORK)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        port = listener.getsockname()[1]

        _, results = tried(
            tcp=f"socket.create_connection(('127.0.0.1', {port}), timeout=2)",
            listens="socket.create_server(('127.0.0.1', 0))",
        )

        assert results["tcp"] == "refused"
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_confined_process_signals_nobody_else():
    needs(SIGNALS)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        _, results = tried(kills=f"os.kill({other.pid}, 9)")
        assert other.poll() is None
        other.communicate(b"\n")

    assert results["kills"] == "refused"
    assert other.returncode == 0


def test_what_was_open_before_and_shared_memory_stay_usable():
    granted, results = tried(
        reads="early.read()",
        memory="os.memfd_create('after') > 0 and os.truncate(memory, 4096)",
        maps="mmap.mmap(memory, 4096)[:2]",
        pairs="pair[0].send(b'x')",
    )

    assert results == {"reads": "b''", "memory": "None", "maps": r"b'\x00\x00'", "pairs": "1"}
    assert set(granted) <= set(ALL)


@pytest.mark.parametrize("missing", ["prctl", "landlock", "namespaces"])
def test_where_the_kernel_lacks_a_means_the_others_are_used(missing, monkeypatch):
    calls = []

    class System:
        """A C library whose calls change nothing."""

        def unshare(self, flags):
            calls.append("unshare")
            return -1 if missing == "namespaces" else 0

        def prctl(self, *arguments):
            return -1 if missing == "prctl" else 0

        def syscall(self, number, *arguments):
            calls.append(number)
            if missing == "landlock":
                return -1
            return {444: 7 if arguments[0] is None else os.open(os.devnull, os.O_RDONLY), 446: 0}[number]

    monkeypatch.setattr("vision.confinement.ctypes.CDLL", lambda *_, **__: System())

    assert confine() == {"prctl": [NETWORK], "landlock": [NETWORK], "namespaces": [FILES, NETWORK, SIGNALS]}[missing]
    assert "unshare" in calls
