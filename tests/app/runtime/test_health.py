"""What the runs of a pool tell of it, without the pool."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from app.runtime.health import MAX_FAILED, MAX_GIVEN_UP, RunHealth
from tests.fakes import PATIENCE_S, FakeBackend


def failing(*backends: FakeBackend) -> RunHealth:
    """Of backends whose runs have all failed."""
    health = RunHealth(backends)
    for _ in range(MAX_FAILED):
        assert not health.failed
        health.ended(0, failed=True)
    assert health.failed
    return health


def test_a_run_that_does_not_fail_ends_the_row() -> None:
    """Also once all had failed."""
    health = failing(FakeBackend())
    health.ended(0, failed=False)
    assert not health.failed
    health.ended(0, failed=True)
    assert not health.failed


def test_a_stage_that_always_fails_is_not_hidden_by_those_before_it() -> None:
    """Each image gets through the first one."""
    health = RunHealth([FakeBackend()])
    for _ in range(MAX_FAILED):
        assert not health.failed
        health.ended(0, failed=False)
        health.ended(1, failed=True)
    assert health.failed


def test_runs_given_up_are_never_forgotten() -> None:
    """Each may hold a core for ever, however well the others do."""
    health = RunHealth([FakeBackend()])
    for _ in range(MAX_GIVEN_UP):
        assert not health.failed
        health.gave_up()
        health.ended(0, failed=False)
    assert health.failed


def test_nothing_is_tried_while_not_all_fail() -> None:
    """It would take cores from those who wait."""
    backend = FakeBackend()
    health = RunHealth([backend])
    health.ended(0, failed=True)
    health.try_again()
    assert health._trial is None
    assert backend.warm_ups == 0


def test_one_trial_at_a_time_takes_every_backend() -> None:
    """One that does not end, as where a driver hangs, is not followed by another."""
    began, go_on = threading.Event(), threading.Event()

    class Slow(FakeBackend):
        def warm_up(self, batch_sizes: Sequence[int]) -> None:
            began.set()
            assert go_on.wait(PATIENCE_S)
            super().warm_up(batch_sizes)

    slow, other = Slow(), FakeBackend()
    health = failing(slow, other)
    health.try_again()
    assert began.wait(PATIENCE_S)
    health.try_again()
    go_on.set()
    assert health._trial is not None
    health._trial.join(PATIENCE_S)
    assert (slow.warm_ups, other.warm_ups) == (1, 1)
    assert not health.failed
