"""Two or more servers in turns on one load: which source tree, or which settings, serve more?

`python -m tests.bench.compare TREE TREE…`, where a TREE may be followed by settings, as in
`.,FOVEA_BATCHING__MAX_QUEUE_DELAY_S=0.003`. The first is what the others are compared with. All serve the model of this tree.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.bench.images import synthetic_photos, write_folder
from tests.bench.processes import ROOT, Server, run_load

REPOSITORY = {"FOVEA_REPOSITORY__ROOT": str(ROOT / "models" / "artifacts")}
RAMP_S = 0.3


def main() -> None:
    """Print images/s and CPU per image of each, medians over the rounds, and the ratio made within a round."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.compare", description=__doc__)
    parser.add_argument("trees", nargs="+", metavar="TREE[,NAME=VALUE…]")
    parser.add_argument("--images", type=Path, help="folder of photos; default: 64 photo-like ones")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each window (default 1.5)")
    parser.add_argument("--connections", type=int, default=32)
    arguments = parser.parse_args()

    with ExitStack() as stack:
        folder = arguments.images
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_folder(synthetic_photos(), folder)
        servers = [stack.enter_context(_server(text)) for text in arguments.trees]
        rates: list[list[float]] = [[] for _ in servers]
        costs_ms: list[list[float]] = [[] for _ in servers]
        for _ in range(arguments.rounds):
            for index, server in enumerate(servers):
                before = server.cpu_s() or 0.0
                load = run_load(
                    server.classify_url,
                    folder,
                    connections=arguments.connections,
                    seconds=arguments.seconds,
                    ramp=RAMP_S,
                )
                rates[index].append(load["ok_per_s"])
                costs_ms[index].append(1000 * ((server.cpu_s() or 0.0) - before) / load["counts"]["ok"])
    for text, rate, cost_ms in zip(arguments.trees, rates, costs_ms, strict=True):
        ratio = statistics.median(mine / first for mine, first in zip(rate, rates[0], strict=True))
        median, cost = statistics.median(rate), statistics.median(cost_ms)
        print(f"{text}: {median:.0f} images/s, {cost:.2f} ms of CPU per image, {ratio:.2f} x the first")


def _server(text: str) -> Server:
    tree, *settings = text.split(",")
    variables = dict(setting.split("=", 1) for setting in settings)
    return Server(tree=Path(tree).resolve(), variables=REPOSITORY | variables)


if __name__ == "__main__":
    main()
