"""More than the machine can do: goodput, latency and refusals at multiples of capacity, with the quality ladder on and off.

`python -m tests.bench.overload --images DIR --timeout-ms 200`; `FOVEA_…` in the environment is the servers' too. Arrivals are
Poisson. Capacity is the highest rate at which, with the ladder off, 99 of 100 are answered within the deadline. Goodput counts
answers with 200 that the caller had within the deadline, from when the request was due.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.machine import facts
from tests.bench.processes import ROOT, Server, run_load

OFF, ON = "ladder off", "ladder on"
RAMP_S = 1.5
BISECTIONS = 5
REACH = {OFF: 1.6, ON: 2.8}  # times what 32 callers get: as far as a limit is looked for
WINDOW_S = 0.5  # of a burst's time line
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the load generator against one server."""

    rate: float
    goodput: float  # answers within the deadline, a second
    shares: dict[str, float]  # of the requests that were due, by outcome
    latencies_s: list[float]
    late: float  # share of the answers with 200 that came after the deadline

    @property
    def p99_s(self) -> float:
        return float(np.percentile(self.latencies_s, 99)) if self.latencies_s else float("inf")

    @property
    def refused(self) -> float:
        return self.shares["overloaded"]

    @property
    def unexplained(self) -> float:
        """Neither answered, nor refused, nor out of time."""
        return 1 - sum(self.shares[name] for name in ("ok", "overloaded", "server_error"))


@dataclass(slots=True)
class Measured:
    """Everything, by server and multiple of capacity."""

    capacity: dict[str, float] = field(default_factory=dict)  # 99 of 100 within the deadline
    unrefused: dict[str, float] = field(default_factory=dict)  # the goodput at the highest rate without refusals
    runs: dict[tuple[str, float], list[Run]] = field(default_factory=dict)
    qualities: dict[str, dict[str, float]] = field(default_factory=dict)  # answers of each server by operating point


class Bench:
    """Two servers and the load on them.

    Args:
        timeout_ms: every request's time budget.
        seconds: of a run.
    """

    def __init__(self, images: Path, timeout_ms: int, seconds: float, say: Say) -> None:
        self._images = images
        self._deadline_s = timeout_ms / 1000
        self._timeout_ms = timeout_ms
        self._seconds = seconds
        self._say = say
        self._seed = 0

    def run(self, server: Server, rate: float, *, seconds: float | None = None, **options: float) -> Run:
        """One open loop."""
        self._seed += 1
        found = run_load(
            f"{server.classify_url}?timeout_ms={self._timeout_ms}",
            self._images,
            rate=rate,
            seconds=seconds if seconds is not None else self._seconds,
            ramp=RAMP_S,
            seed=self._seed,
            timeout=10,
            **options,
        )
        latencies = found["latencies_s"]
        due = sum(found["counts_due"].values())
        within = sum(latency <= self._deadline_s for latency in latencies)
        return Run(
            rate,
            within / found["measured_s"],
            {name: count / due for name, count in found["counts_due"].items()},
            latencies,
            1 - within / max(1, len(latencies)),
        )

    def highest(self, server: Server, low: float, high: float, good: Callable[[Run], bool], what: str) -> Run:
        """The run at the highest rate that is good, by bisection; what is not is tried again, for the machine has hiccups."""
        best = None
        for step in range(BISECTIONS):
            rate = (low + high) / 2
            for _ in range(2):
                run = self.run(server, rate)
                said = (
                    f"{rate:.0f}/s, goodput {run.goodput:.0f}, p99 {1000 * run.p99_s:.0f} ms, refused {100 * run.refused:.1f} %"
                )
                self._say(f"{what}, step {step + 1}: {said}")
                if good(run):
                    break
            if good(run):
                low, best = rate, run
            else:
                high = rate
        return best if best is not None else self.run(server, low)

    def in_time(self, run: Run) -> bool:
        """Ninety-nine of a hundred requests were answered within the deadline."""
        return run.shares["ok"] >= 0.99 and run.p99_s <= self._deadline_s

    def closed(self, server: Server) -> float:
        """Images a second with 32 callers."""
        return float(run_load(server.classify_url, self._images, connections=32, seconds=3, ramp=1)["ok_per_s"])


