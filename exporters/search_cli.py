"""`fovea cascade`: two published models as one. `fovea optimize`: from a network and a budget to operating points."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from exporters.commands import app, publish, show, told
from exporters.optimize import Budget, Search
from exporters.optimize import optimize as optimize_ladder
from exporters.options import (
    USUAL_CONFIDENCE,
    USUAL_FAST_DROP,
    USUAL_SCORE,
    Common,
    Confidence,
    FastDrop,
    MaxDrop,
    Recover,
    Score,
    numbers,
    source_of,
)
from exporters.progress import ConsoleProgress
from exporters.sources.base import AS_IT_IS, SourceError
from exporters.sources.cascade import CascadeSource, Part

SHARES = ",".join(f"{100 * share:g}" for share in Search().shares)


@app.command()
def cascade(
    calibration: Annotated[Path, typer.Option(exists=True, help="Folder or zip of <class>/<file> to fit exits on.")],
    test: Annotated[Path, typer.Option(exists=True, help="The same form; only measured on.")],
    model: Annotated[str, typer.Option(help="Name of the new model.")],
    version: Annotated[int, typer.Option(min=1, help="Its version.")],
    cheap: Annotated[str, typer.Option(help="NAME/VERSION/VARIANT: the model that sees every image.")],
    dear: Annotated[str, typer.Option(help="Likewise: the model for images that the cheap one is not sure of.")],
    repository: Annotated[Path, typer.Option(help="Where they are, and where it is published.")] = Path("models/artifacts"),
    unlabelled: Annotated[bool, typer.Option(help="The images have no labels; the dear one's answers stand for them.")] = False,
    folders: Annotated[Path | None, typer.Option(exists=True, help="The folder of each class's images, one a line.")] = None,
    max_drop: MaxDrop = 0.5,
    fast_drop: FastDrop = USUAL_FAST_DROP,
    confidence: Confidence = USUAL_CONFIDENCE,
    score: Score = USUAL_SCORE,
) -> None:
    """Put two published models one behind the other: the dear one sees what the cheap one is not sure of."""
    console = Console()
    with told(console):
        parts = CascadeSource(repository, (Part.parse(cheap), Part.parse(dear)))
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
        )
        command = common.command("cascade", {"--cheap": cheap, "--dear": dear})
        config = replace(common.config(parts, parts.open_dear().manifest.provenance, command), int8=False)
        publish(console, config)


@app.command()
def optimize(
    calibration: Annotated[Path, typer.Option(exists=True, help="Folder or zip of <class>/<file> to search and certify on.")],
    test: Annotated[Path, typer.Option(exists=True, help="The same form; only measured on.")],
    model: Annotated[str, typer.Option(help="Name of the new model.")],
    version: Annotated[int, typer.Option(min=1, help="Its version.")],
    work: Annotated[Path, typer.Option(help="Where candidates are kept; the same folder goes on with an interrupted search.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="Folder of a checkpoint, or its name on the hub: ViT, DeiT or CaiT.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(exists=True, help="Or its weights (.safetensors, .pth),")] = None,
    timm_config: Annotated[Path | None, typer.Option(exists=True, help="with its config.json as timm writes it,")] = None,
    labels: Annotated[Path | None, typer.Option(exists=True, help="and its labels, one a line.")] = None,
    repository: Annotated[Path, typer.Option(help="Where the ladder is published.")] = Path("models/artifacts"),
    unlabelled: Annotated[bool, typer.Option(help="The images have no labels; the network's answers stand for them.")] = False,
    folders: Annotated[Path | None, typer.Option(exists=True, help="The folder of each class's images, one a line.")] = None,
    method: Annotated[
        str | None, typer.Option(help="How tokens are reduced; unset: mctf where there is a class token, else tome.")
    ] = None,
    shares: Annotated[str, typer.Option(help="Percent of the multiply-adds that are left, most first.")] = SHARES,
    patch_sizes: Annotated[
        str | None,
        typer.Option(help="Pixels of larger patches, which are fewer tokens too, smallest first; none: 0; unset: three sizes."),
    ] = None,
    recover: Recover = None,
    int8: Annotated[bool, typer.Option(help="Candidates in INT8, where this CPU has it exactly.")] = True,
    max_latency_ms: Annotated[
        float | None, typer.Option(min=0, help="Of an image alone, on one thread, through every graph that it may pass.")
    ] = None,
    target_throughput: Annotated[
        float | None,
        typer.Option(min=0, help="Images a second on all CPUs: `balanced` is the most faithful that reaches it."),
    ] = None,
    max_drop: MaxDrop = 0.5,
    fast_drop: FastDrop = USUAL_FAST_DROP,
    confidence: Confidence = USUAL_CONFIDENCE,
) -> None:
    """Find the fastest way on this machine to lose no more than said: a version that is full, balanced and fast."""
    console = Console()
    with told(console):
        source, _ = source_of(model, weights, timm_config, labels, checkpoint, AS_IT_IS)
        search = Search(method, _shares(shares), _patch_sizes(patch_sizes))
        budget = Budget(max_latency_ms, target_throughput)
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
        )
        command = common.command(
            "optimize",
            {
                "--method": method,
                "--shares": None if shares == SHARES else shares,
                "--patch-sizes": patch_sizes,
                "--recover": recover,
                "--max-latency-ms": max_latency_ms,
                "--target-throughput": target_throughput,
                "--checkpoint": None if checkpoint is None else Path(checkpoint),
                "--weights": weights,
                "--timm-config": timm_config,
                "--labels": labels,
            },
            {"--no-int8": not int8},
        )
        config = replace(common.config(source, {}, command), int8=int8, recovery=recover)
        with ConsoleProgress.on(console) as progress:
            directory = optimize_ladder(config, search, work, progress, budget=budget)
        show(console, config, directory)


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) / 100 for part in text.split(","))
    except ValueError as error:
        raise SourceError(f"shares are percents, most first, as {SHARES}; not {text!r}") from error
    if list(found) != sorted(set(found), reverse=True) or not all(0 < share < 1 for share in found):
        raise SourceError(f"shares are percents between 0 and 100, most first, as {SHARES}; not {text!r}")
    return found


def _patch_sizes(text: str | None) -> tuple[int, ...] | None:
    try:
        sizes = numbers(text)
    except SourceError as error:
        raise SourceError(f"patch sizes are pixels, smallest first, as 18,20,22; not {text!r}") from error
    if text is None:
        return None
    return () if sizes == (0,) else sizes
