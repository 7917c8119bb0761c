"""Each variant's operating points: exits fitted, and certified where images were set apart for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from app.runtime.ort_backend import OrtBackend
from app.types import Array, FloatArray
from exporters.certificate import ALREADY_SEEN, Certified, certified_exits, split, too_few
from exporters.config import BoundConfig, ExportConfig
from exporters.evaluation import logits_per_exit
from exporters.exit_fitting import fit_exits
from exporters.progress import Progress
from exporters.reporting import FittedVariant, Images
from exporters.validation import validate_images, validate_quantized
from models.manifest import BALANCED, OperatingPoint, StageSpec

FAST = "fast"
Answers = tuple[Sequence[FloatArray], Array]  # logits (N, C) of every exit, and labels (N,)


def fit_variants(
    config: ExportConfig,
    stages: Sequence[StageSpec],
    backends: Mapping[str, OrtBackend],
    images: Images,
    unseen: Array,
    progress: Progress,
) -> dict[str, FittedVariant]:
    """By variant.

    Args:
        config: what exits may cost, and what is to be proved.
        stages: for their costs.
        backends: by variant, the one that the others are compared with first.
        images: whose labels are the network's own answers where there are none.
        unseen: which of the fitting images exits are fitted on, bool (N,): those that heads have not seen.
        progress: told what is proved.

    Raises:
        ValidationError: a variant differs too much from fp32 on the fitting images, or those are not such as it knows.
    """
    costs, labels = [stage.gmacs for stage in stages], images.fitting.labels
    logits = {name: logits_per_exit(each, len(costs), images.fitting.pixels, progress) for name, each in backends.items()}
    base, *others = backends
    if config.better_than_chance and not config.unlabelled:
        validate_images(logits[base][-1], labels)
    for name in others:
        validate_quantized(name, logits[base][-1], logits[name][-1], labels, config.quantization)
    fitted = {}
    for name, backend in backends.items():
        top1 = float((logits[name][-1].argmax(axis=1) == labels).mean())
        if (chosen := config.chosen) is not None:
            test_logits = logits_per_exit(backend, len(costs), images.test.pixels, progress)
            fitted[name] = FittedVariant(
                backend, chosen.exits, test_logits, chosen.certificate, chosen.points, dict(chosen.bounds), top1
            )
            continue
        seen: Answers = [each[unseen] for each in logits[name]], labels[unseen]
        apart: Answers | None = None
        if images.apart is not None:
            apart = logits_per_exit(backend, len(costs), images.apart.pixels, progress), images.apart.labels
        balanced = _exits_at(config.exits.max_accuracy_drop, config, costs, seen, apart, images)
        points, bounds = [], {BALANCED: balanced.reason}
        if len(costs) > 1 and config.fast_drop > config.exits.max_accuracy_drop:
            fast = _exits_at(config.fast_drop, config, costs, seen, apart, images)
            thresholds = tuple(exit_.threshold for exit_ in fast.exits if exit_.threshold is not None)
            points.append(OperatingPoint(name=FAST, thresholds=thresholds, certificate=fast.certificate))
            bounds[FAST] = fast.reason
        for point, bound in bounds.items():
            if bound:
                progress.step(f"{name}, {point}: {bound}")
        test_logits = logits_per_exit(backend, len(costs), images.test.pixels, progress)
        fitted[name] = FittedVariant(backend, balanced.exits, test_logits, balanced.certificate, tuple(points), bounds, top1)
    return fitted


def _exits_at(
    drop: float, config: ExportConfig, costs: Sequence[float], seen: Answers, apart: Answers | None, images: Images
) -> Certified:
    """Exits that cost at most so much: proved where images were set apart, else fitted, and why no more in words."""
    how = replace(config.exits, max_accuracy_drop=drop, labelled=not config.unlabelled)
    bound = None if config.bound is None else replace(config.bound, epsilon=drop)
    if bound is None or apart is None or images.apart is None or len(costs) == 1:
        return Certified(fit_exits(*seen, costs, how), None, _unproved(images, bound) if len(costs) > 1 else "")
    return certified_exits(
        seen,
        apart,
        costs,
        how,
        bound,
        images_sha256=images.apart.sha256,
        risk="disagreement" if config.unlabelled else "accuracy",
    )


def _unproved(images: Images, bound: BoundConfig | None) -> str:
    """Why nothing is proved of exits that may cost so much, in words; empty where nothing was asked for."""
    if bound is None or images.unproved in ("", ALREADY_SEEN) or split(len(images.fitting), bound) is not None:
        return images.unproved
    return too_few(len(images.fitting), bound)