def unrefused(run: Run) -> bool:
    """Nobody was refused, but for one in a thousand."""
    return run.refused <= 0.001 and run.shares["ok"] >= 0.99


def answered(server: Server) -> dict[str, float]:
    """Images answered so far, by operating point."""
    from prometheus_client.parser import text_string_to_metric_families

    from tests.bench.processes import get

    families = text_string_to_metric_families(get(server.url, "/metrics")[1].decode())
    samples = [sample for family in families for sample in family.samples if sample.name == "fovea_answered_total"]
    return {sample.labels["quality"]: sample.value for sample in samples}


def measure(
    bench: Bench, servers: Mapping[str, Server], factors: Sequence[float], rounds: int, capacity: float | None, say: Say
) -> Measured:
    """All runs, the servers in turns."""
    measured = Measured()
    for name, server in servers.items():
        guess = bench.closed(server)
        say(f"{name}: {guess:.0f} images/s with 32 callers")
        low, high = 0.4 * guess, REACH[name] * guess
        if capacity is None or name == ON:
            measured.unrefused[name] = bench.highest(server, low, high, unrefused, f"{name}, nobody refused").goodput
        if capacity is None and name == OFF:
            measured.capacity[name] = bench.highest(server, low, high, bench.in_time, f"{name}, in time").rate
    base = capacity if capacity is not None else measured.capacity[OFF]
    measured.capacity.setdefault(OFF, base)
    for number in range(rounds):
        for factor in factors:
            for name, server in servers.items():
                run = bench.run(server, factor * base)
                measured.runs.setdefault((name, factor), []).append(run)
                say(
                    f"round {number + 1}, {factor:g} x, {name}: goodput {run.goodput:.0f}/s, p99 {1000 * run.p99_s:.0f} ms, "
                    f"refused {100 * run.refused:.1f} %"
                )
    measured.qualities = {name: answered(server) for name, server in servers.items()}
    return measured


