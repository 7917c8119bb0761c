"""How a version is best served on this machine: instances, threads of each, and the largest batch, measured in turns."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from app.exits import ExitPolicy
from app.runtime.backend import Backend
from app.types import Array
from exporters.timing import in_batches, spread

BATCH_SIZES = (1, 4, 8, 16, 32)
ROUNDS = 3
IMAGES = 64  # for each instance in a round
WORTH_MORE = 0.03  # by how much a larger batch must be faster: it makes each image wait longer

Run = Callable[[Array], None]


@dataclass(frozen=True, slots=True)
class ServingFigures:
    """One way to serve: all instances at work at once."""

    instances: int
    intra_op_threads: int
    max_batch_size: int
    images_per_s: float

    @property
    def settings(self) -> dict[str, int]:
        """The service's settings, as its environment has them."""
        return {
            "FOVEA_RUNTIME__INSTANCES": self.instances,
            "FOVEA_RUNTIME__INTRA_OP_THREADS": self.intra_op_threads,
            "FOVEA_BATCHING__MAX_BATCH_SIZE": self.max_batch_size,
        }


def measure_serving(
    backends: Mapping[int, Backend], policy: ExitPolicy, entries: Sequence[int], pixels: Array, cpus: int
) -> list[ServingFigures]:
    """Images a second of each division of the CPUs and each batch size.

    Args:
        backends: one for each number of threads that an instance may have; instances of it share it.
        policy: who leaves where.
        entries: stages that begin a network.
        pixels: what stage 0 takes, (N, ...).
        cpus: how many there are.
    """
    ways = {
        (max(1, cpus // threads), threads, size): in_batches(backend, policy.num_stages, policy, entries, batch_size=size)
        for threads, backend in backends.items()
        for size in BATCH_SIZES
    }
    few = spread(pixels, IMAGES)
    rates: dict[tuple[int, int, int], list[float]] = {key: [] for key in ways}
    for turn in range(ROUNDS + 1):  # the first warms up
        for key, run in ways.items():
            seconds = _seconds(run, few, key[0])
            if turn:
                rates[key].append(key[0] * len(few) / seconds)
    return [ServingFigures(*key, statistics.median(each)) for key, each in rates.items()]


def best_of(measured: Sequence[ServingFigures]) -> ServingFigures:
    """The fastest; of those that are hardly slower the one with the smallest batch."""
    fastest = max(each.images_per_s for each in measured)
    good = [each for each in measured if each.images_per_s >= (1 - WORTH_MORE) * fastest]
    return min(good, key=lambda each: (each.max_batch_size, -each.images_per_s))


def threads_to_try(cpus: int) -> list[int]:
    """Of one instance: one, all CPUs, and between them two and four where they divide the CPUs."""
    return sorted({threads for threads in (1, 2, 4, cpus) if threads <= cpus and cpus % threads == 0})


def parallel_speedup(run: Run, pixels: Array, cpus: int) -> float:
    """How many times the images of one thread all CPUs do, an instance on each."""
    few = spread(pixels, IMAGES)
    run(few)
    alone, together = [], []
    for _ in range(ROUNDS):
        alone.append(_seconds(run, few, 1))
        together.append(_seconds(run, few, cpus))
    return cpus * statistics.median(alone) / statistics.median(together)


def _seconds(run: Run, pixels: Array, instances: int) -> float:
    """For all instances, at once, to take the same images."""
    threads = [threading.Thread(target=run, args=(pixels,)) for _ in range(instances)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started
