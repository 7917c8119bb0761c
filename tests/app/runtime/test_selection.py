"""The variant that is faster on this machine serves, and the reason says by how much."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from app.runtime.selection import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    TIME_BUDGET_S,
    WORTH_WIDENING_S,
    choose_variant,
    lone_gain,
    time_stages,
)
from app.types import Array, StageOutput
from tests.fakes import NUM_STAGES, PATIENCE_S, Clock, make_manifest

STAGES = make_manifest().stages
BATCH = 8


class TimedBackend:
    """Takes as long for each run as the test says, on the test's clock."""

    def __init__(
        self, name: str, clock: Clock, log: list[tuple[str, int]], seconds: Callable[[int], float], *, at_once: int = 1
    ) -> None:
        self._name = name
        self._clock = clock
        self._log = log
        self._seconds = seconds
        self._num_runs = 0
        self.closed = False
        self._at_once = threading.Barrier(at_once, timeout=PATIENCE_S)
        self.inputs: list[Mapping[str, Array]] = []

    def run(self, stage: int, inputs: Mapping[str, Array]) -> StageOutput:
        self._at_once.wait()
        self._log.append((self._name, stage))
        self.inputs.append(inputs)
        self._clock.advance(self._seconds(self._num_runs))
        self._num_runs += 1
        return StageOutput(np.zeros((BATCH, 2), dtype=np.float32), {})

    def warm_up(self, batch_sizes: Sequence[int]) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log() -> list[tuple[str, int]]:
    """Variant and stage of every run, in order."""
    return []


@pytest.mark.parametrize(("fp32_s", "int8_s", "faster"), [(0.008, 0.002, "int8"), (0.002, 0.008, "fp32")])
def test_the_faster_variant_is_chosen(
    clock: Clock, log: list[tuple[str, int]], fp32_s: float, int8_s: float, faster: str
) -> None:
    """As timed, not as expected: INT8 loses where it is slower. The reason names both and their rates."""
    backends = {
        "fp32": TimedBackend("fp32", clock, log, lambda _: fp32_s),
        "int8": TimedBackend("int8", clock, log, lambda _: int8_s),
    }

    choice = choose_variant(backends, STAGES, batch_size=BATCH, instances=1, clock=clock)

    assert choice.name == faster
    rates = {"fp32": BATCH / (NUM_STAGES * fp32_s), "int8": BATCH / (NUM_STAGES * int8_s)}
    assert choice.images_per_second == pytest.approx(rates)
    other = "fp32" if faster == "int8" else "int8"
    assert choice.reason.startswith(f"{faster} is the fastest here: 1333 images/s = 4.00 x {other} (333/s)")
    assert "batch 8, 1 instances" in choice.reason


def test_one_slow_round_decides_nothing(clock: Clock, log: list[tuple[str, int]]) -> None:
    """The median of the rounds counts: a hiccup of the machine in one of them is forgotten."""
    backends = {
        "fp32": TimedBackend("fp32", clock, log, lambda _: 0.003),
        "int8": TimedBackend("int8", clock, log, lambda run: 1.0 if run == 0 else 0.001),
    }

    assert choose_variant(backends, STAGES, batch_size=BATCH, instances=1, clock=clock).name == "int8"


def test_variants_are_timed_in_turn(clock: Clock, log: list[tuple[str, int]]) -> None:
    """A B A B ..., all stages each time, so that a machine that slows down meanwhile slows both."""
    backends = {name: TimedBackend(name, clock, log, lambda _: 0.001) for name in ("fp32", "int8")}

    choose_variant(backends, STAGES, batch_size=BATCH, instances=1, clock=clock)

    round_ = [(name, stage) for name in ("fp32", "int8") for stage in range(NUM_STAGES)]
    assert log == round_ * MAX_ROUNDS


def test_slow_variants_are_timed_only_as_often_as_needed(clock: Clock, log: list[tuple[str, int]]) -> None:
    """Beyond the time budget no further round begins, but a median needs some."""
    backends = {name: TimedBackend(name, clock, log, lambda _: TIME_BUDGET_S) for name in ("fp32", "int8")}

    choose_variant(backends, STAGES, batch_size=BATCH, instances=1, clock=clock)

    assert len(log) == MIN_ROUNDS * 2 * NUM_STAGES


