"""Probabilities and the likeliest labels."""

from __future__ import annotations

import numpy as np
import pytest

from app.postprocess import softmax, top_k

LABELS = ("a", "b", "c", "d")


def test_softmax_of_known_logits() -> None:
    """Powers of two: logits of ln 1, ln 2, ln 5 give an eighth, a quarter and five eighths."""
    probabilities = softmax(np.log(np.array([[1, 2, 5], [5, 2, 1]], dtype=np.float32)))

    np.testing.assert_allclose(probabilities, [[0.125, 0.25, 0.625], [0.625, 0.25, 0.125]], rtol=1e-6)
    assert probabilities.dtype == np.float32


def test_softmax_divides_by_the_temperature() -> None:
    """Temperature 2 takes the root of every ratio."""
    probabilities = softmax(np.log(np.array([1, 4], dtype=np.float32)), temperature=2.0)

    np.testing.assert_allclose(probabilities, [1 / 3, 2 / 3], rtol=1e-6)


@pytest.mark.parametrize("offset", [-1000.0, 0.0, 1000.0])
def test_softmax_does_not_overflow(offset: float) -> None:
    """Only differences of logits count, however large they are."""
    probabilities = softmax(np.array([0, 1], dtype=np.float32) + np.float32(offset), temperature=0.5)

    np.testing.assert_allclose(probabilities, [1 / (1 + np.e**2), 1 / (1 + np.e**-2)], rtol=1e-5)


def test_softmax_is_over_the_last_axis() -> None:
    """Each row of any number of rows sums to 1."""
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)

    np.testing.assert_allclose(softmax(logits).sum(axis=-1), np.ones((2, 3)), rtol=1e-6)


def test_the_likeliest_come_first() -> None:
    """With label, index and probability that belong together."""
    scores = top_k(np.array([0.1, 0.5, 0.1, 0.3], dtype=np.float32), LABELS, 2)

    assert [("b", 1, 0.5), ("d", 3, pytest.approx(0.3))] == [(score.label, score.index, score.probability) for score in scores]
    assert {type(scores[0].index), type(scores[0].probability)} == {int, float}  # no NumPy scalars: they go into JSON


@pytest.mark.parametrize("k", [1, 3, 4])
def test_equal_probabilities_keep_the_order_of_their_index(k: int) -> None:
    """So that the same image has the same answer everywhere."""
    scores = top_k(np.full(4, 0.25, dtype=np.float32), LABELS, k)

    assert list(range(k)) == [score.index for score in scores]


@pytest.mark.parametrize("num_classes", [10, 64, 65, 1000])
def test_many_classes_and_few_are_ordered_alike(num_classes: int) -> None:
    """Two ways of sorting, one order: by probability, equal ones by index."""
    probabilities = np.random.default_rng(0).integers(0, 20, num_classes).astype(np.float32)
    expected = sorted(range(num_classes), key=lambda index: (-probabilities[index], index))[:7]

    scores = top_k(probabilities, [str(index) for index in range(num_classes)], 7)

    assert expected == [score.index for score in scores]
    assert [float(probabilities[index]) for index in expected] == [score.probability for score in scores]
