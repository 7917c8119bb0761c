"""The plots of a receipt, as SVG: accuracy over speed, and accuracy over confidence."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from exporters.config import Tried
from exporters.receipt.measuring import ExitFigures, PointFigures

BLUE, GREY, ORANGE = "#1f5fa8", "#8a8f98", "#c8641e"
WIDTH, HEIGHT = 4.6, 3.4  # inches: read on a phone too, where a plot is as wide as the page


def accuracy_over_speed(points: Sequence[PointFigures], tried: Sequence[Tried]) -> bytes:
    """Each operating point with the 95 % interval of its loss; what a search tried behind them, and the Pareto front.

    Args:
        points: the first is what the others are compared with.
        tried: losses there are of other images, so they are drawn against the first point's accuracy.
    """
    first = points[0]
    figure, axes = _figure(WIDTH, HEIGHT)
    if tried:
        axes.plot(
            [1000 / each.ms_per_image for each in tried],
            [100 * (first.top1 - each.lost) for each in tried],
            linestyle="none",
            marker=".",
            color=GREY,
            alpha=0.7,
            label="tried, on the images it chose by",
        )
    best = _front(points)
    axes.plot([p.images_per_s for p in best], [100 * p.top1 for p in best], color=BLUE, linewidth=1, alpha=0.6)
    for name in dict.fromkeys(point.variant for point in points):
        mine = [point for point in points if point.variant == name]
        axes.errorbar(
            [p.images_per_s for p in mine],
            [100 * p.top1 for p in mine],
            yerr=[100 * p.within for p in mine],
            fmt="o",
            capsize=3,
            color=BLUE if name == points[-1].variant else ORANGE,
            label=name,
        )
    for rank, point in enumerate(sorted(points, key=lambda each: each.images_per_s)):
        axes.annotate(
            f"{point.point}, {point.times_as_fast:.1f}x",
            (point.images_per_s, 100 * point.top1),
            xytext=(6, 8 if rank % 2 else -14),  # neighbours are often close
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(xlabel="images a second, one thread", ylabel="right answers, %")
    axes.margins(x=0.18, y=0.15)
    axes.legend(fontsize=8, loc="best", frameon=False)
    return _svg(figure)


def reliability_of(exit_: ExitFigures) -> bytes:
    """Accuracy over confidence; the area of a point is its share of the images (Niculescu-Mizil and Caruana, ICML 2005)."""
    figure, axes = _figure(2.6, 2.6)
    total = sum(count for *_, count in exit_.bins)
    confidence, accuracy = ([100 * each[index] for each in exit_.bins] for index in (0, 1))
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle="--")
    axes.plot(confidence, accuracy, color=BLUE, linewidth=1)
    areas = [12 + 400 * count / total for *_, count in exit_.bins]
    axes.scatter(confidence, accuracy, s=areas, color=BLUE, alpha=0.55, linewidths=0)
    axes.set(xlim=(0, 104), ylim=(0, 104), xlabel="confidence, %", ylabel="right answers, %")
    return _svg(figure)


def _front(points: Sequence[PointFigures]) -> list[PointFigures]:
    """Those that no other beats in both, the slowest first."""
    found: list[PointFigures] = []
    for point in sorted(points, key=lambda each: (-each.images_per_s, -each.top1)):
        if not found or point.top1 > found[-1].top1:
            found.append(point)
    return found[::-1]


def _figure(width: float, height: float):  # type: ignore[no-untyped-def]  # matplotlib's axes are Any
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fovea", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
