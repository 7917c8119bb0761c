"""What an export found, as data: `report.json`, and where a version comes from."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path

from app.runtime.ort_backend import OrtBackend
from app.types import FloatArray
from exporters.config import ExportConfig
from exporters.evaluation import evaluate, logits_per_exit
from exporters.exit_fitting import with_thresholds
from exporters.images import ImageSet
from exporters.sources.base import Loaded
from exporters.timing import milliseconds_per_image
from models.manifest import Certificate, ExitSpec, ModelManifest, OperatingPoint

FULL = "full"  # fp32 without token reduction: what a reduced version is compared with; never published


@dataclass(frozen=True, slots=True)
class FittedVariant:
    """One variant after fitting; `bounds` is what could be proved, or why nothing could, in words."""

    backend: OrtBackend
    exits: tuple[ExitSpec, ...]
    test_logits: list[FloatArray]
    certificate: Certificate | None  # of the exits
    points: tuple[OperatingPoint, ...]  # besides them
    bounds: dict[str, str]  # of each operating point, the exits' first
    fitting_top1: float  # of the last exit, on the images that were fitted on


@dataclass(frozen=True, slots=True)
class Images:
    """Sets that took no part in training: to fit on, to certify on, None where nothing is proved, and to measure on."""

    fitting: ImageSet
    apart: ImageSet | None
    test: ImageSet
    others: Mapping[str, ImageSet]
    unproved: str = ""  # why none are set apart, in words, where it was asked for


def report(
    fitted: Mapping[str, FittedVariant], manifest: ModelManifest, images: Images, difference: float, full: OrtBackend | None
) -> dict[str, object]:
    """Every figure of a version.

    Args:
        fitted: by variant.
        manifest: for the stages.
        images: of which the test images, and others, are measured on.
        difference: largest of any logit to the network that was exported.
        full: the network without token reduction, where there is another.
    """
    test = images.test
    base = next(iter(fitted))  # fp32, or the only variant of a cascade
    reference = fitted[base].test_logits[-1]
    backends = {name: variant.backend for name, variant in fitted.items()}
    exits = {name: variant.exits for name, variant in fitted.items()}
    without_reduction: dict[str, object] = {}
    timed = backends | ({FULL: full} if full else {})
    times = milliseconds_per_image(timed, exits | {FULL: exits[base]}, test.pixels, entries=manifest.entries)
    if full is not None:
        # Everything is told against the network as it came.
        reference = logits_per_exit(full, len(manifest.stages), test.pixels)[-1]
        top1 = float((reference.argmax(axis=1) == test.labels).mean())
        without_reduction = {"top1": round(top1, 4), "ms_per_image": times.pop(FULL)["without_exits"]}
    return {
        "machine": f"{platform.machine()}, {platform.system()}, one thread",
        "fitted_on": {
            "images": len(images.fitting),
            "sha256": images.fitting.sha256,
            "top1": {name: round(variant.fitting_top1, 4) for name, variant in fitted.items()},
        },
        "certified_on": {"images": _certified_on(fitted, images)},
        "bounds": {name: variant.bounds for name, variant in fitted.items()},
        "points": {name: _points(variant, manifest, test, reference) for name, variant in fitted.items()},
        "tested_on": {"images": len(test), "sha256": test.sha256},
        "largest_logit_difference_to_source": float(f"{difference:.2e}"),
        "gmacs_by_stage": [round(stage.gmacs, 6) for stage in manifest.stages],
        "ms_per_image": times,
        "without_reduction": without_reduction,
        "variants": {
            name: evaluate(variant.test_logits, test.labels, variant.exits, manifest.stages, reference)
            for name, variant in fitted.items()
        },
        "other_images": {name: _on_other_images(fitted, manifest, others) for name, others in images.others.items()},
    }


def _certified_on(fitted: Mapping[str, FittedVariant], images: Images) -> int:
    """How many images were set apart: here, or by a search that chose the operating points before."""
    if images.apart is not None:
        return len(images.apart)
    return max((each.certificate.images for each in fitted.values() if each.certificate is not None), default=0)


def _points(variant: FittedVariant, manifest: ModelManifest, test: ImageSet, reference: FloatArray) -> dict[str, object]:
    """What each further operating point does on the test images."""
    return {
        point.name: evaluate(
            variant.test_logits, test.labels, with_thresholds(variant.exits, point.thresholds), manifest.stages, reference
        )["operating_point"]
        for point in variant.points
    }


def _on_other_images(fitted: Mapping[str, FittedVariant], manifest: ModelManifest, images: ImageSet) -> dict[str, object]:
    logits = {name: logits_per_exit(v.backend, len(manifest.stages), images.pixels) for name, v in fitted.items()}
    return {
        "images": len(images),
        "sha256": images.sha256,
        "variants": {
            name: evaluate(logits[name], images.labels, variant.exits, manifest.stages, logits[next(iter(fitted))][-1])
            for name, variant in fitted.items()
        },
    }


def provenance(config: ExportConfig, network: Loaded, images: Images) -> dict[str, str]:
    """Weights, licence, data, command, commit and package versions."""
    packages = ["torch", "onnx", "onnxruntime", "numpy", "pillow"]
    packages += [name for name in ("transformers", "timm") if name in sys.modules]  # where one gave the network
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "origin": network.origin,
        "weights_sha256": network.weights_sha256,
        "fitting_images_sha256": images.fitting.sha256,
        "test_images_sha256": images.test.sha256,
        "licence": config.licence,
        "data": config.data,
        "training": config.training,
        "command": config.command,
        "commit": _commit(),
        "packages": ", ".join(f"{name} {package_version(name)}" for name in packages),
        "python": platform.python_version(),
    }


def _commit() -> str:
    """The commit of the source tree, or a word when it is not a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607 - git as the user has it
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
