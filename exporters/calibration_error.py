"""How far confidence is from accuracy, bin by bin."""

from __future__ import annotations

import numpy as np

from app.postprocess import softmax
from app.types import Array, FloatArray

CALIBRATION_BINS = 15  # as in Guo et al., 2017


def reliability(logits: FloatArray, labels: Array, temperature: float) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, images) of each bin of confidence that has any; 15 bins of equal width over 0 .. 1."""
    probabilities = softmax(logits, temperature)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return [
        (float(confidence[bins == b].mean()), float(correct[bins == b].mean()), int((bins == b).sum())) for b in np.unique(bins)
    ]


def expected_calibration_error(logits: FloatArray, labels: Array, temperature: float) -> float:
    """Mean gap between confidence and accuracy over the bins of `reliability`, in 0 .. 1 (Guo et al., ICML 2017)."""
    bins = reliability(logits, labels, temperature)
    return sum(abs(accuracy - confidence) * count for confidence, accuracy, count in bins) / len(labels)
