"""Which keys there are: from the command line, the environment, and TOML files with names and quotas.

A mistake is an ApiKeysError that names the file and the entry and never shows a key. Knows nothing of HTTP, and keeps digests, not keys.
"""

import hashlib
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_server.quotas import PIXELS_PER_MEGAPIXEL, UNLIMITED, Limits

ENVIRONMENT_VARIABLE = "VLM_SERVER_API_KEYS"
FILE_MARK = "@"  # before the name of a file in a list of keys

MIN_CHARACTERS = 16  # of a key that nobody guesses; shorter ones work and are warned about

_EXAMPLES = ("replace-this", "replace-this-too")  # of deploy/api-keys.example.toml
_MAX_FILE_BYTES = 16 << 20
_MAX_PER_MINUTE = 10**15
_KEY = re.compile(r"[\x21-\x7e]{1,4096}")  # what every client can send in a header as it is
_NAME = re.compile(r"[\w.@+:-]{1,64}", re.ASCII)  # stands in log lines and metrics
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_FIELDS = ("name", "key", "key_sha256", "requests_per_minute", "tokens_per_minute", "megapixels_per_minute")


class ApiKeysError(ValueError):
    """Keys that cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that opens the server. digest: SHA-256 of the key."""

    name: str
    digest: bytes
    limits: Limits = UNLIMITED
    is_short: bool = False  # as far as is known: where a file has only its digest it is not

    @property
    def is_guessable(self) -> bool:
        return self.is_short or self.digest in map(digest_of, _EXAMPLES)


def key_sources(words: Sequence[str] | None, files: Sequence[str] | None, environment: str | None) -> tuple[list[str], list[str]]:
    """Keys and files, from `--api-keys`, `--api-keys-file` and the environment's variable; None: not given.

    Raises ApiKeysError where one is given and empty: a server that was to have keys never starts without.
    """
    for flag, given in (("--api-keys", words), ("--api-keys-file", files)):
        if given is not None and not given:
            raise ApiKeysError(f"{flag}: at least one is needed; leave the flag out to serve whoever comes")
    secret = environment.split() if environment is not None else []
    if environment is not None and not secret:
        raise ApiKeysError(f"{ENVIRONMENT_VARIABLE}: it is set and holds no key; unset it to serve whoever comes")
    if any(word.startswith(FILE_MARK) for word in secret):
        raise ApiKeysError(f"{ENVIRONMENT_VARIABLE}: it takes keys, separated by blanks, and no files; --api-keys-file takes files")
    keys = [word for word in words or () if not word.startswith(FILE_MARK)]
    named = [word.removeprefix(FILE_MARK) for word in words or () if word.startswith(FILE_MARK)]
    return [*keys, *secret], [*named, *(files or ())]


def load_keys(words: Sequence[str], files: Sequence[str]) -> tuple[ApiKey, ...]:
    """The keys `words`, named key-1, key-2 …, and those of the files. Reads files. Raises ApiKeysError."""
    found = [(f"--api-keys: key {number}", _plain(word, number)) for number, word in enumerate(dict.fromkeys(words), 1)]
    for file in files:
        found += _read(Path(file))
    _check_unique(found)
    return tuple(key for _, key in found)


def is_open_to_others(file: str) -> bool:
    """Whether users other than the file's owner and group may read or change it; not where that cannot be seen."""
    try:
        return bool(Path(file).stat().st_mode & (stat.S_IROTH | stat.S_IWOTH))
    except OSError:
        return False


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _plain(word: str, number: int) -> ApiKey:
    if not _KEY.fullmatch(word):
        raise ApiKeysError(f"--api-keys: key {number}: only visible ASCII characters without blanks are allowed")
    return ApiKey(f"key-{number}", digest_of(word), is_short=len(word) < MIN_CHARACTERS)


def _check_unique(found: Sequence[tuple[str, ApiKey]]) -> None:
    names: dict[str, str] = {}
    digests: dict[bytes, str] = {}
    for place, key in found:
        if key.name in names:
            raise ApiKeysError(f"{place}: the name {key.name!r} is that of {names[key.name]} already")
        if key.digest in digests:
            raise ApiKeysError(f"{place}: it is the same key as {digests[key.digest]}")
        names[key.name] = digests[key.digest] = place


