"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

Bins = Sequence[tuple[float, float, int]]  # mean confidence, accuracy, images


def draw_reliability(reliability: Mapping[str, Sequence[Bins]], ece: Mapping[str, Sequence[float]], target: Path) -> None:
    """Accuracy over confidence, a row per variant and a column per exit; the area of a point is its share of the images.

    Args:
        reliability: by variant, the bins of each exit; ece: by variant, each exit's calibration error, 0 .. 1.
        target: a PNG or SVG file.

    Source: Niculescu-Mizil and Caruana, Predicting Good Probabilities with Supervised Learning, ICML 2005.
    """
    columns = max(len(exits) for exits in reliability.values())
    figure = Figure(figsize=(3.2 * columns, 3.4 * len(reliability)), layout="constrained")
    grid = figure.subplots(len(reliability), columns, squeeze=False, sharex=True, sharey=True)
    for row, (variant, exits) in zip(grid, reliability.items(), strict=True):
        for index, (axes, bins) in enumerate(zip(row, exits, strict=True)):
            confidence, accuracy, count = zip(*bins, strict=True)
            total = sum(count)
            axes.plot([0, 100], [0, 100], color="#999999", linewidth=1, linestyle="--")
            axes.plot([100 * c for c in confidence], [100 * a for a in accuracy], color="#1f5fa8", linewidth=1)
            areas = [12 + 400 * images / total for images in count]
            axes.scatter(
                [100 * c for c in confidence], [100 * a for a in accuracy], s=areas, color="#1f5fa8", alpha=0.55, linewidths=0
            )
            axes.set_title(f"{variant}, exit {index}: ECE {100 * ece[variant][index]:.1f} %", fontsize=10)
            axes.set(xlim=(0, 104), ylim=(0, 104))
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("confidence, %")
    for row in grid:
        row[0].set_ylabel("accuracy, %")
    figure.savefig(target, dpi=110)
