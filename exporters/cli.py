"""`fovea export`: from weights to a published version. `fovea quantize`: INT8 for one. `fovea evaluate`: measure one again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exporters import report_cli, search_cli  # noqa: F401 - their commands are the same program's
from exporters.commands import app, publish, told
from exporters.diagrams import draw_reliability
from exporters.images import classes_by_folder
from exporters.options import (
    INT8,
    USUAL_CONFIDENCE,
    USUAL_FAST_DROP,
    USUAL_SCORE,
    Agreement,
    Common,
    Confidence,
    FastDrop,
    Fp32Share,
    MaxDrop,
    Recover,
    Score,
    lines,
    named_paths,
    numbers,
    onnx_source,
    source_of,
)
from exporters.plan import plan
from exporters.progress import ConsoleProgress
from exporters.published import print_tables, remeasure
from exporters.sources.base import AS_IT_IS, Asked, SourceError
from exporters.sources.published import PublishedSource

__all__ = ["app"]


@app.command()
def export(
    calibration: Annotated[Path, typer.Option(exists=True, help="Folder or zip of <class>/<file> to fit exits and INT8 on.")],
    test: Annotated[Path, typer.Option(exists=True, help="The same form; only measured on.")],
    version: Annotated[int, typer.Option(min=1, help="Number of the new version.")],
    weights: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help=".safetensors, a checkpoint, a state dict.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Or a folder as transformers or timm writes it, or its name on the hub.")
    ] = None,
    onnx: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Or a classifier's ONNX file.")] = None,
    preprocessor: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Its preprocessor_config.json (transformers) or config.json (timm)."),
    ] = None,
    model: Annotated[str, typer.Option(help="Name to publish under, and the network's in the zoo.")] = "vit_cifar10",
    timm_config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The weights are timm's; this is their config.json.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(exists=True, help="Where the checkpoint names none: a label a line.")] = None,
    folders: Annotated[Path | None, typer.Option(exists=True, help="The folder of each class's images, one a line.")] = None,
    unlabelled: Annotated[bool, typer.Option(help="The images have no labels; the network's answers stand for them.")] = False,
    repository: Annotated[Path, typer.Option(help="Where versions are published.")] = Path("models/artifacts"),
    int8: Annotated[bool, typer.Option(help="Also export the INT8 variant.")] = True,
    qdq: Annotated[bool, typer.Option(help="And INT8 as QDQ pairs, for OpenVINO.")] = False,
    fp16: Annotated[bool, typer.Option(help="Also export an fp16 variant, for GPUs.")] = False,
    boundaries: Annotated[
        str | None, typer.Option(help="Blocks after which a stage ends, as 4,8,12; exits are fitted.")
    ] = None,
    stages: Annotated[
        int | None,
        typer.Option(min=1, help="Of a network with exits, the first so many stages: deeper ones may know no more."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels, where other than the network was trained with; positions are resampled.")
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Likewise of a patch: larger patches are fewer tokens; its weights are resampled.")
    ] = None,
    reduce: Annotated[
        str | None,
        typer.Option(
            help="Fewer tokens: METHOD:R in every block, METHOD:RxN in the last N, METHOD:R,R,…; METHOD:55% and METHOD:>0.3 "
            "find a schedule, for a share of the work or a threshold."
        ),
    ] = None,
    recover: Recover = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="A last exit that sees the mirror image too, for images that no other is sure of.")
    ] = False,
    target_agreement: Agreement = 100 * INT8.target_agreement,
    max_fp32_share: Fp32Share = 100 * INT8.max_fp32_share,
    max_drop: MaxDrop = 0.5,
    fast_drop: FastDrop = USUAL_FAST_DROP,
    confidence: Confidence = USUAL_CONFIDENCE,
    score: Score = USUAL_SCORE,
    also: Annotated[list[str] | None, typer.Option(help="NAME=PATH: further labelled images, measured too.")] = None,
    also_classes: Annotated[Path | None, typer.Option(exists=True, help="JSON {folder: class} of those.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be made, and make nothing.")] = False,
    data: Annotated[str, typer.Option(help="A sentence on the training data, for the model card.")] = "not stated",
    training: Annotated[str, typer.Option(help="A sentence on the training, for the model card.")] = "not stated",
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "not stated",
) -> None:
    """Make a published version, fp32 and INT8: of a ViT in stages with exits, of any other classifier in one piece."""
    console = Console()
    with told(console):
        named = {"--weights": weights, "--checkpoint": checkpoint, "--onnx": onnx}
        if len(given := [option for option, value in named.items() if value is not None]) > 1:
            raise SourceError(f"say one of {' and '.join(given)}")
        if onnx is None and preprocessor is not None:
            raise SourceError("--preprocessor goes with --onnx; other checkpoints have their own")
        asked = Asked(numbers(boundaries), image_size, patch_size)
        if onnx is not None and (asked != AS_IT_IS or timm_config is not None):
            raise SourceError(
                "an ONNX file is exported in one piece, as it is: --boundaries, --image-size, --patch-size and --timm-config "
                "do not go with --onnx"
            )
        if onnx is None:
            source, names = source_of(model, weights, timm_config, labels, checkpoint, asked, stages)
        else:
            source, names = onnx_source(onnx, preprocessor, labels)
        common = Common(
            model=model,
            version=version,
            repository=repository,
            calibration=calibration,
            test=test,
            unlabelled=unlabelled,
            folders=folders,
            max_drop=max_drop,
            fast_drop=fast_drop,
            confidence=confidence,
            score=score,
            target_agreement=target_agreement,
            max_fp32_share=max_fp32_share,
        )
        command = common.command(
            "export",
            {
                "--timm-config": timm_config,
                "--checkpoint": None if checkpoint is None else Path(checkpoint),
                "--onnx": onnx,
                "--preprocessor": preprocessor,
                "--labels": labels,
                "--weights": weights,
                "--also-classes": also_classes,
                "--reduce": reduce,
                "--recover": recover,
                "--boundaries": boundaries,
                "--stages": stages,
                "--image-size": image_size,
                "--patch-size": patch_size,
            },
            {"--no-int8": not int8, "--qdq": qdq, "--fp16": fp16, "--mirror": mirror},
        )
        config = replace(
            common.config(source, {"data": data, "training": training, "licence": licence}, command),
            other_images=named_paths(also or []),
            other_folders=None if also_classes is None else classes_by_folder(json.loads(also_classes.read_text()), names),
            int8=int8,
            qdq=qdq,
            fp16=fp16,
            reduction=reduce,
            recovery=recover,
            mirror=mirror,
        )
        if dry_run:
            _print_plan(console, plan(config))
        else:
            publish(console, config)


def _print_plan(console: Console, told: dict[str, str]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in told.items():
        table.add_row(name, escape(value))
    console.print(table)
    console.print("nothing was written: --dry-run")


@app.command()
def quantize(
    calibration: Annotated[Path, typer.Option(exists=True, help="Folder or zip of <class>/<file> to fit exits and INT8 on.")],
    test: Annotated[Path, typer.Option(exists=True, help="The same form; only measured on.")],
    model: Annotated[str, typer.Option(help="Name of a published model.")],
    version: Annotated[int, typer.Option(min=1, help="Number of the new version.")],
    source: Annotated[int | None, typer.Option("--from", min=1, help="The version to start from; unset: the highest.")] = None,
    repository: Annotated[Path, typer.Option(help="Where versions are published.")] = Path("models/artifacts"),
    unlabelled: Annotated[bool, typer.Option(help="The images have no labels; the network's answers stand for them.")] = False,
    folders: Annotated[Path | None, typer.Option(exists=True, help="The folder of each class's images, one a line.")] = None,
    target_agreement: Agreement = 100 * INT8.target_agreement,
    max_fp32_share: Fp32Share = 100 * INT8.max_fp32_share,
    max_drop: MaxDrop = 0.5,
    fast_drop: FastDrop = USUAL_FAST_DROP,
    confidence: Confidence = USUAL_CONFIDENCE,
    score: Score = USUAL_SCORE,
) -> None:
    """Give a published version INT8, or calibrate it anew: its fp32 stages, INT8 and exits fitted on these images."""
    console = Console()
    with told(console):
        stored = PublishedSource(repository, model, source).open().manifest
        common = Common(
            model=model,
            version=version,
            repository=repository,
            calibration=calibration,
            test=test,
            unlabelled=unlabelled,
            folders=folders,
            max_drop=max_drop,
            fast_drop=fast_drop,
            confidence=confidence,
            score=score,
            target_agreement=target_agreement,
            max_fp32_share=max_fp32_share,
        )
        command = common.command("quantize", {"--from": stored.version})
        config = common.config(PublishedSource(repository, model, stored.version), stored.provenance, command)
        publish(console, config)


@app.command()
def evaluate(
    images: Annotated[Path, typer.Option(exists=True, help="Folder or zip of <class>/<file>, labelled.")],
    model: Annotated[str, typer.Option(help="Name of a published model.")] = "vit_cifar10",
    version: Annotated[int | None, typer.Option(min=1, help="Its version; unset: the highest.")] = None,
    repository: Annotated[Path, typer.Option(help="Where it is published.")] = Path("models/artifacts"),
    classes: Annotated[
        Path | None, typer.Option(exists=True, help="JSON object {folder: class}, where folders have other names.")
    ] = None,
    folders: Annotated[Path | None, typer.Option(exists=True, help="Or the folder of each class, one a line.")] = None,
    diagram: Annotated[Path | None, typer.Option(help="Write a reliability diagram here (.png or .svg).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Measure a published version: accuracy and calibration of each exit, what exits and INT8 cost and save."""
    console = Console()
    with told(console):
        mapping = None if classes is None else json.loads(classes.read_text())
        names = None if folders is None else lines(folders)
        with ConsoleProgress.on(console) as progress:
            found = remeasure(repository, model, version, images, classes=mapping, folders=names, progress=progress)
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
