"""One image on its way through the stages."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from app.types import Array, PipelineResult

TOO_LATE = "the image could not be computed within its time budget, so it was not begun"


@dataclass(frozen=True, eq=False, slots=True)
class Undecoded:
    """An image that is decoded where it is computed (docs/adr/0021)."""

    decode: Callable[[], Array | None]  # on the instance's thread; None: it takes so long that it would keep others waiting
    defer: Callable[[], None]  # then called on the loop: somebody else decodes it and brings it again


@dataclass(eq=False, slots=True)
class WorkItem:
    """Held by exactly one queue or one batch at a time.

    Times are those of `time.perf_counter`, in seconds; uvloop's own clock goes in whole milliseconds.
    """

    inputs: Mapping[str, Array]  # of one image: no batch axis; what the stage it waits for takes
    future: asyncio.Future[PipelineResult]
    queued_at: float  # reset at each stage
    deadline: float = math.inf  # by the same clock: what cannot be computed by then is not begun
    point: int = 0  # operating point of its model, by which it may leave
    undecoded: Undecoded | None = None  # then it has no inputs yet
    history: tuple[int, int] = (-1, 0)  # what the exits so far said, as `app.exits.History`, where that counts
    decode_s: float = 0.0  # in the batch; 0 where it came decoded
    queue_s: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)

    @property
    def abandoned(self) -> bool:
        """Nobody waits for it any more: its caller left, or it was failed. May be asked on any thread."""
        return self.future.done()

    def answer(self, result: PipelineResult) -> None:
        """Let the caller have the result, if there still is a caller."""
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Let the caller see the error, if there still is a caller."""
        if not self.future.done():
            self.future.set_exception(error)
