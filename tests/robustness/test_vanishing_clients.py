"""Some clients that vanish; many: `python -m tests.robustness.vanishing_clients`."""

import asyncio

import pytest

from tests.robustness.vanishing_clients import FLAGS, WITHIN_S, vanish
from tests.server_process import server_process


@pytest.mark.full
def test_clients_that_vanish_at_any_point_leave_nothing_behind() -> None:
    with server_process(None, *FLAGS) as server:
        report = asyncio.run(vanish(server, num_clients=70, seed=1))

    assert sum(report.num_vanished.values()) == 70
    assert report.after == report.before
    assert report.blocks["free"] + report.blocks["cached"] == report.blocks["total"]
    assert report.all_back_s <= WITHIN_S
