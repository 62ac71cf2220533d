"""The long shows in short: overload, hostile servers beside a chat, mixed load. Times and growth are for a quiet machine to judge."""

import asyncio
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.robustness import overload
from tests.robustness.hostile_servers import SEND_TIMEOUT_S, attack, origin_process
from tests.robustness.memory import MIB, SHARED, History, held_by, sample
from tests.robustness.soak import MAX_SLOPE_BYTES, SMALL_CACHES, Report, soak
from tests.server_process import server_process
from vision.shared_array import SharedArray


def history(sizes_mib: list[float], *, step_s: float = 2.0) -> History:
    made = History()
    for number, size in enumerate(sizes_mib):
        made.add(number * step_s, int(size * MIB))
    return made


def report_of(sizes_mib: list[float], *, minutes: float = 30.0) -> tuple[Report, History]:
    made = history(sizes_mib, step_s=minutes * 60 / len(sizes_mib))
    report = Report(minutes, {"server 1": made}, num_requests=1)
    return report, made


@pytest.mark.parametrize(
    ("sizes_mib", "has_grown"),
    [
        ([100.0] * 900, False),
        ([100.0 + 50 * min(1, 6 * number / 900) for number in range(900)], False),  # the caches fill
        ([100.0 + 40 * (number % 15 > 0) for number in range(900)], False),  # work comes and goes
        ([100.0 + 4 * number / 900 for number in range(900)], True),  # 1.3 MiB per 10 minutes
        ([100.0 + 2.4 * number / 900 for number in range(900)], False),
        ([100.0] * 860 + [111.0] * 40, True),
    ],
)
def test_growth_is_told_from_caches_that_fill_and_work_that_comes_and_goes(sizes_mib: list[float], has_grown: bool) -> None:
    report, made = report_of(sizes_mib)

    assert report.has_grown(made) == has_grown
    assert report.is_good != has_grown
    assert any("GROWS" in line for line in report.lines()) == has_grown


def test_a_time_that_is_too_short_shows_no_trend() -> None:
    report, made = report_of([100.0 + 6 * number / 900 for number in range(900)], minutes=10)

    assert made.slope(since_s=report.trend_s, step_s=20) > MAX_SLOPE_BYTES
    assert not report.has_grown(made)


def test_workers_that_came_later_or_ended_before_are_no_growth() -> None:
    report, _ = report_of([100.0] * 900)
    report.histories["late 2"], report.histories["ended 3"] = History(), History()
    for time_s in range(0, 1800, 2):
        report.histories["late 2" if time_s > 1000 else "ended 3"].add(time_s, time_s * MIB)

    assert list(report.lasting) == ["server 1"]
    assert report.is_good


def test_a_process_is_weighed_without_what_it_shares_and_shared_memory_once() -> None:
    before = sample(os.getpid())[SHARED]
    shared = SharedArray.copy_of(np.ones(4 << 20, np.uint8))
    again = os.dup(shared.fd)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[again])
    try:
        weighed = sample(os.getpid())
    finally:
        child.communicate()
        os.close(again)
        shared.close()

    assert weighed[SHARED] - before == 4 << 20
    assert {f"{sys.executable} {child.pid}"} <= set(weighed)
    assert held_by(child.pid) == 0


@pytest.mark.parametrize(("throughputs", "keeps_up"), [([9.1, 13.6], True), ([8.0, 15.5], True), ([9.1, 13.0], False)])
def test_a_flood_is_compared_with_the_capacity_around_it(throughputs: list[float], keeps_up: bool) -> None:
    assert overload.Report(capacities=[10.0, 10.0, 20.0], throughputs=throughputs).keeps_up == keeps_up


@pytest.mark.full
def test_under_overload_every_request_has_one_answer_of_its_own() -> None:
    flags = ("--max-waiting", str(2 * overload.BATCH), "--max-batch-size", str(overload.BATCH), "--log-level", "WARNING")
    with server_process(None, *flags) as server:
        report = asyncio.run(overload.overload(server, measure_s=8, flood_s=10, rounds=1))

    assert report.wrong == []
    assert report.is_whole
    assert report.num_refused > 0 < report.num_answered


@pytest.mark.full
def test_hostile_servers_and_unread_connections_end_beside_a_chat() -> None:
    flags = ("--allow-private-media", "127.0.0.0/8", "--send-timeout-s", f"{SEND_TIMEOUT_S:g}", "--log-level", "WARNING")
    with origin_process() as origins, server_process(None, *flags) as server:
        report = asyncio.run(attack(server, origins, num_requests=40, rounds=1, chats=1))

    assert report.wrong == []
    assert report.num_unread == 10
    assert sum(report.outcomes.values()) == 30


@pytest.mark.full
def test_mixed_load_is_answered_as_it_should_be() -> None:
    with server_process(None, *SMALL_CACHES) as server:
        report = asyncio.run(soak(server, minutes=0.5, pause_s=0.01))

    assert report.unexpected == []
    assert report.num_requests > 10
