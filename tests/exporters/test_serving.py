"""How a version is best served: every division of the CPUs, all instances at once, and a batch no larger than is worth it."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import pytest

from app.exits import ExitPolicy
from app.types import StageOutput
from exporters import serving
from exporters.serving import BATCH_SIZES, ServingFigures, best_of, measure_serving, parallel_speedup, threads_to_try
from models.manifest import PIXELS, ExitSpec

ONE_EXIT = ExitPolicy([ExitSpec(score="max_softmax", temperature=1, threshold=None)])


class Meeting:
    """Waits in its first run until as many instances are there as are wanted, so that those were at work at once."""

    def __init__(self, instances: int) -> None:
        self.barrier = threading.Barrier(instances, timeout=30)
        self.largest = 0

    def run(self, stage: int, inputs: Mapping[str, np.ndarray]) -> StageOutput:
        assert stage == 0
        self.barrier.wait()
        self.largest = max(self.largest, len(inputs[PIXELS]))
        return StageOutput(logits=np.zeros((len(inputs[PIXELS]), 2), np.float32), state={})

    def warm_up(self, batch_sizes: object) -> None: ...

    def close(self) -> None: ...


def test_all_instances_are_at_work_at_once() -> None:
    """For each number of threads as many as fill the CPUs, at every batch size."""
    backends = {1: Meeting(4), 4: Meeting(1)}
    found = measure_serving(backends, ONE_EXIT, (0,), np.zeros((100, 1), np.uint8), cpus=4)

    assert [(each.instances, each.intra_op_threads) for each in found] == [(4, 1)] * 5 + [(1, 4)] * 5
    assert tuple(each.max_batch_size for each in found[:5]) == BATCH_SIZES
    assert all(each.images_per_s > 0 for each in found)
    assert backends[1].largest == max(BATCH_SIZES)


def test_a_larger_batch_must_be_worth_its_wait() -> None:
    """A percent is not; ten are."""
    measured = [
        ServingFigures(2, 1, 1, 80),
        ServingFigures(2, 1, 8, 99),
        ServingFigures(2, 1, 32, 100),
        ServingFigures(1, 2, 8, 98),
    ]
    best = best_of(measured)
    assert (best.instances, best.max_batch_size) == (2, 8)
    assert best.settings == {
        "FOVEA_RUNTIME__INSTANCES": 2,
        "FOVEA_RUNTIME__INTRA_OP_THREADS": 1,
        "FOVEA_BATCHING__MAX_BATCH_SIZE": 8,
    }


@pytest.mark.parametrize(("cpus", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 6]), (16, [1, 2, 4, 16])])
def test_threads_divide_the_cpus(cpus: int, expected: list[int]) -> None:
    """One, two, four, all."""
    assert threads_to_try(cpus) == expected


def test_the_speedup_is_of_images_not_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads that take twice as long as one do twice its work."""
    monkeypatch.setattr(serving, "_seconds", lambda _run, _pixels, instances: 2.0 if instances == 4 else 1.0)
    assert parallel_speedup(lambda _: None, np.zeros((4, 1)), 4) == 2
