"""Scores are what their papers say, and an image leaves exactly where its score reaches the threshold."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from app.exits import PATIENCE, SCORES, ExitPolicy, entropy, margin, max_softmax, no_history, with_answers
from app.postprocess import softmax
from models.manifest import ExitSpec

Score = Literal["max_softmax", "margin", "entropy"]
ATOL = 1e-6  # float32 on values up to 1


def rows(*probabilities: list[float]) -> np.ndarray:
    return np.array(probabilities, dtype=np.float32)


def policy(*, score: Score = "max_softmax", temperature: float = 1.0, threshold: float = 0.9) -> ExitPolicy:
    """Two stages; the second lets everything leave."""
    return ExitPolicy(
        [
            ExitSpec(score=score, temperature=temperature, threshold=threshold),
            ExitSpec(score=score, temperature=2 * temperature, threshold=None),
        ]
    )


def test_the_table_has_every_score_of_the_manifest() -> None:
    """A manifest that is valid can be served."""
    assert set(ExitSpec.model_fields["score"].annotation.__args__) == {*SCORES, PATIENCE}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("probabilities", "largest", "gap", "sure"),
    [
        ([1.0, 0.0, 0.0, 0.0], 1.0, 1.0, 1.0),
        ([0.25, 0.25, 0.25, 0.25], 0.25, 0.0, 0.0),
        ([0.5, 0.5, 0.0, 0.0], 0.5, 0.0, 0.5),  # one bit of two
        ([0.1, 0.7, 0.2, 0.0], 0.7, 0.5, 1 - 0.8018186 / np.log(4)),  # 0.8018 nats
    ],
)
def test_scores_of_known_probabilities(probabilities: list[float], largest: float, gap: float, sure: float) -> None:
    """Computed by hand; all lie in 0 .. 1, high is sure, and certainty has no NaN in it."""
    batch = rows(probabilities, probabilities[::-1])

    np.testing.assert_allclose(max_softmax(batch), [largest] * 2, atol=ATOL)
    np.testing.assert_allclose(margin(batch), [gap] * 2, atol=ATOL)
    np.testing.assert_allclose(entropy(batch), [sure] * 2, atol=ATOL)


def test_a_single_class_is_always_sure() -> None:
    """There is no second for the margin, and no entropy to normalise."""
    assert [score(rows([1.0])).tolist() for score in SCORES.values()] == [[1.0]] * 3


@pytest.mark.parametrize("score", sorted(SCORES))
def test_an_image_leaves_where_its_score_reaches_the_threshold(score: Score) -> None:
    """At the threshold it leaves, a hair below it stays: fitted thresholds are scores of images themselves."""
    logits = np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32) * 3
    scores = SCORES[score](softmax(logits))
    threshold = float(np.sort(scores)[10])

    leave, confidence = policy(score=score, threshold=threshold).decide(0, logits)

    np.testing.assert_array_equal(confidence, scores)
    np.testing.assert_array_equal(leave, scores >= threshold)
    assert leave.sum() == 10
    above, _ = policy(score=score, threshold=float(np.nextafter(np.float32(threshold), np.float32(2)))).decide(0, logits)
    assert above.sum() == 9


def test_the_threshold_is_compared_in_float32() -> None:
    """0.9 as float32 is above 0.9 as a double: an image whose score is exactly that one must not be kept for it."""
    score = np.float32(0.7)
    logits = np.log(rows([float(score), float(1 - score)]))
    leave, confidence = policy(threshold=0.7).decide(0, logits)

    assert leave.tolist() == [bool(confidence[0] >= np.float32(0.7))]
    leave, _ = policy(threshold=float(str(confidence[0]))).decide(0, logits)  # as the manifest's JSON writes it
    assert leave.tolist() == [True]


def test_from_the_last_stage_every_image_leaves() -> None:
    """However unsure: there is nobody behind."""
    leave, confidence = policy().decide(1, np.zeros((3, 10), dtype=np.float32))

    assert leave.tolist() == [True] * 3
    np.testing.assert_allclose(confidence, [0.1] * 3, atol=ATOL)


def test_a_threshold_above_every_score_keeps_all() -> None:
    """How the exporter writes an exit that is never taken."""
    leave, _ = policy(threshold=1.01).decide(0, rows([100.0, 0.0]))

    assert leave.tolist() == [False]


def test_the_temperature_of_each_stage_makes_its_probabilities() -> None:
    """The policy divides by the stage's own temperature, for decisions as for the answer."""
    fitted = policy(temperature=2.0, threshold=0.5)
    logits = rows([2.0, 0.0])

    np.testing.assert_allclose(fitted.probabilities(0, logits)[0, 0], 1 / (1 + np.exp(-1)), atol=ATOL)
    np.testing.assert_allclose(fitted.probabilities(1, logits)[0, 0], 1 / (1 + np.exp(-0.5)), atol=ATOL)
    np.testing.assert_allclose(fitted.decide(0, logits)[1], [1 / (1 + np.exp(-1))], atol=ATOL)


