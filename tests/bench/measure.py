"""What is measured, in which order: served and in-process take turns, so that both see the same machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from app.settings import Settings
from tests.bench.processes import BenchError, PlainLoopProcess, Server, run_load

Say = Callable[[str], None]
# The loop in process has one operating point, so what it is compared with keeps to the same one.
PINNED = {"FOVEA_RUNTIME__MIN_QUALITY": Settings().runtime.quality}


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often; times in seconds."""

    rounds: int = 5
    seconds: float = 5.0  # of each window
    ramp_s: float = 0.5  # of load before a window opens, so that queues and batches are as they will stay
    warm_up_s: float = 2.0
    connections: int = 32
    latency_images: int = 192  # per round, one at a time
    open_factors: tuple[float, ...] = (0.5, 0.8, 1.0, 1.5)  # of the closed loop's images/s
    open_rounds: int = 3
    starts: int = 3  # of the server, for the time to ready
    seed: int = 0

    @property
    def num_steps(self) -> int:
        return self.starts + 2 + 5 * self.rounds + len(self.open_factors) * self.open_rounds + 1


@dataclass(slots=True)
class OpenPoint:
    """One arrival rate: what `tests.bench.load` said, a run per round."""

    factor: float
    rate: float
    runs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Measured:
    """Everything that was measured; lists have an entry per round."""

    model: dict[str, Any]  # the server's own words
    plan: Plan
    chunk_size: int
    threads: int = 0
    ready_s: list[float] = field(default_factory=list)
    exit_codes: list[int | None] = field(default_factory=list)
    memory_warm_mib: float | None = None
    memory_peak_mib: float | None = None
    served: list[dict[str, Any]] = field(default_factory=list)  # closed loop, all connections
    served_cpu_s_per_image: list[float] = field(default_factory=list)
    plain: list[dict[str, Any]] = field(default_factory=list)  # decoding as the service does
    by_hand: list[dict[str, Any]] = field(default_factory=list)  # decoding as most people write it
    served_one_s: list[list[float]] = field(default_factory=list)  # latencies at one connection
    plain_one_s: list[list[float]] = field(default_factory=list)
    served_exit_rates: list[float] = field(default_factory=list)
    open_points: list[OpenPoint] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Served over in-process images/s, per round."""
        return self._over(self.plain)

    @property
    def ratios_by_hand(self) -> list[float]:
        """The same, over the loop that decodes as most people write it."""
        return self._over(self.by_hand)

    def _over(self, loops: list[dict[str, Any]]) -> list[float]:
        return [served["ok_per_s"] / loop["images_per_s"] for served, loop in zip(self.served, loops, strict=True)]

    @property
    def added_s(self) -> list[float]:
        """Median latency at one connection minus that of one image in process, per round."""
        pairs = zip(self.served_one_s, self.plain_one_s, strict=True)
        return [float(np.median(served) - np.median(plain)) for served, plain in pairs]


def measure(plan: Plan, images: Path, url: str | None, say: Say) -> Measured:
    """Run the whole plan; `say` is told what comes next, `plan.num_steps` times at most.

    Args:
        images: folder of images.
        url: a server that runs already; None starts one of our own.

    Raises:
        BenchError: something did not start, did not answer, or did not end as it should.
    """
    settings = Settings()
    ready_s: list[float] = []
    exit_codes: list[int | None] = []
    for number in range(1, plan.starts if url is None else 0):
        say(f"start {number} of {plan.starts}")
        with Server(variables=PINNED) as server:
            ready_s.append(server.ready_s or 0.0)
            exit_codes.append(server.stop())
    say("start the server")
    with Server(url, variables=PINNED) as server:
        if server.ready_s is not None:
            ready_s.append(server.ready_s)
        model = _default_model(server.models())
        measured = Measured(model, plan, settings.batching.max_batch_size, ready_s=ready_s, exit_codes=exit_codes)
        say("warm up the server")
        run_load(server.classify_url, images, connections=plan.connections, seconds=plan.warm_up_s)
        if memory := server.memory_mib():
            measured.memory_warm_mib = memory[0]
        say("warm up the in-process loop")
        with _plain_loop(settings, model, images) as plain:
            measured.threads = plain.threads
            _take_turns(measured, server, plain, images, say)
        _open_loop(measured, server, images, say)
        if memory := server.memory_mib():
            measured.memory_peak_mib = memory[1]
        say("stop the server")
        exit_codes.append(server.stop())
    return measured


def _take_turns(measured: Measured, server: Server, plain: PlainLoopProcess, images: Path, say: Say) -> None:
    plan, name = measured.plan, measured.model["name"]
    before = server.exit_counts(name)
    for number in range(1, plan.rounds + 1):
        say(f"round {number} of {plan.rounds}: served, {plan.connections} connections")
        cpu_before_s = server.cpu_s()
        options = {"connections": plan.connections, "seconds": plan.seconds, "ramp": plan.ramp_s}
        served = run_load(server.classify_url, images, **options)
        measured.served.append(served)
        if (cpu_s := server.cpu_s()) is not None and cpu_before_s is not None and served["counts"]["ok"]:
            measured.served_cpu_s_per_image.append((cpu_s - cpu_before_s) / served["counts"]["ok"])
        say(f"round {number} of {plan.rounds}: in process, {plain.threads} threads")
        measured.plain.append(plain.throughput(seconds=plan.seconds, ramp_s=plan.ramp_s))
        say(f"round {number} of {plan.rounds}: in process, decoding by hand")
        measured.by_hand.append(plain.throughput(seconds=plan.seconds, ramp_s=plan.ramp_s, by_hand=True))
    after = server.exit_counts(name)
    exits = np.array([after[stage] - before.get(stage, 0.0) for stage in sorted(after)])
    measured.served_exit_rates = (exits / max(1.0, float(exits.sum()))).tolist()
    for number in range(1, plan.rounds + 1):
        say(f"round {number} of {plan.rounds}: served, one connection")
        one = run_load(server.classify_url, images, connections=1, requests=plan.latency_images)
        measured.served_one_s.append(one["latencies_s"])
        say(f"round {number} of {plan.rounds}: in process, one image at a time")
        measured.plain_one_s.append(plain.latency(num_images=plan.latency_images))


def _open_loop(measured: Measured, server: Server, images: Path, say: Say) -> None:
    plan = measured.plan
    capacity = float(np.median([served["ok_per_s"] for served in measured.served]))
    if not capacity:
        raise BenchError(f"the server answered nothing with success: {measured.served[0]['counts']}")
    measured.open_points = [OpenPoint(factor, factor * capacity) for factor in plan.open_factors]
    for number in range(plan.open_rounds):
        for index, point in enumerate(measured.open_points):
            say(f"open loop, {point.factor:g} x {capacity:.0f} images/s, round {number + 1} of {plan.open_rounds}")
            seed = plan.seed + 1000 * number + index
            options = {"rate": point.rate, "seconds": plan.seconds, "ramp": 2 * plan.ramp_s, "seed": seed}
            point.runs.append(run_load(server.classify_url, images, **options))


def _default_model(models: list[dict[str, Any]]) -> dict[str, Any]:
    ready = [model for model in models if model.get("ready")]
    chosen = [model for model in ready if model.get("default")] or ready
    if len(chosen) != 1:
        raise BenchError(f"no single default model among {[model.get('name') for model in ready]}: set one")
    return chosen[0]


def _plain_loop(settings: Settings, model: dict[str, Any], images: Path) -> PlainLoopProcess:
    """The in-process loop with the variant, instances and threads that the server uses."""
    return PlainLoopProcess(
        f"--model-dir={settings.repository.root / model['name'] / str(model['version'])}",
        f"--variant={model['variant']}",
        f"--target={model['target']}",
        f"--instances={model.get('instances', settings.runtime.instances)}",
        f"--intra-op-threads={model.get('intra_op_threads', settings.runtime.intra_op_threads)}",
        f"--chunk-size={settings.batching.max_batch_size}",
        f"--max-pixels={settings.limits.max_pixels}",
        f"--images={images}",
    )
