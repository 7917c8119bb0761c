"""Confidence against accuracy, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from exporters.calibration_error import expected_calibration_error, reliability


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    """Always 80 % sure and right half of the time: a gap of 30 points."""
    logits = np.log(np.tile([[0.8, 0.2]], (10, 1))).astype(np.float32)
    labels = np.array([0, 1] * 5)

    assert expected_calibration_error(logits, labels, 1.0) == pytest.approx(0.3, abs=1e-6)
    assert expected_calibration_error(logits, np.array([0] * 8 + [1] * 2), 1.0) == pytest.approx(0.0, abs=1e-6)


def test_reliability_puts_images_into_bins_of_confidence() -> None:
    """Six images 60 % sure, four 95 % sure: two bins, each with its accuracy."""
    logits = np.log([[0.6, 0.4]] * 6 + [[0.05, 0.95]] * 4).astype(np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 0])

    bins = reliability(logits, labels, 1.0)

    assert bins == [(pytest.approx(0.6), 0.5, 6), (pytest.approx(0.95), 0.75, 4)]