def test_all_instances_are_busy_while_timing(clock: Clock, log: list[tuple[str, int]]) -> None:
    """As many runs at once as will be in use (here none goes on without the others), and their images all count."""
    backends = {name: TimedBackend(name, clock, log, lambda _: 0.001, at_once=3) for name in ("fp32", "int8")}

    choice = choose_variant(backends, STAGES, batch_size=BATCH, instances=3, clock=clock)

    assert len(log) == MAX_ROUNDS * 2 * NUM_STAGES * 3
    # The fake clock adds the times of runs that are at once on a real one: three runs of three stages, 24 images.
    assert choice.images_per_second["fp32"] == pytest.approx(3 * BATCH / (3 * NUM_STAGES * 0.001))
    assert "3 instances" in choice.reason


def test_timing_uses_the_inputs_of_the_manifest(clock: Clock, log: list[tuple[str, int]]) -> None:
    """Names, types and shapes of every stage, at the batch size in use."""
    backend = TimedBackend("fp32", clock, log, lambda _: 0.001)

    choose_variant({"fp32": backend, "int8": backend}, STAGES, batch_size=BATCH, instances=1, clock=clock)

    for stage, inputs in zip(STAGES, backend.inputs, strict=False):
        expected = {tensor.name: (tensor.dtype, (BATCH, *tensor.shape[1:])) for tensor in stage.inputs}
        assert expected == {name: (str(array.dtype), array.shape) for name, array in inputs.items()}


def test_the_only_variant_is_not_timed(clock: Clock, log: list[tuple[str, int]]) -> None:
    """There is nothing to choose, and the reason says so."""
    backend = TimedBackend("fp32", clock, log, lambda _: 0.001)

    choice = choose_variant({"fp32": backend}, STAGES, batch_size=BATCH, instances=1, clock=clock)

    assert (choice.name, choice.images_per_second, log) == ("fp32", {}, [])
    assert "only variant" in choice.reason


@pytest.mark.parametrize(("seconds", "kept"), [(0.010, True), (0.017, True), (0.019, False), (0.030, False)])
def test_a_wide_backend_must_be_worth_its_memory(clock: Clock, log: list[tuple[str, int]], seconds: float, kept: bool) -> None:
    """A quarter faster at least for a lone image; else it is closed again."""
    narrow = TimedBackend("narrow", clock, log, lambda _: 0.022)
    wide = TimedBackend("wide", clock, log, lambda _: seconds)
    gain, chosen = lone_gain(narrow, lambda: wide, STAGES, clock=clock)
    assert gain == pytest.approx(0.022 / seconds)
    assert (chosen is wide, wide.closed) == (kept, not kept)
    assert all(len(array) == 1 for inputs in wide.inputs for array in inputs.values())


def test_what_is_fast_alone_needs_no_wide_backend(clock: Clock, log: list[tuple[str, int]]) -> None:
    """It is not even opened."""
    narrow = TimedBackend("narrow", clock, log, lambda _: 0.9 * WORTH_WIDENING_S / NUM_STAGES)

    def never() -> TimedBackend:
        raise AssertionError("opened for nothing")

    assert lone_gain(narrow, never, STAGES, clock=clock) == (1.0, None)


def test_each_stage_is_timed_at_each_batch_size(clock: Clock, log: list[tuple[str, int]]) -> None:
    """The median of a few runs."""
    backend = TimedBackend("fp32", clock, log, lambda number: 0.5 if number % 3 == 1 else 0.001)
    times = time_stages(backend, STAGES, batch_sizes=[1, 4], instances=1, clock=clock)
    assert [[run.images for run in stage] for stage in times] == [[1, 4]] * NUM_STAGES
    assert times[0][0].seconds == pytest.approx(0.001)
    assert {stage for _, stage in log} == set(range(NUM_STAGES))


def test_slow_stages_are_timed_once(clock: Clock, log: list[tuple[str, int]]) -> None:
    """A start is not to take minutes."""
    backend = TimedBackend("fp32", clock, log, lambda _: 2 * TIME_BUDGET_S)
    time_stages(backend, STAGES, batch_sizes=[1, 4], instances=1, clock=clock)
    assert len(log) == 2 * NUM_STAGES
