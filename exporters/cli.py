"""`fovea export`: from weights to a published version."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from exporters.config import ExitConfig, ExportConfig
from exporters.images import ImageSetError
from exporters.publishing import AlreadyPublished
from exporters.recipe import run
from exporters.validation import ValidationError
from models.weights import WeightsError
from models.zoo import ZOO

app = typer.Typer(add_completion=False, help="Make published versions out of trained networks.")


@app.callback()
def _group() -> None:
    """Make published versions out of trained networks."""


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
    data: Annotated[str, typer.Option(help="A sentence on the training data, for the model card.")] = "not stated",
    training: Annotated[str, typer.Option(help="A sentence on the training, for the model card.")] = "not stated",
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "not stated",
) -> None:
    """Export a network of the zoo, stage by stage, in fp32 and INT8, with fitted exits."""
    console = Console()
    if model not in ZOO:
        console.print(f"[red]no model called {model!r}; there are {', '.join(sorted(ZOO))}[/]")
        raise typer.Exit(2)
    config = ExportConfig(
        model=model,
        weights=weights,
        calibration_images=calibration,
        test_images=test,
        repository=repository,
        version=version,
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
