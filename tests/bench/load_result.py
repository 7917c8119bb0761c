"""What a load run found: one row per request, and the figures read off the rows. Times in seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.bench.http_client import Answer, Outcome

OUTCOMES = tuple(Outcome)
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LoadResult:
    """Every request of a run, exactly once, in the order in which they ended; times count from the start of the run.

    `due_s` is when a request had to be sent: by the schedule in an open loop, when its connection was free in a closed
    one. `measured_s` is the window that figures are taken from: latencies of the requests due in it, answers per second
    of those that finished in it. Counts are over everything.
    """

    outcome: npt.NDArray[np.uint8]  # (N,), index into OUTCOMES
    due_s: Seconds  # (N,)
    sent_s: Seconds  # (N,), later than due by the generator's own lateness
    finished_s: Seconds  # (N,)
    image: npt.NDArray[np.int32]  # (N,), which of the bodies was sent
    measured_s: tuple[float, float]
    elapsed_s: float  # start to the last answer
    cpu_s: float  # CPU time of this process during the run
    num_connections: int  # opened in all
    answers: tuple[Answer, ...] = ()  # (N,) with bodies, where they were kept

    @property
    def num_requests(self) -> int:
        return len(self.outcome)

    @property
    def counts(self) -> dict[Outcome, int]:
        """Requests by outcome, over the whole run; all outcomes are there."""
        return self._counts(np.ones(self.num_requests, dtype=bool))

    @property
    def counts_due(self) -> dict[Outcome, int]:
        """The same of the requests due in the measured window."""
        return self._counts(self._due)

    @property
    def latencies(self) -> Seconds:
        """Due to answered, of the requests that were due in the measured window and answered OK; seconds, unsorted."""
        rows = self._due & self._ok
        return np.asarray(self.finished_s[rows] - self.due_s[rows])

    @property
    def lags(self) -> Seconds:
        """Due to sent, in the measured window: how late the generator itself was; seconds, unsorted."""
        return np.asarray((self.sent_s - self.due_s)[self._due])

    @property
    def ok_per_s(self) -> float:
        """Requests answered OK per second, by when they finished."""
        begin, end = self.measured_s
        inside = self._ok & (self.finished_s >= begin) & (self.finished_s < end)
        return int(inside.sum()) / (end - begin) if end > begin else 0.0

    @property
    def cpu_per_request_s(self) -> float:
        return self.cpu_s / self.num_requests if self.num_requests else float("nan")

    def percentile_s(self, q: float) -> float:
        """The q-th percentile (0 to 100) of `latencies`; NaN when nothing was answered OK."""
        return percentile(self.latencies, q)

    @property
    def _ok(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.outcome == OUTCOMES.index(Outcome.OK))

    @property
    def _due(self) -> npt.NDArray[np.bool_]:
        begin, end = self.measured_s
        return np.asarray((self.due_s >= begin) & (self.due_s < end))

    def _counts(self, rows: npt.NDArray[np.bool_]) -> dict[Outcome, int]:
        numbers = np.bincount(self.outcome[rows], minlength=len(OUTCOMES))
        return {outcome: int(number) for outcome, number in zip(OUTCOMES, numbers, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """What another process needs of it; `measured_s` is the length of the window here."""
        return {
            "counts": {outcome.value: number for outcome, number in self.counts.items()},
            "counts_due": {outcome.value: number for outcome, number in self.counts_due.items()},
            "ok_per_s": self.ok_per_s,
            "measured_s": self.measured_s[1] - self.measured_s[0],
            "elapsed_s": self.elapsed_s,
            "cpu_s": self.cpu_s,
            "num_connections": self.num_connections,
            "latencies_s": self.latencies.round(6).tolist(),
            "ok_due_s": self.due_s[self._due & self._ok].round(4).tolist(),  # of each latency
            "lags_s": self.lags.round(6).tolist(),
        }


@dataclass(slots=True)
class Recorder:
    """Collects the rows of a run and makes the result of them."""

    started_at: float  # time.monotonic()
    keep_bodies: bool = False
    num_connections: int = 0
    rows: list[tuple[Outcome, float, float, float, int]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def add(self, answer: Answer, *, due_at: float, sent_at: float, image: int) -> None:
        """One request has ended; times are of `time.monotonic`."""
        self.rows.append((answer.outcome, due_at, sent_at, answer.finished_at, image))
        if self.keep_bodies:
            self.answers.append(answer)

    def result(self, *, measured_s: tuple[float, float] | None, elapsed_s: float, cpu_s: float) -> LoadResult:
        """Measured over `measured_s`, or over the whole run when it is None."""
        times = np.array([row[1:4] for row in self.rows], dtype=np.float64).reshape(-1, 3) - self.started_at
        return LoadResult(
            outcome=np.array([OUTCOMES.index(row[0]) for row in self.rows], dtype=np.uint8),
            due_s=times[:, 0],
            sent_s=times[:, 1],
            finished_s=times[:, 2],
            image=np.array([row[4] for row in self.rows], dtype=np.int32),
            measured_s=measured_s or (0.0, float(np.nextafter(elapsed_s, np.inf))),
            elapsed_s=elapsed_s,
            cpu_s=cpu_s,
            num_connections=self.num_connections,
            answers=tuple(self.answers),
        )


def percentile(values: Seconds, q: float) -> float:
    """The q-th percentile (0 to 100), linear between neighbours; NaN of nothing."""
    return float(np.percentile(values, q)) if len(values) else float("nan")


def count_line(counts: dict[Outcome, int]) -> str:
    """`ok 512, overloaded 3`: the outcomes that happened."""
    return ", ".join(f"{Counter(counts)[outcome]} {outcome.value}" for outcome in OUTCOMES if counts.get(outcome)) or "none"
