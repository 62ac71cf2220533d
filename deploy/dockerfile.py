"""Reads a Dockerfile and a .dockerignore: the part of their language that ours use. Runs nothing.

An instruction that is not understood is an error, so that nothing in the Dockerfile can be left out silently.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

KNOWN = frozenset(["FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD", "LABEL"])

_VARIABLE = re.compile(r"\$(?:(?P<plain>\w+)|\{(?P<name>\w+)(?::(?P<operator>[-+])(?P<word>(?:[^{}]|\$\{[^{}]*\})*))?\})")
_PAIR = re.compile(r'(?P<name>\w+)=(?P<value>"[^"]*"|\S*)')


class DockerfileError(ValueError):
    """The Dockerfile has something that is not understood; the message quotes it."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """`RUN apt-get update` is `Instruction("RUN", "apt-get update")`; continued lines are joined."""

    name: str
    text: str


def parse(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [_instruction(line) for line in joined.splitlines() if line.strip()]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """With `$NAME`, `${NAME}`, `${NAME:-word}` and `${NAME:+word}` replaced."""

    def value(match: re.Match[str]) -> str:
        known = variables.get(match["plain"] or match["name"], "")
        if match["operator"] == "-":
            return known or expand(match["word"], variables)
        if match["operator"] == "+":
            return expand(match["word"], variables) if known else ""
        return known

    return _VARIABLE.sub(value, text)


def pairs(text: str) -> dict[str, str]:
    """The names and values of an ENV, ARG or LABEL."""
    return {match["name"]: match["value"].strip('"') for match in _PAIR.finditer(text)}


def words(text: str) -> list[str]:
    """A command in either form: `["a", "b"]`, or a line for the shell."""
    if text.startswith("["):
        return [str(word) for word in json.loads(text)]
    return ["/bin/sh", "-c", text]


def health_command(text: str) -> list[str]:
    """What a HEALTHCHECK runs, without its options."""
    match = re.fullmatch(r"(?:--\S+\s+)*CMD\s+(?P<command>.+)", text)
    if not match:
        raise DockerfileError(f"HEALTHCHECK {text}")
    return words(match["command"])


def copied_files(context: Path, sources: Iterable[str], ignore_patterns: Iterable[str]) -> dict[Path, PurePosixPath]:
    """Each file that a COPY of `sources` takes → its path below the destination, a folder: folders give their contents."""
    patterns = [pattern for line in ignore_patterns if (pattern := line.strip()) and not pattern.startswith("#")]
    files: dict[Path, PurePosixPath] = {}
    for source in sources:
        origin = context / source
        if not origin.exists():
            raise DockerfileError(f"COPY {source}: no such file or folder")
        found = [origin] if origin.is_file() else sorted(path for path in origin.rglob("*") if path.is_file())
        taken = [path for path in found if not is_ignored(path.relative_to(context).as_posix(), patterns)]
        if not taken:
            raise DockerfileError(f"COPY {source}: .dockerignore leaves nothing of it")
        files |= {path: PurePosixPath(path.name if origin.is_file() else path.relative_to(origin).as_posix()) for path in taken}
    return files


def is_ignored(path: str, patterns: Iterable[str]) -> bool:
    """The last pattern that matches the path, or a folder above it, decides; `!` takes back in."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    ignored = False
    for pattern in patterns:
        regex = _ignore_regex(pattern.removeprefix("!").strip("/"))
        if any(regex.fullmatch(prefix) for prefix in prefixes):
            ignored = not pattern.startswith("!")
    return ignored


def _instruction(line: str) -> Instruction:
    name, _, text = line.strip().partition(" ")
    if name.upper() not in KNOWN or text.startswith("<<"):
        raise DockerfileError(line)
    return Instruction(name.upper(), text.strip())


def _ignore_regex(pattern: str) -> re.Pattern[str]:
    translated = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(translated.get(piece, re.escape(piece)) for piece in pieces))
