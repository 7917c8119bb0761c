"""What an image costs in each of several ways, all of them in turn, so that a busy machine slows them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from app.exits import ExitPolicy, History, no_history, with_answers
from app.runtime.backend import Backend
from app.types import Array
from models.manifest import PIXELS, ExitSpec

TIMED_BATCH = 8
MIN_TIMED_IMAGES, MAX_TIMED_IMAGES = 32, 512  # as many as TIMED_S allows: a large network takes seconds for a few
TIMED_ROUNDS = 5
TIMED_S = 30.0
POWERCAP = Path("/sys/class/powercap")  # Linux; root alone may read it on most machines

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of an image: medians."""

    ms: float
    cpu_ms: float  # of all threads of this process
    joules: float | None  # of all CPU packages; None where this machine does not tell


class EnergyMeter:
    """The running average power limit's counters of all CPU packages (RAPL), which Intel's and AMD's CPUs have."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._packages = [(folder, _counter(folder, "max_energy_range_uj")) for folder in sorted(root.glob("intel-rapl:?"))]
        self.works = bool(self._packages) and all(_counter(folder, "energy_uj") is not None for folder, _ in self._packages)

    def read(self) -> list[int]:
        """Of each package, in microjoules since some time."""
        return [_counter(folder, "energy_uj") or 0 for folder, _ in self._packages] if self.works else []

    def joules_since(self, before: Sequence[int]) -> float | None:
        """Since that reading; a counter that began anew meanwhile is seen through, once."""
        if not self.works:
            return None
        spent = 0
        for now, then, (_, largest) in zip(self.read(), before, self._packages, strict=True):
            spent += now - then if now >= then else now - then + (largest or 0)
        return spent / 1e6


def _counter(folder: Path, name: str) -> int | None:
    try:
        return int((folder / name).read_text())
    except (OSError, ValueError):
        return None


def cost_per_image(ways: Mapping[K, Callable[[Array], None]], pixels: Array, meter: EnergyMeter | None = None) -> dict[K, Cost]:
    """Of each way to take some images through something, all in turn, for about half a minute at most.

    Args:
        ways: each takes pixels, (N, ...).
        pixels: some of them, evenly spread, are taken.
        meter: of the machine's energy; by default that of this one.
    """
    meter = EnergyMeter() if meter is None else meter
    few = spread(pixels, MIN_TIMED_IMAGES)
    started = time.perf_counter()
    for run in ways.values():  # also warms up
        run(few)
    one_round_s = (time.perf_counter() - started) / len(few)  # of an image, all ways
    pixels = spread(pixels, min(MAX_TIMED_IMAGES, max(MIN_TIMED_IMAGES, round(TIMED_S / TIMED_ROUNDS / one_round_s))))
    spent: dict[K, list[tuple[float, float, float | None]]] = {name: [] for name in ways}
    for _ in range(TIMED_ROUNDS):
        for name, run in ways.items():
            before, cpu, started = meter.read(), time.process_time(), time.perf_counter()
            run(pixels)
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
            spent[name].append((wall, cpu, meter.joules_since(before)))
    return {name: _median(each, len(pixels)) for name, each in spent.items()}


def _median(spent: Sequence[tuple[float, float, float | None]], count: int) -> Cost:
    wall, cpu = (statistics.median(each[index] or 0.0 for each in spent) / count for index in (0, 1))
    joules = [each[2] for each in spent if each[2] is not None]
    return Cost(1000 * wall, 1000 * cpu, statistics.median(joules) / count if joules else None)


def milliseconds_per_image(
    backends: Mapping[str, Backend],
    exits: Mapping[str, Sequence[ExitSpec]],
    pixels: Array,
    *,
    entries: Sequence[int] = (0,),
) -> dict[str, dict[str, float]]:
    """Median time of an image in each variant, without exits and with them; one thread, batch 8, all of them in turn.

    With exits the survivors of a stage are batched anew, as in the service.

    Args:
        backends: by variant; exits: likewise.
        pixels: what stage 0 takes, (N, ...).
        entries: stages that begin a network; without exits images begin at the last.
    """
    ways: dict[tuple[str, str], Callable[[Array], None]] = {}
    for name, backend in backends.items():
        ways[name, "without_exits"] = in_batches(backend, len(exits[name]), None, entries)
        ways[name, "with_exits"] = in_batches(backend, len(exits[name]), ExitPolicy(exits[name]), entries)
    costs = cost_per_image(ways, pixels)
    return {name: {way: round(costs[name, way].ms, 4) for way in ("without_exits", "with_exits")} for name in backends}


def in_batches(
    backend: Backend,
    num_stages: int,
    policy: ExitPolicy | None,
    entries: Sequence[int] = (0,),
    *,
    batch_size: int = TIMED_BATCH,
) -> Callable[[Array], None]:
    """Takes pixels through the stages, in batches that are made anew of the survivors behind each.

    Args:
        backend: of a variant of so many stages.
        policy: who leaves, and which stages are passed over; None: the last network, to its end.
        entries: stages that begin a network.
        batch_size: of the largest batch.
    """
    stages = range(entries[-1], num_stages) if policy is None else policy.way(entries)

    def run(pixels: Array) -> None:
        inputs: dict[str, Array] = {PIXELS: pixels}
        history = no_history(len(pixels))
        for stage in stages:
            survivors: dict[str, list[Array]] = {}
            going_on: list[History] = []
            for start in range(0, len(history), batch_size):
                output = backend.run(stage, {name: value[start : start + batch_size] for name, value in inputs.items()})
                if policy is None:
                    seen, stays = history[start : start + batch_size], np.ones(len(output.logits), dtype=bool)
                else:
                    seen = with_answers(history[start : start + batch_size], output.logits)
                    stays = ~policy.decide(stage, output.logits, 0, seen)[0]
                going_on.append(seen[stays])
                for name, value in output.state.items():
                    survivors.setdefault(name, []).append(value[stays])
            inputs = {name: np.concatenate(parts) for name, parts in survivors.items()}
            history = np.concatenate(going_on)
            if not inputs or not len(history):
                return

    return run


def spread(pixels: Array, wanted: int) -> Array:
    """Some of them, evenly spread."""
    return pixels[np.linspace(0, len(pixels) - 1, min(len(pixels), wanted)).round().astype(np.int64)]
