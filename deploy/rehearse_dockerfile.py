"""Does what `docker build` and `docker run` would do with our Dockerfile, on a Debian machine without a container engine.

    sudo python3 -m deploy.rehearse_dockerfile [--build-arg NAME=VALUE …]

The Dockerfile's own instructions run in an empty Debian root folder (debootstrap, chroot); then its entrypoint is started as process 1 with
the mounted cache and in each of the forms that users type, without any network but loopback, and asked about one picture. A forgotten
installation step, a wrong permission or a server that runs as root ends it with an error. Uses Python's standard library only.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.dockerfile import DockerfileError, parse
from deploy.image import Image, build
from vlm_server.examples import RED_CIRCLE

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = "/root/.cache/huggingface"
TINY_MODEL = f"{CACHE}/tiny-llava"
HOST_USER = 12345  # no user of that number exists in the image
PORT = 23333
SECRET = "hf_rehearsal"
START_LIMIT_S = 300.0
ANSWER_LIMIT_S = 120.0
STOP_LIMIT_S = 30.0  # `docker stop` grants 10 s, which a busy machine may need more than once

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP_AND_RUNNING = 0x8914, 0x41


class RehearsalError(Exception):
    """The image would not do what it promises; the message says what."""


@dataclass(frozen=True, slots=True)
class Case:
    """One `docker run`: its arguments and who owns the mounted cache. Only the embedded model knows what it sees."""

    arguments: tuple[str, ...]
    cache_owner: int
    port: int = PORT
    is_embedded: bool = False


CASES = (
    Case((), cache_owner=0, is_embedded=True),
    Case((TINY_MODEL, "--session-len", "512"), cache_owner=HOST_USER),
    Case(("serve", TINY_MODEL), cache_owner=0),
    Case(("lmdeploy", "serve", "api_server", TINY_MODEL, "--server-port", "8000"), cache_owner=HOST_USER, port=8000),
)


def main() -> int:
    options = _parser().parse_args()
    if os.geteuid() != 0:
        sys.exit("this needs root: it makes mounts and changes its root folder")
    if options.root is None:
        return _in_own_namespace(options)
    try:
        _rehearse(options)
    except (RehearsalError, DockerfileError, subprocess.CalledProcessError, OSError) as error:
        print(f"FAILED: {error}", flush=True)
        return 1
    return 0


def _in_own_namespace(options: argparse.Namespace) -> int:
    """Run this module again where its mounts are its own; what it leaves is removed from out here, where nothing is mounted."""
    options.work.mkdir(parents=True, exist_ok=True)
    root = options.work.resolve() / f"root-{os.getpid()}"
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "deploy.rehearse_dockerfile"]
    try:
        return subprocess.run([*command, *sys.argv[1:], "--root", str(root)], cwd=REPOSITORY, check=False).returncode
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(_host_cache(root), ignore_errors=True)


def _rehearse(options: argparse.Namespace) -> None:
    started_s = time.monotonic()
    arguments = dict(argument.split("=", 1) for argument in options.build_arg)
    instructions = parse((REPOSITORY / "Dockerfile").read_text())
    image = build(instructions, context=REPOSITORY, folder=options.root, bases=options.work, arguments=arguments)
    _say(f"built in {time.monotonic() - started_s:.0f} s")
    _leave_the_network()
    if image.root.run(image.health_command, environment=image.environment, check=False) == 0:
        raise RehearsalError("the health check succeeds without a server")
    check_token(image)
    check_gpu_warning(image)
    cache = _host_cache(options.root)
    write_tiny_model(image, cache)
    for case in CASES:
        run_case(image, case, cache, options.expect if case.is_embedded else [])
    _say(f"all passed in {time.monotonic() - started_s:.0f} s")


def check_token(image: Image) -> None:
    """Either variable is the token of downloads."""
    program = f"import sys, huggingface_hub; sys.exit(huggingface_hub.get_token() != {SECRET!r})"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        image.root.run(["python", "-c", program], environment=image.environment | {name: SECRET})


def check_gpu_warning(image: Image) -> None:
    """A CPU image says so where it is given GPUs, and only there."""
    for gpus, is_warned in (("all", True), ("void", False)):
        environment = image.environment | {"NVIDIA_VISIBLE_DEVICES": gpus}
        command = image.root.arguments([*image.entrypoint, "--version"], folder=image.folder)
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        if ("built for CPU" in output.stderr) is not is_warned:
            raise RehearsalError(f"with NVIDIA_VISIBLE_DEVICES={gpus} the entrypoint said: {output.stderr!r}")


def write_tiny_model(image: Image, cache: Path) -> None:
    """A random LLaVA in the host's cache folder, made with the libraries in the image."""
    cache.mkdir()
    image.root.mount(REPOSITORY / "tests", "/run/rehearsal/tests", read_only=True)
    image.root.mount(cache, CACHE)
    program = f"import pathlib; from tests.tiny_models import write_tiny; write_tiny('llava', pathlib.Path({TINY_MODEL!r}))"
    image.root.run(
        ["python", "-c", program], environment=image.environment | {"PYTHONPATH": "/run/rehearsal", "PYTHONDONTWRITEBYTECODE": "1"}
    )
    image.root.unmount(CACHE)
    image.root.unmount("/run/rehearsal/tests")


