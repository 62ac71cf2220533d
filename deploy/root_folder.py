"""A folder that commands see as their whole file system, as they would in a container.

Needs root, and a mount namespace of its own around it: every mount made here then ends with the process, and removing the folder
from outside cannot reach what was mounted. Debian's packages and the machine's own settings of apt and pip are used inside.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
SHM_BYTES = 64 << 20  # a container's usual size
APT_SETTINGS = ("sources.list", "sources.list.d", "apt.conf.d", "preferences.d", "trusted.gpg.d")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
MACHINE_FOLDER = "run/machine"  # where files that pip's settings name are found inside


def make_base(folder: Path, suite: str) -> None:
    """Debian's smallest system in `folder`; it appears whole."""
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        subprocess.run(["debootstrap", "--variant=minbase", suite, str(work), _mirror(suite)], check=True, stdout=subprocess.DEVNULL)
        if _host_suite() == suite:
            _copy_apt_settings(work / "etc" / "apt")
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class RootFolder:
    """`folder`, a copy of a base system, with a container's /proc, /dev and name resolution."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._prepare()

    def run(self, command: Sequence[str], *, environment: Mapping[str, str], folder: str = "/", check: bool = True) -> int:
        """Run a command inside; its exit status. Raises CalledProcessError on failure where `check`."""
        arguments = self.arguments(command, folder=folder)
        return subprocess.run(arguments, env=dict(environment), stdin=subprocess.DEVNULL, check=check).returncode

    def start(self, command: Sequence[str], *, environment: Mapping[str, str], folder: str = "/") -> subprocess.Popen[bytes]:
        """Start a command as process 1 of its own process namespace; when that ends, all that it started ends."""
        isolated = [_found("unshare"), "--pid", "--fork", "--kill-child", f"--mount-proc={self.folder}/proc"]
        return subprocess.Popen([*isolated, *self.arguments(command, folder=folder)], env=dict(environment), stdin=subprocess.DEVNULL)

    def arguments(self, command: Sequence[str], *, folder: str) -> list[str]:
        return [_found("chroot"), str(self.folder), "/bin/sh", "-c", 'cd "$0" && exec "$@"', folder, *command]

    def mount(self, source: Path, target: str, *, read_only: bool = False) -> None:
        """Show the machine's folder or file `source` at `target` inside."""
        inside = self.folder / target.lstrip("/")
        if source.is_dir():
            inside.mkdir(parents=True, exist_ok=True)
        else:
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.touch()
        _mount("--bind", str(source), str(inside))
        if read_only:
            _mount("-o", "remount,bind,ro", str(inside))

    def unmount(self, target: str) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder / target.lstrip("/"))], check=True)

    @contextlib.contextmanager
    def machine_settings(self) -> Iterator[dict[str, str]]:
        """Variables that make pip inside use this machine's registries; until the end, what their values name is there too."""
        settings = {name: os.environ[name] for name in PROXY_VARIABLES if name in os.environ}
        shown: set[str] = set()
        for name, value in _pip_settings().items():
            settings[name] = " ".join(self._reachable(word, shown) for word in value.split())
        yield settings
        for target in shown:
            self.unmount(target)

    def _prepare(self) -> None:
        for name in ("proc", "sys", "dev", "run", "tmp"):
            (self.folder / name).mkdir(exist_ok=True)
        _mount("-t", "proc", "proc", str(self.folder / "proc"))
        _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(self.folder / "dev"))
        for name in DEVICES:
            self.mount(Path("/dev") / name, f"/dev/{name}")
        for name, target in {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}.items():
            (self.folder / "dev" / name).symlink_to(target)
        (self.folder / "dev" / "shm").mkdir()
        _mount("-t", "tmpfs", "-o", f"mode=1777,size={SHM_BYTES}", "tmpfs", str(self.folder / "dev" / "shm"))
        for name in ("resolv.conf", "hosts"):
            shutil.copyfile(f"/etc/{name}", self.folder / "etc" / name)

    def _reachable(self, word: str, shown: set[str]) -> str:
        """A word of a setting, after the local file or folder that it names was made visible inside."""
        is_index = word.startswith("file://")
        path = Path(urlsplit(word).path if is_index else word)
        if not path.is_absolute() or not path.exists():
            return word
        # A certificate's own place belongs to the packages inside. An index keeps its files beside its pages.
        source, target = (path.parent, str(path.parent)) if is_index else (path, f"/{MACHINE_FOLDER}/{path.name}")
        if target not in shown:
            self.mount(source, target, read_only=True)
            shown.add(target)
        return word if is_index else target


def _pip_settings() -> dict[str, str]:
    """pip's settings on this machine, as the variables that mean the same. Variables win over files, files over each other in order."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    settings: dict[str, str] = {}
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "install", ":env:"):
            settings[f"PIP_{name.upper().replace('-', '_')}"] = "".join(shlex.split(value)).replace("\\n", " ")
    return settings


def _host_suite() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    return next((line.partition("=")[2].strip('"') for line in lines if line.startswith("VERSION_CODENAME=")), "")


def _mirror(suite: str) -> str:
    """The first mirror that apt uses on this machine for the suite."""
    if _host_suite() != suite:
        return DEFAULT_MIRROR
    lines = subprocess.run(["apt-get", "indextargets", "--format", "$(SITE)/ $(RELEASE)"], capture_output=True, text=True, check=False)
    targets = [line.split() for line in lines.stdout.splitlines()]
    return next((target[0].rstrip("/") for target in targets if len(target) == 2 and target[1] == suite), DEFAULT_MIRROR)


def _copy_apt_settings(target: Path) -> None:
    for name in APT_SETTINGS:
        source = Path("/etc/apt") / name
        if source.is_dir():
            shutil.copytree(source, target / name, dirs_exist_ok=True)
        elif source.is_file():
            shutil.copy(source, target / name)
    if (target / "sources.list.d").is_dir() and not (Path("/etc/apt") / "sources.list").exists():
        (target / "sources.list").unlink(missing_ok=True)


def _mount(*arguments: str) -> None:
    subprocess.run([_found("mount"), *arguments], check=True)


def _found(program: str) -> str:
    path = shutil.which(program, path=DEFAULT_PATH)
    if not path:
        raise FileNotFoundError(f"{program} is needed and not installed")
    return path