def test_a_higher_temperature_lets_fewer_leave() -> None:
    """Less confident, so below the threshold."""
    logits = rows([3.0, 0.0])

    assert policy(temperature=1.0).decide(0, logits)[0].tolist() == [True]
    assert policy(temperature=3.0).decide(0, logits)[0].tolist() == [False]


@pytest.mark.parametrize("score", sorted(SCORES))
def test_the_decision_on_an_image_does_not_depend_on_its_batch(score: Score) -> None:
    """One at a time gives what all together give, bit for bit."""
    logits = np.random.default_rng(1).normal(size=(17, 10)).astype(np.float32) * 3
    fitted = policy(score=score, temperature=1.3, threshold=0.5)
    leave, confidence = fitted.decide(0, logits)

    for row in range(len(logits)):
        alone = fitted.decide(0, logits[row : row + 1])
        assert (bool(alone[0][0]), float(alone[1][0])) == (bool(leave[row]), float(confidence[row]))


def test_the_number_of_stages_is_that_of_the_exits() -> None:
    """The pipeline makes a queue for each."""
    assert policy().num_stages == 2


def patient(*thresholds: float) -> ExitPolicy:
    exits = [ExitSpec(score="patience", temperature=1.0, threshold=each) for each in thresholds]
    return ExitPolicy([*exits, ExitSpec(score="patience", temperature=1.0, threshold=None)])


def test_who_agrees_with_the_exits_before_is_surer() -> None:
    """By hand: the streak, less one, plus the largest probability, over the stages; another answer begins anew."""
    policy = patient(0.9, 0.9)
    sure, torn = np.log([0.9, 0.1]), np.log([0.4, 0.6])
    history, scores = no_history(2), []
    for stage, logits in enumerate((np.array([sure, sure]), np.array([sure, torn]), np.array([torn, torn]))):
        history = with_answers(history, logits.astype(np.float32))
        leave, score = policy.decide(stage, logits.astype(np.float32), 0, history)
        scores.append(score.tolist())
        assert leave.all() == (stage == 2)

    np.testing.assert_allclose(scores, [[0.9 / 3, 0.9 / 3], [1.9 / 3, 0.6 / 3], [0.6 / 3, 1.6 / 3]], atol=ATOL)
    assert history.tolist() == [[1, 1], [1, 2]]


def test_patience_needs_the_exits_before() -> None:
    """Without them there is no score; and no network of a cascade is passed over, but by those who want the last answer."""
    with pytest.raises(ValueError, match="a history is needed"):
        patient(0.5).decide(0, rows([1.0, 0.0]))
    exits = patient(1.01, 0.5)
    assert exits.way((0, 1)) == [0, 1, 2]
    assert patient(1.01, 1.01).way((0, 1, 2)) == [2]
    quick = [ExitSpec(score="margin", temperature=1.0, threshold=each) for each in (1.01, 0.5, None)]
    assert ExitPolicy(quick).way((0, 1)) == [1, 2]
