"""The measurements as tables: on the terminal, and as a section of docs/benchmarks.md that replaces its last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from tests.bench.load_result import percentile
from tests.bench.measure import Measured, OpenPoint

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_NEW_FILE = f"# Benchmarks\n\n{BEGIN}\n{END}\n"


@dataclass(frozen=True, slots=True)
class Table:
    """Title, columns, rows of finished text, and what a reader must know to read them."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str


def tables(measured: Measured) -> list[Table]:
    """All tables, in the order of the page."""
    return [_side_by_side(measured), _one_at_a_time(measured), _open_loop(measured), _process(measured)]


def print_tables(console: Console, found: Sequence[Table]) -> None:
    """On a terminal."""
    for table in found:
        drawn = RichTable(
            title=table.title, title_justify="left", title_style="bold", caption=table.note, caption_justify="left"
        )
        for index, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if index == 0 else "right")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)


def markdown(facts: dict[str, str], found: Sequence[Table]) -> str:
    """The section between the markers."""
    lines = ["## Served, against the same work in process", "", *(f"- {name}: {text}" for name, text in facts.items())]
    for table in found:
        lines += ["", f"### {table.title}", "", _line(table.columns)]
        lines += [_line(["---", *["---:"] * (len(table.columns) - 1)]), *(_line(row) for row in table.rows), "", table.note]
    return "\n".join(lines) + "\n"


def write_section(path: Path, section: str) -> None:
    """Put the section between the markers; a file without them gets them at its end, the rest stays as it is."""
    text = path.read_text(encoding="utf-8") if path.exists() else _NEW_FILE
    if BEGIN not in text or END not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{BEGIN}\n{section}{END}{after}", encoding="utf-8")


def _side_by_side(measured: Measured) -> Table:
    plan = measured.plan
    latencies = np.concatenate([served["latencies_s"] for served in measured.served])
    cpu = measured.served_cpu_s_per_image
    loops = (measured.plain, measured.by_hand)
    rows = [
        (
            "images/s",
            _spread([served["ok_per_s"] for served in measured.served], "{:.1f}"),
            *(_spread([loop["images_per_s"] for loop in found], "{:.1f}") for found in loops),
        ),
        (
            "served / in process",
            "",
            *(_spread(ratios, "{:.3f}") for ratios in (measured.ratios, measured.ratios_by_hand)),
        ),
        (
            "CPU per image, ms",
            _spread([1e3 * seconds for seconds in cpu], "{:.2f}") if cpu else "-",
            *(_spread([1e3 * loop["cpu_s_per_image"] for loop in found], "{:.2f}") for found in loops),
        ),
        ("latency p50 / p90 / p99, ms", " / ".join(f"{1e3 * percentile(latencies, q):.0f}" for q in (50, 90, 99)), "-", "-"),
        ("not answered with 200", str(sum(_failed(served) for served in measured.served)), "-", "-"),
        (
            "leave after stage 0, 1, …",
            _shares(measured.served_exit_rates),
            *(_shares(np.mean([loop["exit_rates"] for loop in found], axis=0).tolist()) for found in loops),
        ),
    ]
    client_us = [1e6 * served["cpu_s"] / sum(served["counts"].values()) for served in measured.served]
    return Table(
        f"Throughput, {plan.connections} connections in a closed loop",
        ("", "served", f"in process, {measured.threads} threads", "in process, decoded by hand"),
        rows,
        f"Median of {plan.rounds} rounds (lowest to highest) of {plan.seconds:g} s each, taken in turns, each after "
        f"{plan.ramp_s:g} s of load; the ratio is made within a round. In process: decode, then the stages in chunks of "
        f"{measured.chunk_size}, no HTTP. By hand: the whole picture decoded and "
        "resized by Pillow, as most people write it; else at a reduced scale, as the service does (ADR 8). "
        f"The load generator runs on the same CPUs and takes {np.median(client_us):.0f} µs per request.",
    )


