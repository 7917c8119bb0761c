"""Certified exits: the promise is kept on images that were not seen, and what cannot be proved is said."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from app.types import Array, FloatArray
from exporters.certificate import Certified, certified_exits, split, too_few
from exporters.config import BoundConfig, ExitConfig
from exporters.exit_fitting import NEVER, route
from exporters.risk_control import images_needed

SHA = "0" * 64
BOUND = BoundConfig(epsilon=0.03, delta=0.1)
COSTS = [1.0, 1.0, 1.0]


def network(count: int, seed: int) -> tuple[list[FloatArray], Array]:
    """Logits of three exits over four classes, each surer and more often right than the one before, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    hardness = rng.exponential(1.0, count)
    logits = []
    for strength in (2.0, 2.6, 3.2):
        noise = rng.normal(0, 1, (count, 4)) * hardness[:, None]
        logits.append((strength * np.eye(4)[labels] + noise).astype(np.float32))
    return logits, labels


def certify(logits: list[FloatArray], labels: Array, bound: BoundConfig = BOUND, **options: object) -> Certified:
    """On halves, as an export does."""
    apart = split(len(labels), bound)
    assert apart is not None
    halves = [([each[half] for each in logits], labels[half]) for half in (~apart, apart)]
    return certified_exits(halves[0], halves[1], COSTS, ExitConfig(), bound, images_sha256=SHA, **options)  # type: ignore[arg-type]


def loss(certified: Certified, logits: list[FloatArray], labels: Array) -> float:
    """Share of the images, in a set that is as good as all images."""
    predicted = route(logits, certified.exits).predicted
    return float((logits[-1].argmax(axis=1) == labels).mean() - (predicted == labels).mean())


def test_exits_are_taken_and_the_promise_holds_as_often_as_it_says() -> None:
    """Over 60 draws the loss is beyond epsilon no more often than chance allows at delta."""
    everything, labels = network(30_000, seed=1)
    broken = early = 0
    for seed in range(60):
        drawn = np.random.default_rng(100 + seed).choice(len(labels), 1200, replace=False)
        found = certify([each[drawn] for each in everything], labels[drawn])
        broken += loss(found, everything, labels) > BOUND.epsilon
        early += found.certificate is not None and bool((route(everything, found.exits).exit_stage < 2).any())
    assert early > 50
    assert broken <= stats.binom.ppf(0.999, 60, BOUND.delta)


def test_the_certificate_says_what_was_done() -> None:
    """How many images, which, and what it is compared with."""
    found = certify(*network(1200, seed=2))

    assert found.certificate is not None
    assert (found.certificate.epsilon, found.certificate.delta, found.certificate.images) == (0.03, 0.1, 600)
    assert found.certificate.images_sha256 == SHA
    assert found.reason == str(found.certificate)
    assert "at most 3 points of accuracy against the last exit" in found.reason
    assert "90 % confidence (600 images)" in found.reason


def test_without_labels_it_is_disagreement_that_is_bounded() -> None:
    """The labels are the last exit's answers, each other answer counts, and the promise holds as often as it says."""
    fresh, _ = network(50_000, seed=4)
    bound, broken = BoundConfig(epsilon=0.05, delta=0.1), 0
    for seed in range(20):
        logits, _ = network(2000, seed=10 + seed)
        found = certify(logits, logits[-1].argmax(axis=1), bound, risk="disagreement")
        assert found.certificate is not None
        assert found.certificate.risk == "disagreement"
        assert "another class for at most 5 % of the images" in found.reason
        broken += (route(fresh, found.exits).predicted != fresh[-1].argmax(axis=1)).mean() > bound.epsilon
    assert broken <= stats.binom.ppf(0.999, 20, bound.delta)


def test_a_stricter_promise_lets_fewer_leave() -> None:
    """Within what the same images prove."""
    logits, labels = network(4000, seed=5)
    stay = []
    for epsilon in (0.04, 0.02):
        exits = certify(logits, labels, BoundConfig(epsilon=epsilon, delta=0.1)).exits
        stay.append((route(logits, exits).exit_stage == 2).mean())
    assert stay[0] < stay[1]


@pytest.mark.parametrize(
    ("wrong", "word"), [(50, "which is more than 3 points: allow more"), (1, "to prove that it is at most 3 points takes some")]
)
def test_where_nothing_can_be_proved_nobody_leaves_early(wrong: int, word: str) -> None:
    """An early exit that is sure and wrong on images that it was not fitted on; the sentence says what would help."""
    labels = np.zeros(200, dtype=np.int64)
    sure = np.eye(4, dtype=np.float32)[labels] * 9
    mistaken = sure.copy()
    mistaken[:wrong] = np.eye(4, dtype=np.float32)[3] * 99
    count = images_needed("accuracy", 0.03, 0.1)
    apart = [mistaken[:count], sure[:count], sure[:count]], labels[:count]

    found = certified_exits(([sure] * 3, labels), apart, COSTS, ExitConfig(), BOUND, images_sha256=SHA)

    assert found.certificate is None
    assert [exit_.threshold for exit_ in found.exits] == [NEVER, NEVER, None]
    assert f"nobody leaves early: even the most careful exits answer {wrong} of {count} images worse" in found.reason
    assert word in found.reason


def test_too_few_images_are_not_split() -> None:
    """It says how many it takes."""
    needed = 2 * images_needed("accuracy", 0.03, 0.1)
    assert split(needed - 2, BOUND) is None
    apart = split(needed, BOUND)
    assert apart is not None
    assert apart.sum() == needed // 2
    assert np.array_equal(apart, split(needed, BOUND))
    assert f"takes at least {needed} images to fit on, and there are 50" in too_few(50, BOUND)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(100, BoundConfig(epsilon=0.0))