def run_case(image: Image, case: Case, cache: Path, expected_words: list[str]) -> None:
    """One container's life: started, healthy, asked, stopped."""
    _say(f"docker run -v {cache} (owned by {case.cache_owner}):{CACHE} IMAGE {' '.join(case.arguments)}")
    paths = [cache, *cache.rglob("*")]
    for path in paths:  # as closed as a user can make it
        os.chown(path, case.cache_owner, case.cache_owner)
        path.chmod(0o700 if path.is_dir() else 0o600)
    image.root.mount(cache, CACHE)
    with _container(image, case) as pid:
        _wait_until_healthy(image, pid, case)
        check_processes(image, pid, case)
        check_answer(case, expected_words)
        os.kill(pid, signal.SIGTERM)
    image.root.unmount(CACHE)
    if changed := [str(path) for path in paths if path.stat().st_uid != case.cache_owner]:
        raise RehearsalError(f"the entrypoint took these from their owner: {changed}")


@contextlib.contextmanager
def _container(image: Image, case: Case) -> Iterator[int]:
    """The started entrypoint; yields its process id out here."""
    command = [*image.entrypoint, *(case.arguments or image.command)]
    process = image.root.start(command, environment=image.environment | {"HUGGING_FACE_HUB_TOKEN": SECRET}, folder=image.folder)
    try:
        while not (children := _children(process.pid)):
            if process.poll() is not None:
                raise RehearsalError("the entrypoint could not be started")
            time.sleep(0.01)
        yield children[0]
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RehearsalError(f"the server runs on {STOP_LIMIT_S:.0f} s after SIGTERM") from None
    finally:
        for child in _children(process.pid):  # `unshare --kill-child` loses its hold on a child that changes its user
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()


def _wait_until_healthy(image: Image, pid: int, case: Case) -> None:
    started_s = time.monotonic()
    while image.root.run(image.health_command, environment=image.environment, check=False) != 0:
        if not Path(f"/proc/{pid}").exists():
            raise RehearsalError("the server ended before it was healthy")
        if time.monotonic() - started_s > START_LIMIT_S:
            raise RehearsalError(f"not healthy after {START_LIMIT_S:.0f} s")
        time.sleep(2)
    _say(f"healthy after {time.monotonic() - started_s:.0f} s")


def check_processes(image: Image, pid: int, case: Case) -> None:
    """No process of the server is root's; each is the cache's owner, or can write there as its own user."""
    users = {_user_of(process) for process in _tree(pid)}
    user, group = min(users)
    if len(users) != 1 or user == 0 or case.cache_owner not in (0, user):
        raise RehearsalError(f"with a cache of user {case.cache_owner} the server's processes belong to (user, group): {users}")
    become = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    image.root.run([*become, "test", "-w", CACHE, "-a", "-x", "/root/.cache"], environment=image.environment)
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    for expected in (f"HF_HOME={CACHE}", f"HUGGING_FACE_HUB_TOKEN={SECRET}"):
        if expected.encode() not in environment:
            raise RehearsalError(f"the server's environment lacks {expected}")


def check_answer(case: Case, expected_words: list[str]) -> None:
    """One picture over HTTP: its tokens are counted, and the answer mentions what is expected."""
    model = _http(case.port, "/v1/models")["data"][0]["id"]
    parts = [{"type": "text", "text": "Describe the image please"}, {"type": "image_url", "image_url": {"url": RED_CIRCLE}}]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 32, "temperature": 0}
    answer = _http(case.port, "/v1/chat/completions", body)
    text, details = answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens_details"]
    _say(f"{model}: {text!r}, {details['image_tokens']} image tokens")
    if not details["image_tokens"] > 0:
        raise RehearsalError(f"no image tokens in {answer}")
    if missing := [word for word in expected_words if word not in text.lower()]:
        raise RehearsalError(f"the answer mentions no {' and no '.join(missing)}: {text}")


def _http(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_S) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RehearsalError(f"{path}: {error.code} {error.read().decode()}") from error


def _leave_the_network() -> None:
    """From here on there is only loopback, for this process and all that it starts; and every port is free."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace of its own")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP_AND_RUNNING))


def _tree(pid: int) -> list[int]:
    return [pid, *(descendant for child in _children(pid) for descendant in _tree(child))]


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _user_of(pid: int) -> tuple[int, int]:
    """Effective user and group."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["Uid"].split()[1]), int(fields["Gid"].split()[1])


def _host_cache(root: Path) -> Path:
    return root.with_name(f"{root.name}-cache")


def _say(text: str) -> None:
    print(f"rehearsal: {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build's")
    parser.add_argument("--expect", nargs="*", default=["red", "circle"], metavar="WORD", help="in the embedded model's answer")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "vlm-server-rehearsal", help="keeps the Debian base systems")
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)  # given by this module to itself
    return parser


if __name__ == "__main__":
    sys.exit(main())
