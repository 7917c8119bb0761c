"""Whether the runs of a model can be trusted, for readiness to tell: told by those that end, and by trials while all fail."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from app.log import get_logger
from app.runtime.backend import Backend

log = get_logger(__name__)

MAX_GIVEN_UP = 8  # threads that may be stuck for ever: beyond it the process is not to be trusted any more
MAX_FAILED = 8  # runs of a stage in a row: then it is not the images


class RunHealth:
    """Of one pool.

    Args:
        backends: each once; a trial runs them all.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = tuple(backends)
        self._num_given_up = 0
        self._num_failed: dict[int, int] = {}  # runs in a row, by stage
        self._trial: threading.Thread | None = None

    @property
    def failed(self) -> bool:
        """So many runs never ended that a restart is the better way, or all runs of a stage fail, as did each trial since."""
        return self._num_given_up >= MAX_GIVEN_UP or self._all_fail

    def ended(self, stage: int, *, failed: bool) -> None:
        """A run has; called on the instances' threads."""
        count = self._num_failed[stage] = self._num_failed.get(stage, 0) + 1 if failed else 0
        if count == MAX_FAILED:
            log.error("all runs fail: not ready until a trial does not", stage=stage, runs=count)

    def gave_up(self) -> None:
        """A run did not end, and its thread was left to itself."""
        self._num_given_up += 1

    def try_again(self) -> None:
        """While all runs fail, begin a trial, unless one goes on: whoever sends to the ready alone sends nothing that tells."""
        if self._all_fail and not (self._trial and self._trial.is_alive()):
            self._trial = threading.Thread(target=self._try, name="trial", daemon=True)
            self._trial.start()

    @property
    def _all_fail(self) -> bool:
        return any(count >= MAX_FAILED for count in tuple(self._num_failed.values()))

    def _try(self) -> None:
        try:
            for backend in self._backends:
                backend.warm_up([1])
        except Exception as error:
            log.warning("runs still fail", error=str(error))
        else:
            self._num_failed.clear()
            log.info("a trial did not fail: ready again")
