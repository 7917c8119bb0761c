"""What every command does: an error is told in a line, and what was published is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from app.errors import ServiceError
from exporters.config import ExportConfig
from exporters.images import ImageSetError
from exporters.model_card import exits_cost_more, unlike_images
from exporters.progress import ConsoleProgress
from exporters.published import from_report, print_tables
from exporters.publishing import AlreadyPublished
from exporters.recipe import run
from exporters.reduction_schedule import ScheduleError
from exporters.sources.base import SourceError
from exporters.validation import ValidationError
from exporters.whole_graph import GraphError
from models.weights import WeightsError

app = typer.Typer(add_completion=False, help="Make published versions out of trained networks, and measure them.")


@app.callback()
def _group() -> None:
    """Make published versions out of trained networks, and measure them."""


# What its user can mend: told in a line, and nothing is published.
UNUSABLE = (
    AlreadyPublished,
    GraphError,
    ImageSetError,
    ScheduleError,
    ServiceError,  # what is exported is loaded as the service would
    SourceError,
    ValidationError,
    WeightsError,
    json.JSONDecodeError,
    OSError,  # a full disk, a folder that may not be written
)


@contextmanager
def told(console: Console) -> Iterator[None]:
    """What its user can mend ends the command with a line."""
    try:
        yield
    except UNUSABLE as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error


def publish(console: Console, config: ExportConfig) -> None:
    """Export, and show what was measured."""
    with ConsoleProgress.on(console) as progress:
        directory = run(config, progress)
    show(console, config, directory)


def show(console: Console, config: ExportConfig, directory: Path) -> None:
    """What was measured of a version that was just published."""
    found = from_report(directory)
    print_tables(console, found)
    report = json.loads((directory / "report.json").read_text())
    for warning in (exits_cost_more(found.variants, config.exits.max_accuracy_drop), unlike_images(report)):
        if warning:
            console.print(f"[yellow]{escape(warning)}[/]", soft_wrap=True, highlight=False)
    console.print(f"published {directory}", soft_wrap=True)
