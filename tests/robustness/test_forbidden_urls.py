"""No spelling, name or redirect leads the server to an address that is not public; ordinary pictures still come.

All of it in a network namespace without a route out, in which each private address is a trap that counts its visitors.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.closed_internet import NUM_REBOUND
from tests.robustness.forbidden_urls import FORBIDDEN, REDIRECTED

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]


def namespaces_are_allowed() -> bool:
    """Where they are not, tests/vision/test_addresses.py and test_fetcher.py check the same rules with a scripted resolver."""
    try:
        done = subprocess.run(["unshare", "--net", "--mount", "ip", "link", "set", "lo", "up"], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the server answered, and whom it visited."""
    if not namespaces_are_allowed():
        pytest.skip("network namespaces are not allowed here")
    file = tmp_path_factory.mktemp("internet") / "found.json"
    command = [sys.executable, "-m", "tests.robustness.closed_internet", str(file)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=300)
    answers: dict[str, Any] = json.loads(file.read_text())
    return answers


def test_the_table_is_long_and_holds_nothing_twice() -> None:
    assert len(set(FORBIDDEN)) == len(FORBIDDEN) >= 60
    assert len(set(REDIRECTED)) == len(REDIRECTED) >= 20


def test_no_trap_was_ever_visited(found: dict[str, Any]) -> None:
    assert found["trapped"] == {}


@pytest.mark.parametrize("kind", ["forbidden", "redirected", "redirected twice"])
def test_every_forbidden_url_is_refused_by_name(found: dict[str, Any], kind: str) -> None:
    others = {url: answer for url, answer in found[kind].items() if answer != [400, "url_blocked"]}

    assert others == {}


def test_a_name_that_changes_its_mind_leads_to_its_public_address_or_nowhere(found: dict[str, Any]) -> None:
    answers = [tuple(answer) for answer in found["rebound"]]

    assert len(answers) == NUM_REBOUND
    assert set(answers) == {(200, None), (400, "url_blocked")}


def test_ordinary_pictures_come(found: dict[str, Any]) -> None:
    assert set(map(tuple, found["public"].values())) == {(200, None)}
    assert found["public redirected"] == [200, None]
    assert found["served"]["93.184.216.34"] >= 4
