"""What a variant does on labelled images: accuracy and calibration per exit, exit rates, expected cost, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np

from app.postprocess import softmax
from app.runtime.backend import Backend
from app.types import Array, FloatArray
from exporters.exit_fitting import route
from models.manifest import PIXELS, ExitSpec, StageSpec

CALIBRATION_BINS = 15  # as in Guo et al., 2017
TIMED_BATCH = 8
TIMED_ROUNDS = 9


def logits_per_exit(backend: Backend, num_stages: int, pixels: Array, batch_size: int = 64) -> list[FloatArray]:
    """Logits (N, C) of every exit, every image taken through all stages."""
    collected: list[list[FloatArray]] = [[] for _ in range(num_stages)]
    for start in range(0, len(pixels), batch_size):
        inputs: Mapping[str, Array] = {PIXELS: pixels[start : start + batch_size]}
        for stage in range(num_stages):
            output = backend.run(stage, inputs)
            collected[stage].append(output.logits)
            inputs = output.state
    return [np.concatenate(parts) for parts in collected]


def expected_calibration_error(logits: FloatArray, labels: Array, temperature: float) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence (Guo et al., 2017), in 0 .. 1."""
    probabilities = softmax(logits, temperature)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [abs(float((correct[bins == b] - confidence[bins == b]).sum())) for b in np.unique(bins)]
    return sum(gaps) / len(labels)


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
    cost_through = np.cumsum([stage.gmacs for stage in stages])
    full = cost_through[-1]
    return {
        "images": len(labels),
        "top1_by_exit": [_rounded((z.argmax(axis=1) == labels).mean()) for z in logits],
        "ece_by_exit": [
            _rounded(expected_calibration_error(z, labels, exit_.temperature)) for z, exit_ in zip(logits, exits, strict=True)
        ],
        "agreement_with_fp32": _rounded((logits[-1].argmax(axis=1) == reference.argmax(axis=1)).mean()),
        "operating_point": {
            "top1": _rounded((routing.predicted == labels).mean()),
            "exit_rates": [_rounded((routing.exit_stage == stage).mean()) for stage in range(len(stages))],
            "mean_gmacs": _rounded(cost_through[routing.exit_stage].mean(), 6),
            "compute_saved": _rounded(1 - cost_through[routing.exit_stage].mean() / full),
        },
    }


def milliseconds_per_image(backends: Mapping[str, Backend], num_stages: int, pixels: Array) -> dict[str, float]:
    """Median time of all stages without exits, one thread, batch 8, the variants in turn."""
    batch = np.resize(pixels, (TIMED_BATCH, *pixels.shape[1:]))
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(TIMED_ROUNDS):
        for name, backend in backends.items():
            started = time.perf_counter()
            logits_per_exit(backend, num_stages, batch, TIMED_BATCH)
            seconds[name].append(time.perf_counter() - started)
    return {name: _rounded(1000 * statistics.median(times) / TIMED_BATCH) for name, times in seconds.items()}


def _rounded(value: float | np.floating, digits: int = 4) -> float:
    return round(float(value), digits)
