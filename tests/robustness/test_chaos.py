"""Each kind of process killed once under load; for minutes: `python -m tests.robustness.chaos`."""

import asyncio

import pytest

from tests.robustness.chaos import FLAGS, KINDS, RECOVERED_WITHIN_S, chaos, redis
from tests.server_process import server_process


@pytest.mark.full
def test_whatever_is_killed_every_request_gets_a_true_answer_or_a_clear_error() -> None:
    with redis() as store, server_process(None, "--session-store", store.url, *FLAGS) as server:
        report = asyncio.run(chaos(server, store, seconds=1, seed=1))

    assert report.wrong == []
    assert set(report.num_kills.values()) == {1}
    assert max(report.slowest_recovery_s.values()) <= RECOVERED_WITHIN_S
    assert report.num_restarts == 1
    assert set(report.num_true) == set(KINDS)
