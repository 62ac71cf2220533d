"""The short run of schemathesis over the whole of `openapi.json`; see `fuzzing` for the long one."""

import re
from pathlib import Path

import pytest

from tests.external.fuzzing import KEY, fuzz, scripted_url

pytestmark = pytest.mark.external


def test_no_request_makes_the_server_fail_or_answer_otherwise_than_it_says(tmp_path: Path) -> None:
    with scripted_url() as url:
        run = fuzz(url, key=KEY, max_examples=15, seed=1, limit_s=300, folder=tmp_path)

    assert run.returncode == 0, run.stdout + run.stderr
    selected, total, tested = map(int, re.findall(r"Selected: (\d+)/(\d+)\s+Tested: (\d+)", run.stdout)[0])
    assert tested == selected == total - 1  # all but the one that ends the server
