"""How long a request may take: what it asks for, what its model allows, and the timer that ends it."""

from __future__ import annotations

import asyncio
import math
import time

from app.errors import DeadlineExceeded, InvalidRequest
from app.settings import DeadlineSettings


class TimeBudget:
    """The time of one request: at first the longest there is, until its model and what it asks for are known.

    Args:
        longest_s: in seconds; infinite: the request has no time budget.
        started: when the request began, by `time.perf_counter`.
    """

    def __init__(self, longest_s: float, started: float) -> None:
        self.seconds = longest_s
        self._longest_s = longest_s
        self._started = started
        self.timer = asyncio.timeout(None if math.isinf(longest_s) else self.left_s)

    @property
    def deadline(self) -> float:
        """By `time.perf_counter`."""
        return self._started + self.seconds

    @property
    def left_s(self) -> float:
        return self.deadline - time.perf_counter()

    def shorten(self, seconds: float) -> None:
        """To so many, where that is less. Called inside of the timer's context."""
        if seconds >= self.seconds:
            return
        self.seconds = seconds
        self.timer.reschedule(asyncio.get_running_loop().time() + self.left_s)

    def settle(self, deadlines: DeadlineSettings, model: str, timeout_ms: int | None) -> None:
        """Shorten it to what the request may take.

        Args:
            model: which it is for.
            timeout_ms: what it asks for; None: nothing.

        Raises:
            InvalidRequest: it asks for more than there is.
        """
        if math.isinf(self._longest_s):
            return
        ours = deadlines.models.get(model)
        longest_s = self._longest_s if ours is None or ours.max_ms is None else min(self._longest_s, ours.max_ms / 1000)
        if timeout_ms is None:
            default_ms = ours.default_ms if ours is not None and ours.default_ms is not None else deadlines.default_ms
            self.shorten(longest_s if default_ms is None else min(longest_s, default_ms / 1000))
        elif timeout_ms > 1000 * longest_s:
            raise InvalidRequest(f"timeout_ms is {timeout_ms}; {model} takes at most {1000 * longest_s:g}")
        else:
            self.shorten(timeout_ms / 1000)

    def exceeded(self) -> DeadlineExceeded:
        """The error of a request whose time has run out."""
        return DeadlineExceeded(f"the request took longer than its time budget of {self.seconds:g} s; try again later")
