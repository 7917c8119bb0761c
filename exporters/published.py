"""Measure a published version again: the figures of its card, on any labelled images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.repository.store import ModelStore, StoredModel
from app.runtime.cpu import has_exact_int8
from app.runtime.ort_backend import OrtBackend
from app.runtime.targets import TargetProfile, resolve_profile
from app.types import FloatArray
from exporters.evaluation import evaluate, logits_per_exit
from exporters.images import classes_by_folder, read_images
from exporters.model_card import by_class, milliseconds, mistakes, percent, points
from exporters.progress import SILENT, Progress
from exporters.timing import milliseconds_per_image
from models.manifest import HardwareTarget, ModelManifest


@dataclass(frozen=True, slots=True)
class Remeasured:
    """Figures of every variant that this CPU runs exactly."""

    manifest: ModelManifest
    labels: tuple[str, ...]
    num_images: int
    sha256: str  # of the images
    variants: dict[str, dict[str, Any]]  # as `evaluate` gives them
    ms_per_image: dict[str, dict[str, float]]


def remeasure(
    repository: Path,
    model: str,
    version: int | None,
    images: Path,
    *,
    classes: Mapping[str, str] | None = None,
    folders: Sequence[str] | None = None,
    progress: Progress = SILENT,
) -> Remeasured:
    """Every exit of every variant on the images; the version's own temperatures and thresholds.

    Args:
        classes: the label of each folder of images; folders it does not name are passed over.
        folders: or the folder of each class, in the order of the classes. Neither: folders are labels.

    Raises:
        ModelNotFound, ModelInvalid, ImageSetError: what cannot be measured.
    """
    stored = ModelStore(repository).open(model, version)
    manifest = stored.manifest
    numbers = None if folders is None else {folder: number for number, folder in enumerate(folders)}
    numbers = numbers if classes is None else classes_by_folder(classes, stored.labels)
    image_set = read_images(images, stored.labels, manifest.preprocess, folders=numbers, progress=progress)
    backends = backends_here(stored)
    exits = {name: manifest.variant(name).exits for name in backends}
    logits: dict[str, list[FloatArray]] = {
        name: logits_per_exit(backend, len(manifest.stages), image_set.pixels, progress) for name, backend in backends.items()
    }
    reference = logits.get("fp32", next(iter(logits.values())))[-1]
    return Remeasured(
        manifest,
        stored.labels,
        len(image_set),
        image_set.sha256,
        {name: evaluate(logits[name], image_set.labels, exits[name], manifest.stages, reference) for name in backends},
        milliseconds_per_image(backends, exits, image_set.pixels, entries=manifest.entries),
    )


def backends_here(stored: StoredModel) -> dict[str, OrtBackend]:
    """Of every variant that this CPU runs exactly, in the order of the manifest; one thread."""
    here = {HardwareTarget.CPU, *([HardwareTarget.CPU_VNNI] if has_exact_int8() else [])}
    return {
        variant.name: OrtBackend(stored.directory, stored.manifest, variant.name, one_thread())
        for variant in stored.manifest.variants
        if here & set(variant.targets)
    }


def from_report(directory: Path) -> Remeasured:
    """What the export measured on its test images."""
    manifest = ModelManifest.load(directory)
    labels = tuple((directory / manifest.labels_file).read_text().splitlines())
    report = json.loads((directory / "report.json").read_text())
    tested = report["tested_on"]
    return Remeasured(manifest, labels, tested["images"], tested["sha256"], report["variants"], report["ms_per_image"])


def one_thread() -> TargetProfile:
    """One instance of one thread on this CPU, whatever the service would choose."""
    return on_this_cpu(threads=1)


def on_this_cpu(threads: int) -> TargetProfile:
    """One instance of so many threads."""
    return resolve_profile("cpu", instances=1, intra_op_threads=threads)


def print_tables(console: Console, found: Remeasured) -> None:
    """The figures, for people."""
    stages = len(found.manifest.stages)
    console.print(f"{found.manifest.name}, version {found.manifest.version}, on {found.num_images} images", highlight=False)
    accuracy = Table("variant", *(f"exit {index}" for index in range(stages)), "with exits on", "top-5", "lost to fp32")
    routing = Table("variant", *(f"leave at {index}" for index in range(stages)), "compute saved", "lost by exits", "ms/image")
    calibration = Table("variant", *(f"ECE, exit {index}" for index in range(stages)))
    for name, figures in found.variants.items():
        point, times = figures["operating_point"], found.ms_per_image[name]
        accuracy.add_row(
            name,
            *(percent(value) for value in figures["top1_by_exit"]),
            percent(point["top1"]),
            percent(figures["top5_by_exit"][-1]),
            points(figures["loss_against_fp32"]),
        )
        routing.add_row(
            name,
            *(percent(value) for value in point["exit_rates"]),
            percent(point["compute_saved"]),
            points(point["loss_against_full_depth"]),
            milliseconds(times),
        )
        calibration.add_row(name, *(percent(value) for value in figures["ece_by_exit"]))
    for table in (accuracy, routing, calibration):
        console.print(table)
    last, figures = list(found.variants.items())[-1]
    console.print(f"By class, {last} with exits on: {by_class(figures, found.labels)}", highlight=False, soft_wrap=True)
    console.print(f"Most frequent mistakes: {mistakes(figures, found.labels)}", highlight=False, soft_wrap=True)
