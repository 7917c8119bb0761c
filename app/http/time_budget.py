"""How long a request may take: what it asks for, what its model allows, and the timer that ends it."""

from __future__ import annotations

import asyncio
import time

from app.errors import InvalidRequest
from app.settings import Settings

TIMEOUT_HEADER = b"x-request-timeout-ms"


class TimeBudget:
    """The time of one request: at first the longest there is, until its model and what it asks for are known."""

    def __init__(self, longest_s: float, started: float) -> None:
        self.seconds = longest_s
        self.timer: asyncio.Timeout | None = None
        self._started = started

    @property
    def deadline(self) -> float:
        """By `time.perf_counter`."""
        return self._started + self.seconds

    @property
    def left_s(self) -> float:
        return self.deadline - time.perf_counter()

    def shorten(self, seconds: float) -> None:
        """Where it is less."""
        if seconds >= self.seconds:
            return
        self.seconds = seconds
        if self.timer is not None:
            self.timer.reschedule(asyncio.get_running_loop().time() + self.left_s)


def budget_s(settings: Settings, model: str, timeout_ms: int | None) -> float:
    """The seconds that a request may take.

    Args:
        model: which it is for.
        timeout_ms: what it asks for; None: nothing.

    Raises:
        InvalidRequest: more than there is.
    """
    longest_s = settings.http.request_timeout_s
    ours = settings.deadlines.models.get(model)
    if ours is not None and ours.max_ms is not None:
        longest_s = min(longest_s, ours.max_ms / 1000)
    if timeout_ms is not None:
        if timeout_ms > 1000 * longest_s:
            raise InvalidRequest(f"timeout_ms is {timeout_ms}; {model} takes at most {1000 * longest_s:g}")
        return timeout_ms / 1000
    default_ms = ours.default_ms if ours is not None and ours.default_ms is not None else settings.deadlines.default_ms
    return longest_s if default_ms is None else min(longest_s, default_ms / 1000)


def timeout_asked_ms(value: str) -> int | None:
    """What the header says, in milliseconds; None where it is not there.

    Raises:
        InvalidRequest: it cannot be read.
    """
    if not value:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and int(value)):
        raise InvalidRequest(f"{TIMEOUT_HEADER.decode()} is {value!r}; it must be a whole number of milliseconds, at least 1")
    return int(value)
