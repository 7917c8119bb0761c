"""The operating points of a variant: what a request may ask for as `quality`, from the most faithful to the fastest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from app.errors import InvalidRequest
from models.manifest import BALANCED, FULL, Certificate, VariantSpec

DOWN_AFTER_S = 0.1  # of a long wait without a break; what a step changes is seen after a few batches
TIGHT = 0.6  # of a time budget: where more of it is needed, the next ones may have to be refused
TIGHT_AFTER_S = 0.02  # of that: those in front keep the point they came at, so it goes on for a while
UP_AFTER_S = 2.0
CALM = 0.25
MAX_UP_AFTER_S = 32.0  # after a step up that had to be taken back the next one waits twice as long, up to this


@dataclass(frozen=True)
class Rung:
    """One operating point."""

    index: int  # from the most faithful
    name: str
    thresholds: tuple[float | None, ...]  # one per exit; None: every image that is still there leaves
    certificate: Certificate | None
    is_full: bool  # nobody leaves early

    @cached_property
    def bound(self) -> str:
        """What it costs at most against the full depth, in words; empty where that is not proved."""
        if self.is_full:
            return "every image has the answer of the last exit"
        return "" if self.certificate is None else str(self.certificate)


class Ladder:
    """All operating points of a variant: `full`, `balanced` and those that the manifest adds, in this order."""

    def __init__(self, variant: VariantSpec) -> None:
        early = len(variant.exits) - 1
        balanced = tuple(exit_.threshold for exit_ in variant.exits)
        self._rungs = [
            Rung(0, FULL, (float("inf"),) * early + (None,), None, is_full=True),
            Rung(1, BALANCED, balanced, variant.certificate, is_full=early == 0),
            *(
                Rung(index, point.name, (*point.thresholds, None), point.certificate, is_full=early == 0)
                for index, point in enumerate(variant.points, start=2)
            ),
        ]
        self._index = {rung.name: index for index, rung in enumerate(self._rungs)}

    def __iter__(self) -> Iterator[Rung]:
        return iter(self._rungs)

    def __getitem__(self, index: int) -> Rung:
        return self._rungs[index]

    def __len__(self) -> int:
        return len(self._rungs)

    def lowest_certified(self, start: int) -> int:
        """The last point from this one on of which, as of all between, it is proved what it costs at most."""
        last = start
        while last + 1 < len(self) and self[last + 1].bound:
            last += 1
        return last

    @property
    def thresholds(self) -> Sequence[Sequence[float | None]]:
        """Of each point, one per exit."""
        return [rung.thresholds for rung in self._rungs]

    def index(self, name: str) -> int:
        """Which it is.

        Raises:
            InvalidRequest: there is none of that name.
        """
        if name not in self._index:
            raise InvalidRequest(f"quality is {name!r}; this model has {', '.join(self._index)}")
        return self._index[name]


class QualityController:
    """Which operating point is used now: down the ladder as the wait grows, up again when it has been short for a while.

    Args:
        ladder: of the model.
        default: the point of requests that name none.
        floor: the last one that they are taken down to; the default itself: nothing is bent.
    """

    def __init__(
        self,
        ladder: Ladder,
        *,
        default: int,
        floor: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ladder = ladder
        self._default = default
        self._floor = max(default, floor)
        self._clock = clock
        self._current = default
        self._stepped_at = self._not_low_at = clock()
        self._raised_at = -math.inf
        self._high_since: float | None = None
        self._tight_since: float | None = None
        self._up_after_s = UP_AFTER_S

    @property
    def current(self) -> int:
        """The point of a request that names none."""
        return self._current

    @property
    def steps_down(self) -> int:
        """How far below the default that is."""
        return self._current - self._default

    def observe(self, pressure: float, needed: float = 0.0) -> None:
        """What a request meets that comes now.

        `pressure` above 1 for `DOWN_AFTER_S` without a break, or `needed` above `TIGHT` for `TIGHT_AFTER_S`: a step down,
        another after as long. `pressure` below `CALM` and `needed` below `TIGHT` for `UP_AFTER_S`: one up.

        Args:
            pressure: how long it would wait, as a share of what is bearable.
            needed: how much of its time budget must be left for it not to be refused, as a share of that.
        """
        now = self._clock()
        self._high_since = _since(self._high_since, pressure > 1, now)
        self._tight_since = _since(self._tight_since, needed > TIGHT, now)
        if pressure > CALM or needed > TIGHT:
            self._not_low_at = now
        if self._lasts(self._high_since, DOWN_AFTER_S, now) or self._lasts(self._tight_since, TIGHT_AFTER_S, now):
            self._step_down(now)
        while self._current > self._default and now - max(self._not_low_at, self._stepped_at) >= self._up_after_s:
            self._current -= 1
            self._stepped_at = self._raised_at = max(self._not_low_at, self._stepped_at) + self._up_after_s
        if self._current == self._default and now - max(self._not_low_at, self._stepped_at) >= self._up_after_s:
            self._up_after_s = UP_AFTER_S

    def range(self, wanted: int | None, floor: int | None) -> tuple[int, int]:
        """The point for a request at this load, and the last one that it may be taken down to.

        Args:
            wanted: the point that it names; it gets no more than that.
            floor: the last one that it would take; unset: a point that it names is kept, whatever the load.
        """
        start = self._default if wanted is None else wanted
        last = floor if floor is not None else (self._floor if wanted is None else wanted)
        last = max(start, min(last, self._floor))
        return min(max(start, self._current), last), last

    def _lasts(self, since: float | None, seconds: float, now: float) -> bool:
        """Whether something has gone on for so long, and for so long since the last step."""
        return since is not None and now - max(self._stepped_at, since) >= seconds

    def _step_down(self, now: float) -> None:
        if self._current < self._floor:
            if now - self._raised_at < self._up_after_s:
                self._up_after_s = min(2 * self._up_after_s, MAX_UP_AFTER_S)
            self._current, self._stepped_at, self._raised_at = self._current + 1, now, -math.inf


def _since(since: float | None, goes_on: bool, now: float) -> float | None:
    """Since when without a break."""
    return (now if since is None else since) if goes_on else None
