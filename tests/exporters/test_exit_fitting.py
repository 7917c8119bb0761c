"""Temperatures and thresholds: what they promise on the images they were fitted on."""

from __future__ import annotations

import numpy as np
import pytest

from app.exits import ExitPolicy
from app.postprocess import softmax
from exporters.calibration_error import expected_calibration_error
from exporters.config import ExitConfig
from exporters.exit_fitting import NEVER, fit_exits, fit_temperature, route
from models.manifest import ExitSpec


def make_logits(generator: np.random.Generator, labels: np.ndarray, strength: float) -> np.ndarray:
    """Logits whose true class is raised by a strength drawn per image: some images are easy, some are not."""
    logits = generator.standard_normal((len(labels), 10)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += strength * generator.random(len(labels)).astype(np.float32)
    return logits


@pytest.fixture
def fitted() -> tuple[list[np.ndarray], np.ndarray]:
    """Three exits, each better than the one before, on 4,000 images."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 4000)
    return [make_logits(generator, labels, strength) for strength in (6, 8, 12)], labels


def test_of_likely_temperatures_the_best_calibrated_counts() -> None:
    """Where no temperature is right for all images the likelihood leaves a choice, and calibration makes it."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((800, 5)).astype(np.float32) * np.float32(2)
    # Answers of a little confidence are right too often, others too rarely: no temperature is right for all.
    labels = np.where(rng.random(800) < 0.7, logits.argmax(axis=1), rng.integers(0, 5, 800))

    def loss(temperature: float) -> np.ndarray:
        return -np.log(softmax(logits, temperature)[np.arange(800), labels].astype(np.float64))

    found = fit_temperature(logits, labels)
    likeliest = min(np.geomspace(0.2, 5, 200), key=lambda each: loss(each).mean())
    worse = loss(found) - loss(likeliest)
    assert worse.mean() <= 2.1 * worse.std() / np.sqrt(800)
    assert expected_calibration_error(logits, labels, found) <= expected_calibration_error(logits, labels, likeliest)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_found_again(temperature: float) -> None:
    """Labels drawn from softmax(logits), logits then multiplied: the multiplier is the temperature."""
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 2, (20_000, 10)).astype(np.float32)
    cumulated = softmax(logits).cumsum(axis=1)
    labels = (generator.random((20_000, 1)) > cumulated).sum(axis=1).clip(max=9)

    assert fit_temperature(logits * np.float32(temperature), labels) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("score", ["max_softmax", "margin", "entropy"])
@pytest.mark.parametrize("drop", [0.0, 0.005, 0.05])
def test_exits_keep_the_allowed_drop_and_save_more_when_more_is_allowed(
    fitted: tuple[list[np.ndarray], np.ndarray], score: str, drop: float
) -> None:
    """Accuracy on the fitting images is within the drop, and images do leave."""
    logits, labels = fitted
    exits = fit_exits(logits, labels, [1.0, 1.0, 1.0], ExitConfig(score=score, max_accuracy_drop=drop))
    routing = route(logits, exits)

    full = (logits[-1].argmax(1) == labels).mean()
    assert (routing.predicted == labels).mean() >= full - drop - 1e-9
    if drop:
        stricter = route(logits, fit_exits(logits, labels, [1.0, 1.0, 1.0], ExitConfig(score=score, max_accuracy_drop=0.0)))
        assert routing.exit_stage.mean() < stricter.exit_stage.mean()


def test_an_exit_that_only_harms_is_never_taken() -> None:
    """A first exit that is always wrong and always sure gets a threshold that nothing reaches."""
    labels = np.arange(1000) % 10
    wrong = np.eye(10, dtype=np.float32)[(labels + 1) % 10] * 50
    right = np.eye(10, dtype=np.float32)[labels] * 5

    exits = fit_exits([wrong, right], labels, [1.0, 1.0], ExitConfig(max_accuracy_drop=0.0))

    assert exits[0].threshold == NEVER
    assert (route([wrong, right], exits).exit_stage == 1).all()


def test_routing_agrees_with_the_policy_that_serves(fitted: tuple[list[np.ndarray], np.ndarray]) -> None:
    """Evaluation sends each image where the service would."""
    logits, labels = fitted
    exits = fit_exits(logits, labels, [1.0, 1.0, 1.0], ExitConfig(max_accuracy_drop=0.02))
    policy = ExitPolicy(exits)

    expected = np.full(len(labels), 2)
    for stage in (1, 0):
        expected[policy.decide(stage, logits[stage])[0]] = stage

    assert {0, 1, 2} == set(expected.tolist())
    assert np.array_equal(expected, route(logits, exits).exit_stage)


def test_the_last_exit_takes_everyone() -> None:
    """It has a temperature, and no threshold."""
    logits = np.zeros((4, 3), np.float32)
    exits = [
        ExitSpec(score="max_softmax", temperature=1, threshold=0.9),
        ExitSpec(score="margin", temperature=1, threshold=None),
    ]

    assert route([logits, logits], exits).exit_stage.tolist() == [1, 1, 1, 1]
