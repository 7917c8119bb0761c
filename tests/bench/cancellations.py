"""What is computed for callers who have left: `python -m tests.bench.cancellations --images DIR --rate 400`.

Half of the callers leave after a time drawn evenly from 0 to `--within` seconds, if they have no answer by then. Wasted is what
a stage computed for an image whose caller left before the stage ended, as a share of all that the stages computed: in seconds,
and in images, of which those count whole whose run was ended before it was done.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.bench.machine import facts
from tests.bench.processes import ROOT, Server, get, run_load


def total(server: Server, name: str) -> float:
    """The sum of a metric over all its labels."""
    families = text_string_to_metric_families(get(server.url, "/metrics")[1].decode())
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cancellations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rate", type=float, required=True, help="arrivals a second")
    parser.add_argument("--within", type=float, default=0.2, help="seconds")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("\n".join(f"- {name}: {text}" for name, text in facts(ROOT).items()))
    names = (
        "stage_duration_seconds_sum",
        "wasted_seconds_total",
        "batch_size_sum",
        "wasted_total",
        "skipped_total",
        "answered_total",
    )
    with Server() as server:
        run_load(server.classify_url, args.images, connections=32, seconds=2)
        for seed in range(args.rounds):
            before = [total(server, f"fovea_{name}") for name in names]
            options = {"rate": args.rate, "seconds": args.seconds, "seed": seed, "give-up": 0.5, "give-up-within": args.within}
            found = run_load(server.classify_url, args.images, **options)
            run_s, wasted_s, computed, wasted, skipped, answered = (
                total(server, f"fovea_{name}") - old for name, old in zip(names, before, strict=True)
            )
            said = {name: count for name, count in found["counts"].items() if count}
            print(
                f"{run_s:.1f} s computed, {100 * wasted_s / run_s:.1f} % wasted; "
                f"{computed:.0f} image-stages, {wasted:.0f} wasted ({100 * wasted / computed:.1f} %), "
                f"{skipped:.0f} skipped, {answered:.0f} images answered; callers: {said}"
            )
        server.stop()


if __name__ == "__main__":
    main()
