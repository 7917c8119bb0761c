"""What a variant does on labelled images: accuracy and calibration per exit, exit rates, expected cost.

Differences are paired: two answers for the same image are compared, so what both find hard cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from app.exits import ExitPolicy
from app.runtime.backend import Backend
from app.types import Array, FloatArray
from exporters.calibration_error import expected_calibration_error, reliability
from exporters.exit_fitting import route
from exporters.progress import SILENT, Progress
from models.manifest import PIXELS, ExitSpec, StageSpec

NUM_CONFUSIONS = 6  # the most frequent mistakes that a report names
Z_95 = 1.96  # standard deviations of a two-sided interval of 95 %


def logits_per_exit(
    backend: Backend, num_stages: int, pixels: Array, progress: Progress = SILENT, *, batch_size: int = 64
) -> list[FloatArray]:
    """Logits (N, C) of every exit, every image taken through all stages."""
    collected: list[list[FloatArray]] = [[] for _ in range(num_stages)]
    for start in progress.track(range(0, len(pixels), batch_size), "every exit of every image"):
        inputs: Mapping[str, Array] = {PIXELS: pixels[start : start + batch_size]}
        for stage in range(num_stages):
            output = backend.run(stage, inputs)
            collected[stage].append(output.logits)
            inputs = output.state
    return [np.concatenate(parts) for parts in collected]


def paired_loss(before: Array, after: Array) -> tuple[float, float]:
    """How much less often the second is right, and half the width of its 95 % interval (normal approximation).

    Args:
        before, after: whether each image is classified rightly, bool (N,), the same images in the same order.
    """
    difference = before.astype(np.float64) - after
    return float(difference.mean()), float(Z_95 * difference.std() / np.sqrt(len(difference)))


def confusions(predicted: Array, labels: Array) -> list[tuple[int, int, int]]:
    """The most frequent mistakes: (true class, answered class, images), most frequent first."""
    wrong = predicted != labels
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:NUM_CONFUSIONS]
    return [(int(pairs[0, i]), int(pairs[1, i]), int(counts[i])) for i in order]


def evaluate(
    logits: Sequence[FloatArray],
    labels: Array,
    exits: Sequence[ExitSpec],
    stages: Sequence[StageSpec],
    reference: FloatArray,
) -> dict[str, object]:
    """Figures of one variant, ready for `report.json`.

    Args:
        logits: (N, C) of every exit for all images.
        labels: int64 (N,).
        reference: logits of the fp32 variant's last exit, for agreement.
    """
    routing = route(logits, exits)
    costs, entries = np.array([stage.gmacs for stage in stages]), entries_of(stages)
    on_the_way = np.isin(np.arange(len(stages)), ExitPolicy(exits).way(entries))
    cost_through = np.cumsum(np.where(on_the_way, costs, 0.0))
    full = costs[entries[-1] :].sum()
    right = routing.predicted == labels
    exits_cost, exits_cost_within = paired_loss(logits[-1].argmax(axis=1) == labels, right)
    int8_cost, int8_cost_within = paired_loss(reference.argmax(axis=1) == labels, logits[-1].argmax(axis=1) == labels)
    return {
        "images": len(labels),
        "top1_by_exit": [_rounded((z.argmax(axis=1) == labels).mean()) for z in logits],
        "top5_by_exit": [_rounded(_top_k_accuracy(z, labels, 5)) for z in logits],
        "ece_by_exit": [
            _rounded(expected_calibration_error(z, labels, exit_.temperature)) for z, exit_ in zip(logits, exits, strict=True)
        ],
        "agreement_with_fp32": _rounded((logits[-1].argmax(axis=1) == reference.argmax(axis=1)).mean()),
        "loss_against_fp32": {"top1": _rounded(int8_cost), "within": _rounded(int8_cost_within)},
        "top1_by_class": {str(label): _rounded(right[labels == label].mean()) for label in np.unique(labels)},
        "confusions": confusions(routing.predicted, labels),
        "reliability_by_exit": [
            [
                (_rounded(confidence), _rounded(accuracy), count)
                for confidence, accuracy, count in reliability(z, labels, e.temperature)
            ]
            for z, e in zip(logits, exits, strict=True)
        ],
        "operating_point": {
            "top1": _rounded(right.mean()),
            "loss_against_full_depth": {"top1": _rounded(exits_cost), "within": _rounded(exits_cost_within)},
            "exit_rates": [_rounded((routing.exit_stage == stage).mean()) for stage in range(len(stages))],
            "mean_gmacs": _rounded(cost_through[routing.exit_stage].mean(), 6),
            "compute_saved": _rounded(1 - cost_through[routing.exit_stage].mean() / full),
        },
    }


def entries_of(stages: Sequence[StageSpec]) -> tuple[int, ...]:
    """Stages that begin a network: the first, and in a cascade others. At the full depth an image begins at the last."""
    return tuple(index for index, stage in enumerate(stages) if any(tensor.name == PIXELS for tensor in stage.inputs))


def _top_k_accuracy(logits: FloatArray, labels: Array, k: int) -> float:
    """Share of images whose label is among the k likeliest; equal logits count against it."""
    of_label = logits[np.arange(len(labels)), labels][:, None]
    not_below = (logits >= of_label).sum(axis=1)  # itself included
    return float((not_below <= k).mean())


def _rounded(value: float | np.floating, digits: int = 4) -> float:
    return round(float(value), digits)
