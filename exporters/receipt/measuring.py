"""What each operating point of a version does on labelled images: accuracy, exits, time, energy; the figures of a receipt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app import __version__
from app.exits import ExitPolicy
from app.quality import Ladder, Rung
from app.runtime.backend import Backend
from app.runtime.cpu import has_exact_int8, num_cpus
from app.runtime.ort_backend import OrtBackend
from app.types import Array, FloatArray
from exporters.calibration_error import expected_calibration_error, reliability
from exporters.config import Tried
from exporters.evaluation import paired_loss
from exporters.exit_fitting import route, with_thresholds
from exporters.images import ImageSet
from exporters.machine import cpu_model, installed, kernel
from exporters.progress import SILENT, Progress
from exporters.published import on_this_cpu
from exporters.receipt.operators import milliseconds_by_operator
from exporters.serving import ServingFigures, measure_serving, threads_to_try
from exporters.timing import TIMED_BATCH, Cost, EnergyMeter, cost_per_image, in_batches, spread
from models.manifest import PIXELS, ModelManifest, VariantSpec

PACKAGES = ("onnxruntime", "onnxruntime-openvino", "numpy", "pillow")
SMALLEST_SHARE = 0.01  # of a stage's time: operators below it are told together

Bins = list[tuple[float, float, int]]  # mean confidence, accuracy, images


@dataclass(frozen=True, slots=True)
class PointFigures:
    """One variant at one operating point. Shares are 0 .. 1; what is lost is told against the first variant at `full`."""

    variant: str
    point: str
    top1: float
    lost: float
    within: float  # half the width of that loss's 95 % interval
    exit_rates: tuple[float, ...]  # of the images, for each stage
    ms_per_image: float
    images_per_s: float
    times_as_fast: float
    cpu_s_per_1000_images: float
    joules_per_1000_images: float | None  # None where the machine does not tell
    bound: str  # what is proved, in words; "" where nothing is


@dataclass(frozen=True, slots=True)
class ExitFigures:
    """One exit of one variant: is it as sure as it is right?"""

    variant: str
    stage: int
    top1: float
    calibration_error: float
    bins: Bins


@dataclass(frozen=True, slots=True)
class StageProfile:
    """Milliseconds an image of the operators of one stage, most first; `others` are the smallest together."""

    variant: str
    stage: int
    operators: dict[str, float]


@dataclass(frozen=True, slots=True)
class Receipt:
    """Everything that was measured, ready for JSON."""

    model: str
    version: int
    images: int
    images_sha256: str
    labelled: bool  # else accuracy is agreement with the network's own answer
    points: tuple[PointFigures, ...]
    exits: tuple[ExitFigures, ...]
    profile: tuple[StageProfile, ...]
    serving: tuple[ServingFigures, ...]  # of the last variant, at `balanced`
    tried: tuple[Tried, ...]  # by the search that made it, where one did
    limits: str  # what a certificate does not promise; "" where there is none
    machine: dict[str, str]
    command: str  # that repeats it
    provenance: dict[str, str]  # of the version


@dataclass(frozen=True, slots=True)
class Subject:
    """A version that is measured."""

    directory: Path
    manifest: ModelManifest
    backends: Mapping[str, Backend]  # of its variants that this machine runs exactly
    logits: Mapping[str, Sequence[FloatArray]]  # of each, (N, C) of every exit for all images

    @property
    def variants(self) -> list[VariantSpec]:
        return [variant for variant in self.manifest.variants if variant.name in self.backends]

    @property
    def shown(self) -> VariantSpec:
        """Whose exits are shown by example, and whose operators."""
        return self.variants[-1]


def measure(
    subject: Subject,
    images: ImageSet,
    *,
    labelled: bool = True,
    tried: Sequence[Tried] = (),
    command: str = "",
    progress: Progress = SILENT,
) -> Receipt:
    """Every figure.

    Args:
        subject: the version.
        images: that had no part in training or fitting; where they are not `labelled`, their labels are the network's answers.
        labelled: whether they are.
        tried: by a search.
        command: that repeats it.
        progress: told what is measured.
    """
    manifest = subject.manifest
    progress.step("timing every operating point in turns")
    certificates = [variant.certificate for variant in subject.variants]
    certificates += [point.certificate for variant in subject.variants for point in variant.points]
    points = _points(subject, images)
    progress.step("profiling operators")
    return Receipt(
        model=manifest.name,
        version=manifest.version,
        images=len(images),
        images_sha256=images.sha256,
        labelled=labelled,
        points=points,
        exits=_exits(subject, images.labels),
        profile=_profile(subject, images.pixels),
        serving=_serving(subject, images.pixels, progress),
        tried=tuple(tried),
        limits=next((certificate.limits for certificate in certificates if certificate is not None), ""),
        machine={
            "CPU": f"{cpu_model()}, {num_cpus()} CPUs, int8 dot product: {'yes' if has_exact_int8() else 'no'}",
            "how": f"one thread, batch {TIMED_BATCH}, survivors batched anew behind each stage; medians of rounds in turns",
            "system": kernel(),
            "versions": f"fovea {__version__}, {installed(PACKAGES)}",
        },
        command=command,
        provenance=dict(manifest.provenance),
    )


def points_of(variant: VariantSpec) -> list[Rung]:
    """Its operating points that differ: of one in a single stage there is only `full`."""
    rungs = list(Ladder(variant))
    return rungs[:1] if len(variant.exits) == 1 else rungs


def _points(subject: Subject, images: ImageSet) -> tuple[PointFigures, ...]:
    entries = subject.manifest.entries
    rungs = {(variant.name, rung.name): (variant, rung) for variant in subject.variants for rung in points_of(variant)}
    ways = {
        key: in_batches(
            subject.backends[variant.name], len(variant.exits), ExitPolicy(variant.exits, [rung.thresholds]), entries
        )
        for key, (variant, rung) in rungs.items()
    }
    costs = cost_per_image(ways, images.pixels, EnergyMeter())
    first = subject.variants[0].name
    reference, dearest = subject.logits[first][-1].argmax(axis=1) == images.labels, next(iter(costs.values()))
    return tuple(
        _figures(variant, rung, subject.logits[variant.name], images.labels, reference, costs[key], dearest)
        for key, (variant, rung) in rungs.items()
    )


def _figures(
    variant: VariantSpec,
    rung: Rung,
    logits: Sequence[FloatArray],
    labels: Array,
    reference: Array,
    cost: Cost,
    dearest: Cost,
) -> PointFigures:
    thresholds = [threshold for threshold in rung.thresholds if threshold is not None]
    routing = route(logits, with_thresholds(variant.exits, thresholds))
    right = routing.predicted == labels
    lost, within = paired_loss(reference, right)
    return PointFigures(
        variant=variant.name,
        point=rung.name,
        top1=float(right.mean()),
        lost=lost,
        within=within,
        exit_rates=tuple(float((routing.exit_stage == stage).mean()) for stage in range(len(variant.exits))),
        ms_per_image=cost.ms,
        images_per_s=1000 / cost.ms,
        times_as_fast=dearest.ms / cost.ms,
        cpu_s_per_1000_images=cost.cpu_ms,
        joules_per_1000_images=None if cost.joules is None else 1000 * cost.joules,
        bound=rung.bound,
    )


def _exits(subject: Subject, labels: Array) -> tuple[ExitFigures, ...]:
    return tuple(
        ExitFigures(
            variant.name,
            stage,
            float((logits.argmax(axis=1) == labels).mean()),
            expected_calibration_error(logits, labels, exit_.temperature),
            reliability(logits, labels, exit_.temperature),
        )
        for variant in subject.variants
        for stage, (logits, exit_) in enumerate(zip(subject.logits[variant.name], variant.exits, strict=True))
    )


def _profile(subject: Subject, pixels: Array) -> tuple[StageProfile, ...]:
    """Of every stage of the variant that is shown, on a batch that goes through all of them."""
    variant, manifest = subject.shown, subject.manifest
    found, values = [], {PIXELS: np.ascontiguousarray(spread(pixels, TIMED_BATCH))}
    for index, (stage, file) in enumerate(zip(manifest.stages, variant.files, strict=True)):
        taken = {tensor.name: values[tensor.name] for tensor in stage.inputs}
        times = milliseconds_by_operator(subject.directory / file, taken)
        total = sum(times.values())
        large = {kind: ms for kind, ms in times.items() if ms >= SMALLEST_SHARE * total}
        rest = total - sum(large.values())
        found.append(StageProfile(variant.name, index, large | ({"others": rest} if rest else {})))
        values = {PIXELS: values[PIXELS]} | dict(subject.backends[variant.name].run(index, taken).state)
    return tuple(found)


def _serving(subject: Subject, pixels: Array, progress: Progress) -> tuple[ServingFigures, ...]:
    """Of the variant that is shown, at its own exits."""
    progress.step("measuring instances, threads and batch sizes")
    variant, manifest, cpus = subject.shown, subject.manifest, num_cpus()
    backends = {
        threads: OrtBackend(subject.directory, manifest, variant.name, on_this_cpu(threads)) for threads in threads_to_try(cpus)
    }
    return tuple(measure_serving(backends, ExitPolicy(variant.exits), manifest.entries, pixels, cpus))


def leaves_at(subject: Subject) -> tuple[Array, Array]:
    """Of the variant that is shown, at `balanced`: the stage where each image leaves and its class there, (N,) each."""
    variant = subject.shown
    routing = route(subject.logits[variant.name], variant.exits)
    return routing.exit_stage, routing.predicted
