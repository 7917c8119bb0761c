"""The receipt as files: `report.html`, which needs nothing beside it, and `report.json`."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from exporters.receipt.examples import Example
from exporters.receipt.measuring import PointFigures, Receipt
from exporters.receipt.plots import accuracy_over_speed, reliability_of
from exporters.serving import best_of

TEMPLATE = "report.html.jinja"
PAGE_FILE, FIGURES_FILE = "report.html", "report.json"


def as_page(receipt: Receipt, examples: Sequence[Example]) -> str:
    """HTML; plots and photos are in it."""
    environment = Environment(
        loader=PackageLoader("exporters.receipt", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "inline": _inline}
    shown = receipt.profile[0].variant
    return environment.get_template(TEMPLATE).render(
        receipt=receipt,
        baseline=receipt.points[0],
        headline=_headline(receipt.points),
        shown=shown,
        frontier=accuracy_over_speed(receipt.points, receipt.tried),
        reliability=[(exit_, reliability_of(exit_)) for exit_ in receipt.exits if exit_.variant == shown],
        examples=[(stage, [*each]) for stage, each in groupby(examples, key=lambda example: example.stage)],
        rates=next(point.exit_rates for point in reversed(_of(receipt, shown)) if point.point in ("balanced", "full")),
        best=best_of(receipt.serving),
        slowest=max(sum(stage.operators.values()) for stage in receipt.profile),
    )


def as_json(receipt: Receipt) -> str:
    """Every figure."""
    return json.dumps(asdict(receipt), indent=2) + "\n"


def write(receipt: Receipt, examples: Sequence[Example], folder: Path) -> Path:
    """Both files; the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FIGURES_FILE).write_text(as_json(receipt))
    page = folder / PAGE_FILE
    page.write_text(as_page(receipt, examples))
    return page


def _of(receipt: Receipt, variant: str) -> list[PointFigures]:
    return [point for point in receipt.points if point.variant == variant]


def _headline(points: Sequence[PointFigures]) -> list[PointFigures]:
    """The fastest variant at each operating point, in the order of the points."""
    best: dict[str, PointFigures] = {}
    for point in points:
        if point.point not in best or point.images_per_s > best[point.point].images_per_s:
            best[point.point] = point
    return [*best.values()]


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _points(share: float) -> str:
    return f"{100 * share + 0.0:.2f}"


def _inline(file: bytes | None, kind: str) -> str:
    """As an address that carries the file."""
    return f"data:{kind};base64,{base64.b64encode(file or b'').decode()}"