def _one_at_a_time(measured: Measured) -> Table:
    plan = measured.plan
    served, plain = measured.served_one_s, measured.plain_one_s
    rows = []
    for q in (50, 90, 99):
        pairs = [
            (1e3 * percentile(np.array(a), q), 1e3 * percentile(np.array(b), q)) for a, b in zip(served, plain, strict=True)
        ]
        columns = ([a for a, _ in pairs], [b for _, b in pairs], [a - b for a, b in pairs])
        rows.append((f"p{q}, ms", *(_spread(column, "{:.2f}") for column in columns)))
    return Table(
        "Latency, one image at a time",
        ("", "served, one connection", "in process, one thread", "added by the service"),
        rows,
        f"Median of {plan.rounds} rounds (lowest to highest) of the same {plan.latency_images} images, taken in turns.",
    )


def _open_loop(measured: Measured) -> Table:
    plan = measured.plan
    return Table(
        "Latency under load, open loop (Poisson arrivals)",
        (
            "load",
            "arrivals/s",
            "OK/s",
            "p50 ms",
            "p90 ms",
            "p99 ms",
            "p99 by round",
            "503",
            "other errors",
            "sent late, p99 ms",
        ),
        [_open_row(point) for point in measured.open_points],
        f"Load in multiples of the closed loop's images/s. {plan.open_rounds} runs of {plan.seconds:g} s each after "
        f"{2 * plan.ramp_s:g} s of load, pooled. Latency of the answers with 200, counted from when the request was due, "
        "so a late generator is part of it; its timers are 1 ms fine.",
    )


def _open_row(point: OpenPoint) -> tuple[str, ...]:
    latencies, lags = (np.concatenate([run[key] for run in point.runs]) for key in ("latencies_s", "lags_s"))
    due = sum(sum(run["counts_due"].values()) for run in point.runs)
    refused = sum(run["counts_due"]["overloaded"] for run in point.runs)
    others = sum(_failed(run) - run["counts"]["overloaded"] for run in point.runs)
    by_round = [1e3 * percentile(np.array(run["latencies_s"]), 99) for run in point.runs]
    return (
        f"{point.factor:g} x",
        f"{point.rate:.0f}",
        f"{np.median([run['ok_per_s'] for run in point.runs]):.0f}",
        *(f"{1e3 * percentile(latencies, q):.1f}" for q in (50, 90, 99)),
        f"{min(by_round):.0f} to {max(by_round):.0f}",
        f"{refused} ({refused / max(1, due):.1%})",
        str(others),
        f"{1e3 * percentile(lags, 99):.1f}",
    )


def _process(measured: Measured) -> Table:
    rows = []
    if measured.ready_s:
        rows.append(("process start to ready, s", _spread(measured.ready_s, "{:.2f}")))
    if measured.memory_warm_mib is not None and measured.memory_peak_mib is not None:
        rows.append(("resident memory after warm-up, MiB", f"{measured.memory_warm_mib:.0f}"))
        rows.append(("resident memory, peak of the whole run, MiB", f"{measured.memory_peak_mib:.0f}"))
    if any(code is not None for code in measured.exit_codes):
        rows.append(("exit codes after SIGTERM", ", ".join(str(code) for code in measured.exit_codes)))
    model = measured.model
    rows.append(("model, variant, target", f"{model['name']} {model['version']}, {model['variant']}, {model['target']}"))
    starts = len(measured.ready_s)
    note = f"{starts} start{'s' * (starts != 1)}, files in the page cache." if starts else "The server was running already."
    return Table("The process", ("", ""), rows, note)


def _failed(run: dict[str, dict[str, int]]) -> int:
    return sum(number for outcome, number in run["counts"].items() if outcome != "ok")


def _spread(values: Sequence[float], form: str) -> str:
    """Median (lowest to highest)."""
    return f"{form.format(np.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def _shares(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:.1%}" for rate in rates)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
