"""Carries out a Dockerfile's instructions in a root folder, as `docker build` would, and keeps what they say about starting in it."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.dockerfile import DockerfileError, Instruction, copied_files, expand, health_command, pairs, words
from deploy.root_folder import DEFAULT_PATH, RootFolder, make_base


@dataclass(slots=True)
class Image:
    """What the instructions made: a root folder, and how to start in it."""

    root: RootFolder
    context: Path  # the folder that COPY takes from
    given_arguments: dict[str, str]  # --build-arg
    machine: dict[str, str] = field(default_factory=dict)  # variables of RUN only
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH, "HOME": "/root"})
    build_arguments: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health_command: list[str] = field(default_factory=list)

    def carry_out(self, instruction: Instruction) -> None:
        """Raises CalledProcessError where a RUN fails, DockerfileError where an instruction makes no sense."""
        text = instruction.text
        match instruction.name:
            case "ARG":
                name, _, default = text.partition("=")
                self.build_arguments[name] = self.given_arguments.get(name, self._expand(default))
            case "ENV":
                self.environment |= pairs(self._expand(text))
            case "WORKDIR":
                self.folder = os.path.join(self.folder, self._expand(text))
                self._outside(self.folder).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(*shlex.split(self._expand(text)))
            case "RUN":
                self.root.run(words(text), environment=self._variables() | self.machine, folder=self.folder)
            case "HEALTHCHECK":
                self.health_command = health_command(text)
            case "ENTRYPOINT":
                self.entrypoint = words(text)
            case "CMD":
                self.command = words(text)
            case "EXPOSE" | "LABEL":
                pass
            case other:
                raise DockerfileError(f"{other} {text}: not understood here")

    def _copy(self, *arguments: str) -> None:
        *sources, destination = arguments
        target = self._outside(os.path.join(self.folder, destination))
        for path, name in copied_files(self.context, sources, (self.context / ".dockerignore").read_text().splitlines()).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / name)

    def _outside(self, path: str) -> Path:
        return self.root.folder / path.lstrip("/")

    def _variables(self) -> dict[str, str]:
        return self.build_arguments | self.environment

    def _expand(self, text: str) -> str:
        return expand(text, self._variables())


def build(instructions: Sequence[Instruction], *, context: Path, folder: Path, bases: Path, arguments: dict[str, str]) -> Image:
    """The image of a Dockerfile FROM a Debian, in `folder`. The base systems are kept in `bases` for the next time."""
    first, *rest = instructions
    suite = first.text.removeprefix("debian:").removesuffix("-slim")
    if first.name != "FROM" or ":" in suite or "/" in suite:
        raise DockerfileError(f"{first.name} {first.text}: only FROM debian:SUITE is understood here")
    if not (bases / suite).is_dir():
        print(f"debootstrap {suite}", flush=True)
        make_base(bases / suite, suite)
    subprocess.run(["cp", "--archive", str(bases / suite), str(folder)], check=True)
    image = Image(RootFolder(folder), context, arguments)
    with image.root.machine_settings() as image.machine:
        for instruction in rest:
            print(f"{instruction.name} {instruction.text}", flush=True)
            image.carry_out(instruction)
    return image
