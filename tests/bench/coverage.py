"""How often a certified loss is exceeded: many random splits into images to fit on, to certify on and to measure on.

`python -m tests.bench.coverage --images A --images B` on a published version; with `--then` its last exit is followed by
another version's, as in a cascade. A bound at level delta may be broken in a share delta of the splits; the table says in how
many it was, and how likely so many or more would be if the true share were delta (one-sided exact binomial test).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy import stats

from app.repository.store import ModelStore
from app.runtime.ort_backend import OrtBackend
from app.types import Array, FloatArray
from exporters.certificate import certified_exits
from exporters.config import BoundConfig, ExitConfig
from exporters.evaluation import logits_per_exit
from exporters.exit_fitting import route
from exporters.images import read_images
from exporters.published import one_thread
from exporters.risk_control import Risk
from tests.bench.machine import facts

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Print a table for docs/risk-control.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.coverage", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("models/artifacts"))
    parser.add_argument("--model", default="vit_cifar10", help="NAME, NAME/VERSION or NAME/VERSION/VARIANT")
    parser.add_argument("--then", help="likewise: the model behind it in a cascade")
    parser.add_argument("--images", type=Path, action="append", required=True, help="folder or zip of <class>/<file>")
    parser.add_argument("--folders", type=Path, help="the folder of each class, one a line, where folders are not labels")
    parser.add_argument("--fitting", type=int, default=4000, help="images of a split that exits are fitted and certified on")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--points", default="0.5,1,2", help="largest losses to be promised")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logits, labels, costs = _answers(arguments)
    for name, value in facts(ROOT).items():
        print(f"- {name}: {value}")
    print(f"- Images: {len(labels)}, of each split {arguments.fitting} to fit and certify on, the others to measure on\n")
    head = [
        "promise",
        "loss at most",
        "delta",
        "splits",
        "certified",
        "exceeded",
        "p-value",
        "mean loss",
        "cost, of the full depth",
    ]
    print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
    risks: tuple[Risk, ...] = ("accuracy", "disagreement")
    for risk in risks:
        for points in map(float, arguments.points.split(",")):
            for delta in (0.05, 0.2):
                row = _row(logits, labels, costs, arguments, risk, BoundConfig(points / 100, delta))
                print("| " + " | ".join(row) + " |", flush=True)


def _row(
    logits: list[FloatArray], labels: Array, costs: list[float], arguments: argparse.Namespace, risk: Risk, bound: BoundConfig
) -> list[str]:
    reference = logits[-1].argmax(axis=1)
    truth = labels if risk == "accuracy" else reference
    through, certified, exceeded = np.cumsum(costs), 0, 0
    losses, spent = [], []
    for split in range(arguments.splits):
        order = np.random.default_rng((arguments.seed, split)).permutation(len(labels))
        half = arguments.fitting // 2
        parts = [order[:half], order[half : 2 * half], order[2 * half :]]
        fitting, apart = (([each[part] for each in logits], truth[part]) for part in parts[:2])
        found = certified_exits(fitting, apart, costs, ExitConfig(), bound, images_sha256="0" * 64, risk=risk)
        rest = [each[parts[2]] for each in logits]
        routing = route(rest, found.exits)
        loss = (reference[parts[2]] == truth[parts[2]]).mean() - (routing.predicted == truth[parts[2]]).mean()
        certified += found.certificate is not None
        exceeded += found.certificate is not None and loss > bound.epsilon
        losses.append(loss)
        spent.append(through[routing.exit_stage].mean() / through[-1])
    p_value = stats.binomtest(exceeded, arguments.splits, bound.delta, alternative="greater").pvalue
    return [
        risk,
        f"{100 * bound.epsilon:g} points",
        f"{bound.delta:g}",
        str(arguments.splits),
        str(certified),
        f"{exceeded} ({100 * exceeded / arguments.splits:.1f} %)",
        f"{p_value:.2f}",
        f"{100 * np.mean(losses):.2f} points",
        f"{100 * np.mean(spent):.0f} %",
    ]


def _answers(arguments: argparse.Namespace) -> tuple[list[FloatArray], Array, list[float]]:
    """Logits (N, C) of every exit, labels (N,), and the cost of each stage."""
    logits, labels, costs = _of(arguments, arguments.model)
    if arguments.then is None:
        return logits, labels, costs
    behind, _, further = _of(arguments, arguments.then)
    return [logits[-1], behind[-1]], labels, [sum(costs), sum(further)]


def _of(arguments: argparse.Namespace, text: str) -> tuple[list[FloatArray], Array, list[float]]:
    name, version, variant, *_ = *text.split("/"), "", ""
    stored = ModelStore(arguments.repository).open(name, int(version) if version else None)
    manifest = stored.manifest
    backend = OrtBackend(stored.directory, manifest, variant or manifest.variants[-1].name, one_thread())
    folders = None
    if arguments.folders is not None:
        folders = {folder: number for number, folder in enumerate(arguments.folders.read_text().split())}
    sets = [read_images(path, stored.labels, manifest.preprocess, folders=folders) for path in arguments.images]
    logits = [logits_per_exit(backend, len(manifest.stages), images.pixels) for images in sets]
    return (
        [np.concatenate(parts) for parts in zip(*logits, strict=True)],
        np.concatenate([images.labels for images in sets]),
        [stage.gmacs for stage in manifest.stages],
    )


if __name__ == "__main__":
    main()
