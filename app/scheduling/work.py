"""One image on its way through the stages."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from app.types import Array, PipelineResult


@dataclass(eq=False, slots=True)
class WorkItem:
    """Held by exactly one queue or one batch at a time.

    Times are those of `time.perf_counter`, in seconds; uvloop's own clock goes in whole milliseconds.
    """

    inputs: Mapping[str, Array]  # of one image: no batch axis; replaced by the state after each stage
    future: asyncio.Future[PipelineResult]
    queued_at: float  # reset at each stage
    deadline: float = math.inf  # by the same clock: what cannot be computed by then is not begun
    point: int = 0  # operating point of its model, by which it may leave
    history: tuple[int, int] = (-1, 0)  # what the exits so far said, as `app.exits.History`, where that counts
    queue_s: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)

    @property
    def abandoned(self) -> bool:
        """Nobody waits for it any more: its caller left, or it was failed."""
        return self.future.done()

    def fail(self, error: Exception) -> None:
        """Let the caller see the error, if there still is a caller."""
        if not self.future.done():
            self.future.set_exception(error)
