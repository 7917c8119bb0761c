"""How late the loop is: seen, remembered for a while, forgotten."""

from __future__ import annotations

import asyncio
import time

import pytest

from app.scheduling.loop_lag import PERIOD_S, WINDOW_S, LoopLag

pytestmark = pytest.mark.anyio


async def test_a_loop_that_is_held_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """By as long as it was held; two windows later that is forgotten."""
    now = 100.0
    monkeypatch.setattr("app.scheduling.loop_lag.time", type("Clock", (), {"perf_counter": staticmethod(lambda: now)}))
    lag = LoopLag()
    lag.start()
    assert lag.seconds == 0
    now += PERIOD_S + 0.25
    lag._tick()
    assert lag.seconds == pytest.approx(0.25)
    for _ in range(2):
        now += PERIOD_S
        lag._tick()
    assert lag.seconds == pytest.approx(0.25)
    for _ in range(2 * round(WINDOW_S / PERIOD_S) + 2):
        now += PERIOD_S
        lag._tick()
    assert lag.seconds < 1e-9
    lag.stop()


async def test_it_watches_by_itself_until_it_is_stopped() -> None:
    """A loop that does nothing else for a while notices it."""
    lag = LoopLag()
    lag.start()
    await asyncio.sleep(0)
    time.sleep(2 * PERIOD_S)  # noqa: ASYNC251 - to hold the loop is the point
    while not lag.seconds:  # noqa: ASYNC110 - its own timer changes it
        await asyncio.sleep(0.001)
    assert lag.seconds > 0.5 * PERIOD_S
    lag.stop()
    assert lag._handle is not None
    assert lag._handle.cancelled()
