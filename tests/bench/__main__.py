"""`make bench`: served against in process, side by side; writes its section of docs/benchmarks.md. Takes some minutes."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.bench.images import describe, read_folder, synthetic_photos, write_folder
from tests.bench.machine import command_line, facts
from tests.bench.measure import Measured, Plan, measure
from tests.bench.processes import ROOT, BenchError
from tests.bench.report import markdown, print_tables, tables, write_section

FULL = Plan()
QUICK = Plan(rounds=2, seconds=1.5, warm_up_s=1.0, latency_images=32, open_factors=(0.5, 1.0, 1.5), open_rounds=1, starts=1)


def main() -> int:
    """0; or 1 when something did not work, or the server did not end with code 0."""
    args = _arguments()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log file breaks no lines
    try:
        if args.images:
            bodies = read_folder(args.images)
        else:
            console.print("making photo-like images …")
            bodies = synthetic_photos()
        where = facts(ROOT) | {
            "Command": f"`{command_line(sys.argv[1:], os.environ)}`",
            "Images": describe(bodies, synthetic=args.images is None),
        }
        with tempfile.TemporaryDirectory() as folder:
            if not args.images:
                write_folder(bodies, Path(folder))
            measured = _with_progress(console, _plan(args), args.images or Path(folder), args.url)
    except (BenchError, ValueError) as error:
        console.print(f"[red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False, highlight=False)
        return 1
    found = tables(measured)
    for name, text in where.items():
        console.print(f"{name}: {text}", markup=False, highlight=False)
    print_tables(console, found)
    write_section(args.output, markdown(where, found))
    console.print(f"written to {args.output.name}", highlight=False)
    failed = [code for code in measured.exit_codes if code not in (0, None)]
    if failed:
        console.print(f"[red]the server ended with {failed} after SIGTERM, not with 0[/]")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=Path, help="folder of photos, with its sub-folders; default: 64 photo-like ones")
    parser.add_argument("--url", help="a server that runs already, with this machine's settings; default: start one")
    parser.add_argument("--rounds", type=int, help=f"turns of served and in process (default {FULL.rounds})")
    parser.add_argument("--seconds", type=float, help=f"length of each measured window (default {FULL.seconds:g})")
    parser.add_argument("--connections", type=int, help=f"of the closed loop (default {FULL.connections})")
    parser.add_argument("--loads", help="open loop: multiples of the closed loop's images/s (default 0.5,0.8,1,1.5)")
    parser.add_argument("--quick", action="store_true", help="a short run, to see that everything works; no figures to quote")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the page to write the section to")
    return parser.parse_args()


def _plan(args: argparse.Namespace) -> Plan:
    plan = QUICK if args.quick else FULL
    given = {name: getattr(args, name) for name in ("rounds", "seconds", "connections") if getattr(args, name) is not None}
    if args.loads:
        given["open_factors"] = tuple(float(factor) for factor in args.loads.split(","))
    return replace(plan, **given)


def _with_progress(console: Console, plan: Plan, images: Path, url: str | None) -> Measured:
    """Measure, with a bar that is redrawn between the steps only: drawing would take CPU from what is measured."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=plan.num_steps - (plan.starts - 1 if url else 0))
        steps = -1

        def say(what: str) -> None:
            nonlocal steps
            steps += 1
            progress.update(task, completed=steps, description=what, refresh=True)

        measured = measure(plan, images, url, say)
        progress.update(task, completed=steps + 1, description="done", refresh=True)
    return measured


if __name__ == "__main__":
    sys.exit(main())
