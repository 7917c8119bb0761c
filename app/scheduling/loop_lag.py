"""How late the event loop is: what comes in waits so long before anything here knows of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PERIOD_S = 0.05
WINDOW_S = 1.0  # the worst of the last one to two of these counts


class LoopLag:
    """Watches the running loop by a timer. For one event loop.

    Args:
        on_tick: called every `PERIOD_S`, for what has to be looked at then.
    """

    def __init__(self, on_tick: Callable[[], None] = lambda: None) -> None:
        self._on_tick = on_tick
        self._handle: asyncio.TimerHandle | None = None
        self._due_at = self._window_ends_at = 0.0
        self._worst = self._worst_before = 0.0

    @property
    def seconds(self) -> float:
        """How late its timers were at worst, lately."""
        return max(self._worst, self._worst_before)

    def start(self) -> None:
        """Watch the running loop until `stop`."""
        self._due_at = time.perf_counter() + PERIOD_S
        self._handle = asyncio.get_running_loop().call_later(PERIOD_S, self._tick)

    def stop(self) -> None:
        """Watch no longer."""
        if self._handle is not None:
            self._handle.cancel()

    def _tick(self) -> None:
        now = time.perf_counter()
        self._worst = max(self._worst, now - self._due_at)
        if now >= self._window_ends_at:
            self._worst_before, self._worst = self._worst, 0.0
            self._window_ends_at = now + WINDOW_S
        self.start()
        self._on_tick()
