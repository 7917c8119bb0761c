"""The page needs nothing beside it, says every figure, and takes nothing for markup."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from exporters.config import Tried
from exporters.receipt.examples import Example
from exporters.receipt.measuring import ExitFigures, PointFigures, Receipt, StageProfile
from exporters.receipt.page import as_page, write
from exporters.serving import ServingFigures
from tests.images import make_jpeg, make_png

FULL = PointFigures(
    "fp32", "full", 0.91, 0.0, 0.0, (0.0, 1.0), 8.0, 125.0, 1.0, 8.1, None, "every image has the answer of the last"
)
FAST = PointFigures("fp32", "fast", 0.90, 0.01, 0.002, (0.75, 0.25), 2.0, 500.0, 4.0, 2.1, 3.5, "")
RECEIPT = Receipt(
    model="mine",
    version=3,
    images=200,
    images_sha256="0" * 64,
    labelled=True,
    points=(FULL, FAST),
    exits=(
        ExitFigures("fp32", 0, 0.8, 0.02, [(0.6, 0.5, 20), (0.95, 0.9, 180)]),
        ExitFigures("fp32", 1, 0.91, 0.03, [(0.9, 0.91, 200)]),
    ),
    profile=(StageProfile("fp32", 0, {"MatMul": 1.5, "others": 0.1}), StageProfile("fp32", 1, {"Gelu": 0.2})),
    serving=(
        ServingFigures(2, 1, 1, 90.0),
        ServingFigures(2, 1, 8, 140.0),
        ServingFigures(1, 2, 1, 95.0),
        ServingFigures(1, 2, 8, 120.0),
    ),
    tried=(Tried("candidate 2", 3.0, 0.005),),
    limits="It promises nothing of other images.",
    machine={"CPU": "one of <those>"},
    command="python -m exporters report --model mine",
    provenance={"command": "python -m exporters export", "licence": "Apache-2.0"},
)
EXAMPLES = [
    Example(0, "cat & dog", "cat & dog", 0.97, make_jpeg(), make_png(), 12),
    Example(1, "ship", "<b>bird</b>", 0.41, make_jpeg(), None, 0),
]


class Page(HTMLParser):
    """What a browser would fetch, and what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += f"{data} "


def test_nothing_is_fetched() -> None:
    """Plots and photos are in the page; there is no script."""
    page = Page(as_page(RECEIPT, EXAMPLES))
    assert len(page.fetched) == 1 + 2 + 3  # the plot, one of each exit, two photos and a map
    assert all(address.startswith("data:image/") for address in page.fetched)
    assert "script" not in page.tags
    assert "link" not in page.tags


def test_it_says_what_was_measured() -> None:
    """Times, losses with their interval, exit rates, promises, operators, the command."""
    words = " ".join(Page(as_page(RECEIPT, EXAMPLES)).words.split()).replace(" :", ":")
    for said in (
        "mine, version 3",
        "4.00\u00d7",
        "1.00 ± 0.20 points lost",
        "75.0 %",
        "fp32, full: every image has the answer of the last",
        "fp32, fast: nothing is proved",
        "It promises nothing of other images.",
        "Leaving at stage 0 of fp32",
        "patches have the mean colour of the token",
        "MatMul",
        "python -m exporters report --model mine",
        "This machine does not tell its energy",
        "FOVEA_RUNTIME__INSTANCES=2 FOVEA_RUNTIME__INTRA_OP_THREADS=1 FOVEA_BATCHING__MAX_BATCH_SIZE=8",
        "1 x 2 95.0 120.0",
    ):
        assert said in words, said


def test_names_are_no_markup() -> None:
    """A class, or a machine, may be called anything."""
    page = Page(as_page(RECEIPT, EXAMPLES))
    assert "is <b>bird</b>" in page.words
    assert "one of <those>" in page.words
    assert "cat & dog" in page.words


@pytest.mark.parametrize("labelled", [True, False])
def test_images_without_labels_are_told(labelled: bool) -> None:
    """Accuracy is agreement then."""
    words = Page(as_page(replace(RECEIPT, labelled=labelled), EXAMPLES)).words
    assert ("The images have no labels" in words) is not labelled


def test_both_files_are_written(tmp_path: Path) -> None:
    """The same figures for programs."""
    page = write(RECEIPT, EXAMPLES, tmp_path / "new" / "folder")
    assert page.read_text() == as_page(RECEIPT, EXAMPLES)
    figures = json.loads((page.parent / "report.json").read_text())
    assert figures["points"][1]["times_as_fast"] == 4.0
    assert figures["tried"] == [{"what": "candidate 2", "ms_per_image": 3.0, "lost": 0.005}]
