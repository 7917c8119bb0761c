"""When a new image would have its answer: from what is in front of it, what that costs, and how far off the last answers were.

Where threads of their own decode, that and computing go on at the same time, so what takes longer decides. What is in front
is told by the queues, its cost by curves that follow the machine; what both leave out (batches that are not full, threads that
wait for each other, other processes) the last answers tell: by what factor they took longer, and a high quantile of what is
beyond it. A promise that failed makes the next ones more careful, as in adaptive conformal inference (Gibbs and Candès,
NeurIPS 2021), over a window.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

QUANTILE = 0.995  # of the errors: some of the one in a hundred is left for what no error shows
WINDOW = 512  # answers
MAX_AGE_S = 10.0  # of an answer: whoever is refused teaches nothing, so that too much care must end by itself
REFRESH_S = 0.1  # until both are looked up again: it takes a quarter of a millisecond
MIN_ANSWERS = 8
MAX_FACTOR = 4.0


class Decoding(Protocol):
    """What is known of the decode threads."""

    @property
    def num_threads(self) -> int: ...

    @property
    def unfinished(self) -> int:
        """Images that wait for a thread, or are on one."""
        ...

    @property
    def mean_job_s(self) -> float:
        """What one takes on its thread, lately."""
        ...


class Computing(Protocol):
    """What is known of a pipeline."""

    @property
    def num_images(self) -> int:
        """Images that are in it."""
        ...

    def outlook(self, more: int, point: int) -> tuple[float, float]:
        """Seconds of work before the last of so many new images, and what its own batches take."""
        ...


class Correction:
    """What the last answers say of the predictions: how much too short they are as a rule, and how much more at worst."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._answers: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)  # when, predicted, and how long it took
        self._refreshed_at = -math.inf
        self._factor, self._margin_s = 1.0, 0.0

    def add(self, predicted_s: float, took_s: float) -> None:
        """One more answer."""
        now = self._clock()
        self._answers.append((now, predicted_s, took_s))
        if now - self._refreshed_at >= REFRESH_S or len(self._answers) <= MIN_ANSWERS:
            self._refresh()

    @property
    def factor(self) -> float:
        """To multiply a prediction by."""
        self._forget()
        return self._factor

    @property
    def margin_s(self) -> float:
        """To add to it then, for safety; never less than nothing."""
        self._forget()
        return self._margin_s

    def _forget(self) -> None:
        if self._answers:
            now = self._clock()
            if now - self._answers[0][0] > MAX_AGE_S and now - self._refreshed_at >= REFRESH_S:
                self._refresh()

    def _refresh(self) -> None:
        self._refreshed_at = self._clock()
        oldest = self._refreshed_at - MAX_AGE_S
        while self._answers and self._answers[0][0] < oldest:
            self._answers.popleft()
        predicted_s, took_s = (sum(answer[part] for answer in self._answers) for part in (1, 2))
        known = len(self._answers) >= MIN_ANSWERS and predicted_s > 0
        self._factor = min(max(took_s / predicted_s, 1 / MAX_FACTOR), MAX_FACTOR) if known else 1.0
        errors = sorted(took - self._factor * predicted for _, predicted, took in self._answers)
        self._margin_s = max(0.0, errors[math.ceil(QUANTILE * len(errors)) - 1]) if errors else 0.0


class Forecast:
    """Of one model.

    Args:
        lag: seconds that the event loop is late, which no answer shows: a request waits them before its time is taken.
        decodes: the pipeline decodes by itself, so that the decode threads have only what it leaves to them.
    """

    def __init__(
        self,
        decoding: Decoding,
        computing: Computing,
        lag: Callable[[], float],
        correction: Correction | None = None,
        *,
        decodes: bool = False,
    ) -> None:
        self._decodes = decodes
        self._decoding = decoding
        self._computing = computing
        self._lag = lag
        self._correction = correction if correction is not None else Correction()

    @property
    def in_front(self) -> int:
        """Images that are decoded or computed before a new one."""
        return self._decoding.unfinished + self._computing.num_images

    def predict_s(self, images: int, point: int) -> float:
        """When so many new images would have their answers at an operating point, by queues and costs alone."""
        decoding = self._decoding
        waiting = decoding.unfinished + images
        to_decode = decoding.unfinished if self._decodes else waiting
        decode_s = to_decode * decoding.mean_job_s / decoding.num_threads
        before_s, own_s = self._computing.outlook(waiting, point)
        return max(decode_s, before_s) + own_s

    def expected_s(self, predicted_s: float) -> float:
        """The same as the last answers have it: as likely sooner as later."""
        return self._correction.factor * predicted_s

    def needed_s(self, predicted_s: float) -> float:
        """What must be left of a time budget: one answer in two hundred comes later."""
        return self._correction.factor * predicted_s + self._correction.margin_s + self._lag()

    def learn(self, predicted_s: float, took_s: float) -> None:
        """What came of a prediction; where the time budget ended first, so long."""
        self._correction.add(predicted_s, took_s)
