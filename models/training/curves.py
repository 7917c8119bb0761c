"""Training curves as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure


def draw_curves(log: Path, target: Path, title: str) -> None:
    """Loss and held-out accuracy of each exit over the epochs of a `log.jsonl`, as a PNG."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    epochs = [line["epoch"] for line in lines]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [line["loss"] for line in lines], color="#444444")
    left.set(xlabel="epoch", ylabel="training loss")
    for index, accuracies in enumerate(zip(*(line["held_out_top1_by_exit"] for line in lines), strict=True)):
        right.plot(
            epochs, [100 * accuracy for accuracy in accuracies], marker=".", label=f"exit {index}: {100 * accuracies[-1]:.1f} %"
        )
    right.set(xlabel="epoch", ylabel="held-out top-1, %")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(target, dpi=110)
