"""docs/security.md names every limit, with the default that it has, and nothing that does not exist."""

import importlib
import re
from dataclasses import MISSING, fields
from typing import Any

import pytest

from engine.config import EngineConfig
from tests.vlm_server.error_scan import ROOT
from vision.config import VisionConfig
from vlm_server.cli import _DISABLING_SWITCHES
from vlm_server.config import ConnectionLimits, RequestLimits, ServerConfig
from vlm_server.flags import FLAGS

PAGE = ROOT / "docs" / "security.md"

CONFIGS: dict[str, type[Any]] = {
    "engine": EngineConfig,
    "vision": VisionConfig,
    "server": ServerConfig,
    "connections": ConnectionLimits,
    "limits": RequestLimits,
}
NO_LIMITS = {"server-port", "sse-ping-s", "tp", "cache-block-seq-len", "num-threads", "seed"}  # numbers that bound nothing
_ALL_FLAGS = [flag for group in FLAGS.values() for flag in group]


def _defaults(config: type[Any]) -> dict[str, Any]:
    return {field.name: field.default for field in fields(config) if field.default is not MISSING}


FLAG_DEFAULTS: dict[str, Any] = {
    flag.name: _defaults(CONFIGS[flag.config])[flag.target]
    for flag in _ALL_FLAGS
    if flag.kind in (int, float) and flag.config in CONFIGS and flag.name not in NO_LIMITS
}
_SET_BY_FLAGS = {(flag.config, flag.target) for flag in _ALL_FLAGS}
FIELD_DEFAULTS: dict[str, Any] = {
    f"{config.__name__}.{name}": value
    for key, config in CONFIGS.items()
    for name, value in _defaults(config).items()
    if isinstance(value, int | float) and not isinstance(value, bool) and (key, name) not in _SET_BY_FLAGS
}
_FIELDS = tuple(f"{config.__name__}." for config in CONFIGS.values())


def shown(name: str, value: Any) -> str:
    """A default as the page writes it: bytes in MiB where they are whole ones, seconds as such."""
    if value is None:
        return "by model and device"
    if name.lower().endswith(("-s", "_s", "-ttl")) and not name.endswith("per-s"):
        return f"{value:,g} s" if value < 3600 else f"{value / 3600:g} h"
    if "bytes" in name.lower() and isinstance(value, int):
        for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value % size == 0:
                return f"{value // size} {unit}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def rows() -> dict[str, list[str]]:
    """First cell → the other cells of every row that has a name in code as its first."""
    table: dict[str, list[str]] = {}
    for line in PAGE.read_text().splitlines():
        found = re.fullmatch(r"\| `(--[a-z0-9-]+|[A-Za-z_.]+[A-Za-z_])` \| (.*) \|", line)
        if found and (found[1].startswith(("--", *_FIELDS)) or found[1].rpartition(".")[2].isupper()):
            assert found[1] not in table, f"docs/security.md has two rows of {found[1]}"
            table[found[1]] = found[2].split(" | ")
    return table


def test_every_limit_has_a_row_with_its_default_and_a_reason() -> None:
    expected = {f"--{name}": shown(name, value) for name, value in FLAG_DEFAULTS.items()}
    expected |= {name: shown(name, value) for name, value in FIELD_DEFAULTS.items()}
    table = rows()

    missing = [f"| `{name}` | {default} | why |" for name, default in expected.items() if name not in table]
    wrong = [
        f"{name}: the page says {table[name][0]}, the code {default}"
        for name, default in expected.items()
        if name in table and table[name][0] != default
    ]

    assert not missing, "docs/security.md lacks these rows (a number that bounds nothing goes into NO_LIMITS):\n" + "\n".join(missing)
    assert not wrong, "\n".join(wrong)
    assert [name for name, cells in table.items() if len(cells) != 2 or not cells[1].endswith(".")] == [], "give the reason, as a sentence"


def test_no_row_is_about_a_limit_that_there_is_not() -> None:
    known = {f"--{name}" for name in FLAG_DEFAULTS} | set(FIELD_DEFAULTS)

    strange = [name for name in rows() if name not in known and not name.rpartition(".")[2].isupper()]

    assert not strange, f"docs/security.md has rows of {', '.join(strange)}, which do not exist"


def test_the_constants_have_the_values_that_the_page_gives() -> None:
    constants = {name: cells[0] for name, cells in rows().items() if name.rpartition(".")[2].isupper()}

    values = {name: getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in constants}

    assert constants == {name: shown(name, value) for name, value in values.items()}
    assert constants


def test_every_flag_that_the_page_names_exists() -> None:
    known = {f"--{flag.name}" for flag in _ALL_FLAGS} | set(_DISABLING_SWITCHES)

    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", PAGE.read_text())) - known == set()


def test_the_pages_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("max-body-bytes", 128 << 20, "128 MiB"),
        ("max-body-bytes", 1000, "1,000"),
        ("fetch-timeout-s", 30.0, "30 s"),
        ("file-ttl", 86400.0, "24 h"),
        ("min-download-bytes-per-s", 1024.0, "1024"),
        ("max-messages", 4096, "4,096"),
        ("session-len", None, "by model and device"),
    ],
)
def test_defaults_are_shown_as_people_read_them(name: str, value: Any, text: str) -> None:
    assert shown(name, value) == text
