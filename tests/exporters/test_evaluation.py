"""Figures of a report, against small cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from exporters.evaluation import evaluate, expected_calibration_error
from models.manifest import ExitSpec
from models.zoo import ZOO, create_model


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    """Always 80 % sure and right half of the time: a gap of 30 points."""
    logits = np.log(np.tile([[0.8, 0.2]], (10, 1))).astype(np.float32)
    labels = np.array([0, 1] * 5)

    assert expected_calibration_error(logits, labels, 1.0) == pytest.approx(0.3, abs=1e-6)
    assert expected_calibration_error(logits, np.array([0] * 8 + [1] * 2), 1.0) == pytest.approx(0.0, abs=1e-6)


def test_a_report_counts_what_the_exits_do() -> None:
    """Four images: two leave at the first exit (one of them wrong), one at the second, one at the last."""
    from exporters.staging import stage_specs

    stages = stage_specs(create_model("test_vit"), ZOO["test_vit"].preprocess)
    sure, unsure = 50.0, 0.1
    labels = np.array([0, 1, 2, 3])

    def logits(strengths: list[float], classes: list[int]) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[classes] * np.array(strengths, np.float32)[:, None]

    per_exit = [
        logits([sure, sure, unsure, unsure], [0, 3, 2, 3]),
        logits([sure, sure, sure, unsure], [0, 1, 2, 3]),
        logits([sure] * 4, [0, 1, 2, 0]),
    ]
    exits = [ExitSpec(score="max_softmax", temperature=1, threshold=t) for t in (0.9, 0.9, None)]

    report = evaluate(per_exit, labels, exits, stages, reference=per_exit[1])

    assert report["top1_by_exit"] == [0.75, 1.0, 0.75]
    assert report["agreement_with_fp32"] == 0.75
    point = report["operating_point"]
    assert point["top1"] == 0.5  # the second leaves wrongly at exit 0, the last is wrong at exit 2
    assert point["exit_rates"] == [0.5, 0.25, 0.25]
    costs = np.cumsum([stage.gmacs for stage in stages])
    assert point["mean_gmacs"] == pytest.approx(0.5 * costs[0] + 0.25 * costs[1] + 0.25 * costs[2], abs=1e-6)
