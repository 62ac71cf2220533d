import asyncio

import pytest

from vlm_server.loop_lag import INTERVAL_S, watch_lag


async def test_the_lag_is_what_a_look_comes_too_late() -> None:
    blocked_s = iter((0.0, 0.2, 0.0))
    now_s, lags_s = 0.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        try:
            now_s += seconds + next(blocked_s)
        except StopIteration:
            raise asyncio.CancelledError from None

    with pytest.raises(asyncio.CancelledError):
        await watch_lag(lags_s.append, now_s=lambda: now_s, sleep=sleep)

    assert lags_s == pytest.approx([0.0, 0.2, 0.0])
    assert INTERVAL_S <= 0.05
