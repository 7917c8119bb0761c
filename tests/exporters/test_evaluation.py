"""Figures of a report, against small cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from exporters.evaluation import confusions, evaluate, paired_loss
from models.manifest import ExitSpec
from models.zoo import ZOO, create_model


def test_a_paired_loss_counts_only_images_on_which_the_two_differ() -> None:
    """Of 100 images 3 are lost and 1 is won: 2 points, and the textbook's interval for paired shares."""
    before = np.array([True] * 60 + [False] * 40)
    after = before.copy()
    after[:3], after[60] = False, True

    loss, within = paired_loss(before, after)

    assert loss == pytest.approx(0.02)
    assert within == pytest.approx(1.96 * np.sqrt((0.04 - 0.02**2) / 100))
    assert paired_loss(before, before) == (0.0, 0.0)


def test_mistakes_come_most_frequent_first() -> None:
    """Right answers are none; equal counts in the order of the classes."""
    labels = np.array([0, 0, 0, 1, 2, 2])
    assert confusions(np.array([1, 1, 0, 1, 0, 0]), labels) == [(0, 1, 2), (2, 0, 2)]
    assert confusions(labels, labels) == []


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
    assert report["top5_by_exit"] == [1.0, 1.0, 1.0]  # there are four classes
    assert report["agreement_with_fp32"] == 0.75
    assert report["loss_against_fp32"]["top1"] == 0.25
    assert report["top1_by_class"] == {"0": 1.0, "1": 0.0, "2": 1.0, "3": 0.0}
    assert report["confusions"] == [(1, 3, 1), (3, 0, 1)]
    point = report["operating_point"]
    assert point["loss_against_full_depth"]["top1"] == 0.25
    assert point["top1"] == 0.5  # the second leaves wrongly at exit 0, the last is wrong at exit 2
    assert point["exit_rates"] == [0.5, 0.25, 0.25]
    costs = np.cumsum([stage.gmacs for stage in stages])
    assert point["mean_gmacs"] == pytest.approx(0.5 * costs[0] + 0.25 * costs[1] + 0.25 * costs[2], abs=1e-6)


def test_top_five_counts_labels_among_the_five_likeliest() -> None:
    """Fourth, sixth, first, and one that ties with five others."""
    from exporters.staging import stage_specs

    logits = np.zeros((4, 8), np.float32)
    logits[0, :4], logits[1, :6], logits[2, 7] = [4, 3, 2, 1], [6, 5, 4, 3, 2, 1], 1
    logits[3, :6] = 1
    stages = stage_specs(create_model("test_vit"), ZOO["test_vit"].preprocess)[:1]
    exits = [ExitSpec(score="max_softmax", temperature=1, threshold=None)]

    report = evaluate([logits], np.array([3, 5, 7, 0]), exits, stages, reference=logits)

    assert report["top5_by_exit"] == [0.5]
