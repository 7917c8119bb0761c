"""`fovea export`: from weights to a published version. `fovea evaluate`: measure one again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from app.errors import ServiceError
from exporters.config import ExitConfig, ExportConfig
from exporters.diagrams import draw_reliability
from exporters.images import ImageSetError
from exporters.published import print_tables, remeasure
from exporters.publishing import AlreadyPublished
from exporters.recipe import run
from exporters.validation import ValidationError
from models.weights import WeightsError
from models.zoo import ZOO

app = typer.Typer(add_completion=False, help="Make published versions out of trained networks, and measure them.")


@app.callback()
def _group() -> None:
    """Make published versions out of trained networks, and measure them."""


@app.command()
def export(
    weights: Annotated[Path, typer.Option(exists=True, dir_okay=False, help=".safetensors, or a training checkpoint.")],
    calibration: Annotated[Path, typer.Option(exists=True, help="Folder or zip of <class>/<file> to fit exits and INT8 on.")],
    test: Annotated[Path, typer.Option(exists=True, help="The same form; only measured on.")],
    version: Annotated[int, typer.Option(min=1, help="Number of the new version.")],
    model: Annotated[str, typer.Option(help="Name of the zoo.")] = "vit_cifar10",
    repository: Annotated[Path, typer.Option(help="Where versions are published.")] = Path("models/artifacts"),
    int8: Annotated[bool, typer.Option(help="Also export the INT8 variant.")] = True,
    max_drop: Annotated[float, typer.Option(min=0, max=100, help="Points of accuracy that exits may cost.")] = 0.5,
    also: Annotated[list[str] | None, typer.Option(help="NAME=PATH: further labelled images, measured too.")] = None,
    also_classes: Annotated[Path | None, typer.Option(exists=True, help="JSON {folder: class} of those.")] = None,
    data: Annotated[str, typer.Option(help="A sentence on the training data, for the model card.")] = "not stated",
    training: Annotated[str, typer.Option(help="A sentence on the training, for the model card.")] = "not stated",
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "not stated",
) -> None:
    """Export a network of the zoo, stage by stage, in fp32 and INT8, with fitted exits."""
    console = Console()
    if model not in ZOO:
        console.print(f"[red]no model called {model!r}; there are {', '.join(sorted(ZOO))}[/]")
        raise typer.Exit(2)
    others = {name: Path(path) for name, _, path in (text.partition("=") for text in also or [])}
    if missing := [name for name, path in others.items() if not path.exists()]:
        console.print(f"[red]there are no images called {', '.join(missing)}; say --also NAME=PATH[/]")
        raise typer.Exit(2)
    config = ExportConfig(
        model=model,
        weights=weights,
        calibration_images=calibration,
        test_images=test,
        repository=repository,
        version=version,
        other_images=others,
        other_classes=None if also_classes is None else json.loads(also_classes.read_text()),
        int8=int8,
        exits=ExitConfig(max_accuracy_drop=max_drop / 100),
        data=data,
        training=training,
        licence=licence,
        command=shlex.join(
            ["python", "-m", "exporters", "export", "--model", model, "--version", str(version), "--max-drop", f"{max_drop:g}"]
            + ["--weights", weights.name, "--calibration", calibration.name, "--test", test.name]  # no folders of this machine
            + ([] if int8 else ["--no-int8"])
        ),
    )
    try:
        with console.status("exporting"):
            directory = run(config, lambda step: console.print(f"· {step}"))
    except (AlreadyPublished, ImageSetError, ValidationError, WeightsError) as error:
        console.print(f"[red]{error}[/]", soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(f"published {directory}", soft_wrap=True)


@app.command()
def evaluate(
    images: Annotated[Path, typer.Option(exists=True, help="Folder or zip of <class>/<file>, labelled.")],
    model: Annotated[str, typer.Option(help="Name of a published model.")] = "vit_cifar10",
    version: Annotated[int | None, typer.Option(min=1, help="Its version; unset: the highest.")] = None,
    repository: Annotated[Path, typer.Option(help="Where it is published.")] = Path("models/artifacts"),
    classes: Annotated[
        Path | None, typer.Option(exists=True, help="JSON object {folder: class}, where folders have other names.")
    ] = None,
    diagram: Annotated[Path | None, typer.Option(help="Write a reliability diagram here (.png or .svg).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Measure a published version: accuracy and calibration of each exit, what exits and INT8 cost and save."""
    console = Console()
    try:
        mapping = None if classes is None else json.loads(classes.read_text())
        with console.status("measuring"):
            found = remeasure(repository, model, version, images, classes=mapping)
    except (ImageSetError, ServiceError, json.JSONDecodeError) as error:
        console.print(f"[red]{error}[/]", soft_wrap=True)
        raise typer.Exit(1) from error
    print_tables(console, found)
    if diagram is not None:
        variants = found.variants
        draw_reliability(
            {name: figures["reliability_by_exit"] for name, figures in variants.items()},
            {name: figures["ece_by_exit"] for name, figures in variants.items()},
            diagram,
        )
    if json_file is not None:
        images_used = {"number": found.num_images, "sha256": found.sha256}
        figures = {"images": images_used, "variants": found.variants, "ms_per_image": found.ms_per_image}
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