def table(measured: Measured, deadline_s: float) -> str:
    """In Markdown."""
    base = measured.capacity[OFF]
    lines = [
        f"Capacity {base:.0f} requests/s, deadline {1000 * deadline_s:.0f} ms.",
        "",
        "| load | arrivals/s | | goodput/s | p50 ms | p99 ms | p99 by round | late | refused | out of time | other |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, factor), runs in sorted(measured.runs.items(), key=lambda item: (item[0][1], item[0][0])):
        latencies = np.concatenate([run.latencies_s for run in runs])
        p50, p99 = (1000 * np.percentile(latencies, q) for q in (50, 99))
        by_round = sorted(1000 * run.p99_s for run in runs)
        mean = {key: 100 * float(np.mean([run.shares[key] for run in runs])) for key in runs[0].shares}
        other = 100 * float(np.mean([run.unexplained for run in runs]))
        lines.append(
            f"| {factor:g} x | {factor * base:.0f} | {name} | {np.median([run.goodput for run in runs]):.0f} | {p50:.0f} | "
            f"{p99:.0f} | {by_round[0]:.0f} to {by_round[-1]:.0f} | {100 * np.mean([run.late for run in runs]):.2f}% | "
            f"{mean['overloaded']:.1f}% | {mean['server_error']:.2f}% | {other:.2f}% |"
        )
    if measured.unrefused:
        said = ", ".join(f"{name} {goodput:.0f}/s" for name, goodput in measured.unrefused.items())
        lines += ["", f"Most goodput with nobody refused: {said}."]
    for name, counts in measured.qualities.items():
        total = max(1.0, sum(counts.values()))
        lines += [f"{name}: " + ", ".join(f"{key} {100 * count / total:.0f} %" for key, count in counts.items()) + "."]
    return "\n".join(lines)


def plot(measured: Measured, deadline_s: float, path: Path) -> None:
    """Goodput and p99 against the load, with the ladder on and off."""
    import matplotlib.pyplot as plt

    base = measured.capacity[OFF]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, colour in ((OFF, "tab:gray"), (ON, "tab:blue")):
        points = sorted((factor, runs) for (each, factor), runs in measured.runs.items() if each == name)
        loads = [factor * base for factor, _ in points]
        left.plot(loads, [np.median([run.goodput for run in runs]) for _, runs in points], "o-", color=colour, label=name)
        p99 = [1000 * np.percentile(np.concatenate([run.latencies_s for run in runs]), 99) for _, runs in points]
        right.plot(loads, p99, "o-", color=colour, label=name)
    left.plot(loads, loads, ":", color="black", linewidth=1, label="all of them")
    left.set(xlabel="requests/s", ylabel="answered in time, /s", ylim=(0, None))
    right.axhline(1000 * deadline_s, color="tab:red", linestyle=":", linewidth=1, label="deadline")
    right.set(xlabel="requests/s", ylabel="p99 of those answered, ms", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def burst(bench: Bench, server: Server, base: float, say: Say) -> str:
    """Ten times half the capacity for 5 s, then half of it again: when p99 is as before."""
    before = bench.run(server, 0.5 * base, seconds=5)
    bench.run(server, 10 * 0.5 * base, seconds=5 - RAMP_S)
    say("burst over")
    after = run_load(
        f"{server.classify_url}?timeout_ms={bench._timeout_ms}",
        bench._images,
        rate=0.5 * base,
        seconds=8,
        ramp=0,
        seed=1,
        timeout=10,
    )
    due, latencies = np.array(after["ok_due_s"]), np.array(after["latencies_s"])
    windows = [
        (start, float(np.percentile(latencies[(due >= start) & (due < start + WINDOW_S)], 99)))
        for start in np.arange(0, 8, WINDOW_S)
        if ((due >= start) & (due < start + WINDOW_S)).any()
    ]
    worst_before = before.p99_s
    said = ", ".join(f"{1000 * p99:.0f}" for _, p99 in windows)
    return f"p99 before {1000 * worst_before:.0f} ms; after the burst, by half seconds: {said} ms; {after['counts']}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overload", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of images, taken in turn")
    parser.add_argument("--timeout-ms", type=int, default=200, help="time budget of every request")
    parser.add_argument("--quality", default="full", help="operating point of both servers")
    parser.add_argument("--min-quality", default="fast", help="floor of the one whose ladder is on")
    parser.add_argument("--factors", default="0.7,1,2,3", help="multiples of capacity")
    parser.add_argument("--capacity", type=float, help="do not look for it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a run")
    parser.add_argument("--burst", action="store_true", help="a burst of ten times, too")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--plot", type=Path, help="where to draw it")
    args = parser.parse_args()

    def say(text: str) -> None:
        print(f"· {text}", flush=True)

    bench = Bench(args.images, args.timeout_ms, args.seconds, say)
    common = {"FOVEA_RUNTIME__QUALITY": args.quality}
    off = Server(variables=common | {"FOVEA_RUNTIME__MIN_QUALITY": args.quality})
    with off, Server(variables=common | {"FOVEA_RUNTIME__MIN_QUALITY": args.min_quality}) as on:
        factors = [float(each) for each in args.factors.split(",")]
        measured = measure(bench, {OFF: off, ON: on}, factors, args.rounds, args.capacity, say)
        print("\n".join(f"- {name}: {text}" for name, text in facts(ROOT).items()))
        print(table(measured, args.timeout_ms / 1000))
        if args.burst:
            for name, server in ((OFF, off), (ON, on)):
                print(f"{name}: {burst(bench, server, measured.capacity[OFF], say)}")
        if args.json is not None:
            rows: dict[str, Any] = {
                f"{name} {factor:g}": [[run.rate, run.goodput, run.p99_s, run.refused] for run in runs]
                for (name, factor), runs in measured.runs.items()
            }
            args.json.write_text(json.dumps({"capacity": measured.capacity, "runs": rows}))
        if args.plot is not None:
            plot(measured, args.timeout_ms / 1000, args.plot)
        for server in (off, on):
            server.stop()


if __name__ == "__main__":
    main()
