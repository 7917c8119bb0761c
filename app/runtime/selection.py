"""Which variant serves: the fastest as timed on this machine at load, not the one that ought to be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from app.runtime.backend import Backend
from app.types import Array, RunTime
from models.manifest import StageSpec

MIN_ROUNDS = 3
MAX_ROUNDS = 15
WORTH_WIDENING_S = 0.004  # that a lone image takes on one thread
WORTH_GAIN = 1.25  # for the weights in memory a second time
TIME_BUDGET_S = 0.6  # of timing in all, once the least rounds are done


@dataclass(frozen=True, slots=True)
class VariantChoice:
    """What was chosen and why."""

    name: str
    reason: str
    images_per_second: Mapping[str, float]  # per variant, all stages, no exits, all instances busy; empty if not timed


def choose_variant(
    backends: Mapping[str, Backend],
    stages: Sequence[StageSpec],
    *,
    batch_size: int,
    instances: int,
    clock: Callable[[], float] = time.perf_counter,
) -> VariantChoice:
    """Time the variants in turn (A B A B ...) with all instances busy, and take the one with the best median.

    Args:
        backends: warmed up, by variant; the first is the reference in the reason.
        stages: every stage is run on every image, as for the images that never leave early.
        batch_size: images in a run.
        instances: threads that run at once.
    """
    if len(backends) == 1:
        (name,) = backends
        return VariantChoice(name, f"{name} is the only variant allowed here", {})

    inputs = [{t.name: _noise(t.shape, t.dtype, batch_size) for t in stage.inputs} for stage in stages]
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    started = clock()
    with ThreadPoolExecutor(instances) as threads:
        for round_ in range(MAX_ROUNDS):
            if round_ >= MIN_ROUNDS and clock() - started > TIME_BUDGET_S:
                break
            for name, backend in backends.items():
                before = clock()
                for future in [threads.submit(_run_all, backend, inputs) for _ in range(instances)]:
                    future.result()
                seconds[name].append(clock() - before)
    rates = {name: batch_size * instances / statistics.median(times) for name, times in seconds.items()}
    best = max(rates, key=lambda name: rates[name])
    others = ", ".join(f"{rates[best] / rate:.2f} x {name} ({rate:.0f}/s)" for name, rate in rates.items() if name != best)
    conditions = f"batch {batch_size}, {instances} instances, no exits"
    reason = f"{best} is the fastest here: {rates[best]:.0f} images/s = {others}; {conditions}"
    return VariantChoice(best, reason, rates)


def time_stages(
    backend: Backend,
    stages: Sequence[StageSpec],
    *,
    batch_sizes: Sequence[int],
    instances: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[RunTime]]:
    """What a run of each stage takes at each batch size with all instances busy: medians of a few rounds, in turn.

    Args:
        backend: warmed up at these sizes.
        batch_sizes: in images.
        instances: threads that run at once.
    """
    found = []
    started = clock()
    with ThreadPoolExecutor(instances) as threads:
        for index, stage in enumerate(stages):
            inputs = {size: {t.name: _noise(t.shape, t.dtype, size) for t in stage.inputs} for size in batch_sizes}
            seconds: dict[int, list[float]] = {size: [] for size in batch_sizes}
            for round_ in range(MIN_ROUNDS):
                if round_ and clock() - started > TIME_BUDGET_S:
                    break
                for size, arrays in inputs.items():
                    jobs = [threads.submit(_timed, backend, index, arrays, clock) for _ in range(instances)]
                    seconds[size] += [job.result() for job in jobs]
            found.append([RunTime(size, statistics.median(times)) for size, times in seconds.items()])
    return found


def lone_gain(
    narrow: Backend, wide: Callable[[], Backend], stages: Sequence[StageSpec], *, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Backend | None]:
    """How many times as fast a lone image is on a wide backend, and that backend where it is worth its memory.

    Args:
        narrow: warmed up.
        wide: opens it; not called where a lone image takes less than `WORTH_WIDENING_S` anyway.
        stages: all are run, as for an image that never leaves early.
    """
    inputs = [{t.name: _noise(t.shape, t.dtype, 1) for t in stage.inputs} for stage in stages]

    def once(backend: Backend) -> float:
        started = clock()
        _run_all(backend, inputs)
        return clock() - started

    if min(once(narrow) for _ in range(MIN_ROUNDS)) < WORTH_WIDENING_S:
        return 1.0, None
    opened = wide()
    seconds = [(once(narrow), once(opened)) for _ in range(MIN_ROUNDS)]
    gain = statistics.median(slow for slow, _ in seconds) / statistics.median(fast for _, fast in seconds)
    if gain >= WORTH_GAIN:
        return gain, opened
    opened.close()
    return gain, None


def _timed(backend: Backend, stage: int, inputs: Mapping[str, Array], clock: Callable[[], float]) -> float:
    started = clock()
    backend.run(stage, inputs)
    return clock() - started


def _run_all(backend: Backend, inputs: Sequence[Mapping[str, Array]]) -> None:
    for stage, arrays in enumerate(inputs):
        backend.run(stage, arrays)


def _noise(shape: Sequence[int | str], dtype: str, batch_size: int) -> Array:
    """Random values of a usual size: zeros would let some kernels take shortcuts."""
    sizes = [batch_size, *(size for size in shape[1:] if isinstance(size, int))]
    generator = np.random.default_rng(0)
    if dtype == "float32":
        return generator.standard_normal(sizes, dtype=np.float32)
    return generator.integers(0, 256, sizes).astype(dtype)
