"""`fovea report`: the receipt of a published version, on any images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from app.repository.store import ModelStore
from exporters.commands import app, told
from exporters.evaluation import logits_per_exit
from exporters.images import classes_by_folder, read_images, read_unlabelled
from exporters.options import numbered, repeated
from exporters.progress import ConsoleProgress
from exporters.published import backends_here
from exporters.receipt.examples import find_examples
from exporters.receipt.measuring import Subject, measure
from exporters.receipt.page import write


@app.command()
def report(
    images: Annotated[Path, typer.Option(exists=True, help="Folder or zip of <class>/<file> that nothing was fitted on.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")],
    model: Annotated[str, typer.Option(help="Name of a published model.")] = "vit_cifar10",
    version: Annotated[int | None, typer.Option(min=1, help="Its version; unset: the highest.")] = None,
    repository: Annotated[Path, typer.Option(help="Where it is published.")] = Path("models/artifacts"),
    unlabelled: Annotated[bool, typer.Option(help="The images have no labels; the network's answers stand for them.")] = False,
    classes: Annotated[
        Path | None, typer.Option(exists=True, help="JSON object {folder: class}, where folders have other names.")
    ] = None,
    folders: Annotated[Path | None, typer.Option(exists=True, help="Or the folder of each class, one a line.")] = None,
) -> None:
    """Measure every operating point here and write a page: accuracy against speed, exits, photos, where the time goes."""
    console = Console()
    with told(console), ConsoleProgress.on(console) as progress:
        stored = ModelStore(repository).open(model, version)
        manifest = stored.manifest
        if unlabelled:
            image_set = read_unlabelled(images, manifest.preprocess, progress)
        else:
            mapped = numbered(folders)
            if classes is not None:
                mapped = classes_by_folder(json.loads(classes.read_text()), stored.labels)
            image_set = read_images(images, stored.labels, manifest.preprocess, folders=mapped, progress=progress)
        backends = backends_here(stored)
        logits = {
            name: logits_per_exit(backend, len(manifest.stages), image_set.pixels, progress)
            for name, backend in backends.items()
        }
        if unlabelled:
            image_set = replace(image_set, labels=next(iter(logits.values()))[-1].argmax(axis=1))
        subject = Subject(stored.directory, manifest, backends, logits)
        asked = {"--model": model, "--version": manifest.version, "--images": images}
        asked |= {"--classes": classes, "--folders": folders, "--out": out}
        command = repeated("report", asked, {"--unlabelled": unlabelled})
        receipt = measure(subject, image_set, labelled=not unlabelled, command=command, progress=progress)
        page = write(receipt, find_examples(subject, image_set, stored.labels, labelled=not unlabelled), out)
        for point in receipt.points:
            progress.step(
                f"{point.variant}, {point.point}: {point.times_as_fast:.2f} times as fast, "
                f"{100 * point.lost:.2f} ± {100 * point.within:.2f} points lost"
            )
    console.print(f"wrote {page}", soft_wrap=True)