def _read(path: Path) -> list[tuple[str, ApiKey]]:
    """Each key under what a message calls it."""
    entries = _entries(path)
    found = []
    for number, entry in enumerate(entries, 1):
        place = f"{path}: keys entry {number}"
        if isinstance(entry, dict) and isinstance(name := entry.get("name"), str) and _NAME.fullmatch(name):
            place += f" ({name})"
        found.append((place, _key(entry, place)))
    return found


def _entries(path: Path) -> list[Any]:
    try:
        if not path.is_file():
            raise ApiKeysError(f"{path}: there is no such file" if not path.exists() else f"{path}: it is no regular file")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ApiKeysError(f"{path}: it has more than {_MAX_FILE_BYTES >> 20} MiB")
        content = tomllib.loads(path.read_text("utf-8"))
    except ApiKeysError:
        raise
    except OSError as error:
        raise ApiKeysError(f"{path}: it cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ApiKeysError(f"{path}: it is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ApiKeysError(f"{path}: it is not TOML, seen at {_place(error)}") from None
    except ValueError as error:
        raise ApiKeysError(f"{path}: it holds a number of thousands of digits") from error
    except RecursionError as error:
        raise ApiKeysError(f"{path}: it is nested too deeply") from error
    if unknown := sorted(content.keys() - {"keys"}):
        raise ApiKeysError(f"{path}: {unknown[0]!r} is not known; only entries [[keys]] are allowed")
    entries = content.get("keys")
    if not isinstance(entries, list) or not entries:
        raise ApiKeysError(f"{path}: it has no entry [[keys]]")
    return entries


def _place(error: tomllib.TOMLDecodeError) -> str:
    """Line and column alone: what stands there may be a key."""
    found = re.search(r"\(at ([^()]*)\)$", str(error))
    return found[1] if found else "an unknown place"


def _key(entry: object, place: str) -> ApiKey:
    if not isinstance(entry, dict):
        raise ApiKeysError(f"{place}: it is no table; write [[keys]]")
    if unknown := sorted(entry.keys() - set(_FIELDS)):
        raise ApiKeysError(f"{place}: {unknown[0]!r} is not known; there are {', '.join(_FIELDS)}")
    pixels = _number(entry, "megapixels_per_minute", place, kinds=(int, float), unit=PIXELS_PER_MEGAPIXEL)
    limits = Limits(_number(entry, "requests_per_minute", place), _number(entry, "tokens_per_minute", place), pixels)
    name, digest = _text(entry, "name", place, _NAME, "1 to 64 letters, digits and . _ @ + : -"), _digest(entry, place)
    return ApiKey(name, digest, limits, is_short=len(entry.get("key", "x" * MIN_CHARACTERS)) < MIN_CHARACTERS)


def _digest(entry: Mapping[str, Any], place: str) -> bytes:
    if ("key" in entry) == ("key_sha256" in entry):
        raise ApiKeysError(f"{place}: exactly one of key and key_sha256 is needed")
    if "key" in entry:
        return digest_of(_text(entry, "key", place, _KEY, "visible ASCII characters without blanks"))
    return bytes.fromhex(_text(entry, "key_sha256", place, _DIGEST, "64 hexadecimal digits"))


def _text(entry: Mapping[str, Any], field: str, place: str, pattern: "re.Pattern[str]", allowed: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ApiKeysError(f"{place}: {field}: a string of {allowed} is needed")
    return value


def _number(
    entry: Mapping[str, Any], field: str, place: str, *, kinds: tuple[type[int] | type[float], ...] = (int,), unit: int = 1
) -> int | None:
    """In whole units; None where the field is left out."""
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, kinds) or not 1 <= value * unit <= _MAX_PER_MINUTE:
        kind = "number" if float in kinds else "whole number"
        raise ApiKeysError(f"{place}: {field}: a {kind} above 0 is needed; leave the field out for no limit")
    return round(value * unit)
