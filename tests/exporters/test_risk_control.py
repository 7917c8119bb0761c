"""Bounds that hold: p-values against every possible outcome, and candidates tested in their order."""

from __future__ import annotations

import math

import numpy as np
import pytest

from exporters.risk_control import (
    P_VALUES,
    PairedCounts,
    Risk,
    accuracy_p_value,
    disagreement_p_value,
    images_needed,
    last_safe,
    paired_counts,
    smallest_epsilon,
)

IMAGES, EPSILON = 40, 0.1


def every_outcome() -> list[tuple[PairedCounts, float]]:
    """All counts that 40 images can have, and the p-value of each."""
    outcomes = [PairedCounts(lost, gained, IMAGES) for lost in range(IMAGES + 1) for gained in range(IMAGES + 1 - lost)]
    return [(counts, accuracy_p_value(counts, EPSILON)) for counts in outcomes]


def probability(counts: PairedCounts, loss_rate: float, gain_rate: float) -> float:
    """Of an outcome, by the trinomial's formula."""
    same = counts.images - counts.lost - counts.gained
    ways = math.factorial(counts.images) / (math.factorial(counts.lost) * math.factorial(counts.gained) * math.factorial(same))
    return float(ways * loss_rate**counts.lost * gain_rate**counts.gained * (1 - loss_rate - gain_rate) ** same)


def test_a_p_value_of_accuracy_is_small_no_more_often_than_it_says() -> None:
    """Whatever the rates of losses and gains, if the loss is epsilon or more: summed over every outcome."""
    outcomes = every_outcome()
    for gain_rate in (0.0, 0.01, 0.05, 0.1, 0.2, 0.45):
        for beyond in (0.0, 0.02):
            if gain_rate + gain_rate + EPSILON + beyond > 1:
                continue
            chances = np.array([probability(counts, gain_rate + EPSILON + beyond, gain_rate) for counts, _ in outcomes])
            assert chances.sum() == pytest.approx(1)
            for level in (0.01, 0.05, 0.1, 0.3):
                small = np.array([p_value <= level for _, p_value in outcomes])
                assert chances[small].sum() <= level


def test_a_p_value_of_accuracy_is_worth_having() -> None:
    """It counts gains: with as many of them as losses, what a bound on losses alone could not show is shown."""
    even = PairedCounts(15, 15, 2500)
    assert accuracy_p_value(even, 0.005) < 0.05
    assert disagreement_p_value(even, 0.005) > 0.9
    assert accuracy_p_value(PairedCounts(0, 0, 2500), 0.005) < 0.01
    assert accuracy_p_value(PairedCounts(2500, 0, 2500), 0.005) == pytest.approx(1)
    assert accuracy_p_value(PairedCounts(0, 2500, 2500), 0.005) < 0.01


def test_a_p_value_of_disagreement_is_the_binomials_tail() -> None:
    """By its formula."""
    tail = sum(math.comb(50, k) * 0.1**k * 0.9 ** (50 - k) for k in range(3))
    assert disagreement_p_value(PairedCounts(2, 0, 50), 0.1) == pytest.approx(tail)


def test_counts_are_of_the_same_images() -> None:
    """Without labels any difference counts."""
    reference, candidate = np.array([0, 1, 2, 3, 4]), np.array([0, 9, 2, 7, 5])
    assert paired_counts(reference, candidate, np.array([0, 1, 0, 7, 8])) == PairedCounts(1, 1, 5)
    assert paired_counts(reference, candidate, None) == PairedCounts(3, 0, 5)
    assert PairedCounts(3, 1, 50).loss == pytest.approx(0.04)


def test_candidates_are_tested_until_one_fails() -> None:
    """What would pass behind it is not looked at."""
    good, bad = PairedCounts(0, 0, 2000), PairedCounts(30, 0, 2000)
    assert last_safe([good, good, bad, good], "accuracy", 0.005, 0.05) == 1
    assert last_safe([bad, good], "accuracy", 0.005, 0.05) is None
    assert last_safe([good], "disagreement", 0.005, 0.05) == 0
    assert smallest_epsilon(bad, "accuracy", [0.005, 0.02, 0.03, 0.1], 0.05) == 0.03
    assert smallest_epsilon(bad, "accuracy", [0.001, 0.005], 0.05) is None


@pytest.mark.parametrize("risk", ["accuracy", "disagreement"])
def test_so_many_images_are_needed_and_not_one_less(risk: Risk) -> None:
    """Where nothing differs at all, and at rates that were observed."""
    needed = images_needed(risk, 0.02, 0.05)
    assert P_VALUES[risk](PairedCounts(0, 0, needed), 0.02) <= 0.05
    assert P_VALUES[risk](PairedCounts(0, 0, needed - 1), 0.02) > 0.05
    if risk == "disagreement":
        assert needed == math.ceil(math.log(0.05) / math.log(0.98))
    assert images_needed(risk, 0.02, 0.05, observed=PairedCounts(5, 2, 1000)) > needed


def test_what_no_number_of_images_could_show_is_said() -> None:
    """A loss beyond epsilon, levels that are none, or finer than the test."""
    with pytest.raises(ValueError, match="3 points are lost, and 2 are to be kept"):
        images_needed("accuracy", 0.02, 0.05, observed=PairedCounts(30, 0, 1000))
    with pytest.raises(ValueError, match="between 0 and 1"):
        images_needed("accuracy", 0.0, 0.05)
    with pytest.raises(ValueError, match="finer than this test"):
        images_needed("accuracy", 0.02, 0.001)
