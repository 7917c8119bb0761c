"""One temperature and one threshold per exit, fitted on the very variant that will serve (docs/adr/0005)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from app.exits import ExitPolicy, no_history, with_answers
from app.postprocess import softmax
from app.types import Array, FloatArray
from exporters.calibration_error import expected_calibration_error
from exporters.config import ExitConfig
from models.manifest import ExitSpec

NEVER = 1.01  # above every score: nobody leaves here
TEMPERATURES = np.geomspace(0.05, 20, 400)  # steps of 1.5 %, far finer than what the fit can tell apart
STEP = 2  # of them, between those whose calibration is compared
MAX_COMBINATIONS = 500  # of candidate thresholds; for the last early exit every possible one is tried


@dataclass(frozen=True, slots=True)
class Routing:
    """What a set of exits does on some images."""

    exit_stage: Array  # int64 (N,): where each image left
    predicted: Array  # int64 (N,): its class there


def fit_temperature(logits: FloatArray, labels: Array) -> float:
    """The temperature with the least calibration error of those that the likelihood of the labels cannot tell apart.

    The least negative log-likelihood is found by bisection: it has one valley, since it is convex in the temperature's inverse.
    Around it are temperatures that are worse by no more than two standard errors of the difference, image by image. Exits
    compare confidences, so among those the one counts whose confidences are right.

    Args:
        logits: (N, C); labels: (N,).

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    rows = np.arange(len(labels))

    def losses(index: int) -> Array:
        chosen = softmax(logits, float(TEMPERATURES[index]))[rows, labels]
        found: Array = -np.log(np.maximum(chosen, 1e-30, dtype=np.float64))
        return found

    low, high = 0, len(TEMPERATURES) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if losses(middle).mean() <= losses(middle + 1).mean() else (middle + 1, high)
    best, likely = losses(low), [low]
    for step in (-STEP, STEP):
        index = low + step
        while 0 <= index < len(TEMPERATURES):
            difference = losses(index) - best
            if difference.mean() > 2 * difference.std() / np.sqrt(len(labels)):
                break
            likely.append(index)
            index += step
    return float(
        TEMPERATURES[min(likely, key=lambda each: expected_calibration_error(logits, labels, float(TEMPERATURES[each])))]
    )


def route(logits: Sequence[FloatArray], exits: Sequence[ExitSpec]) -> Routing:
    """Send images through exits; `logits` (N, C) of every exit, for all images."""
    count = len(logits[0])
    exit_stage = np.full(count, len(exits) - 1)
    for stage, (leave, _) in reversed([*enumerate(_decisions(logits, exits))]):
        exit_stage[leave] = stage
    predicted = np.stack([stage_logits.argmax(axis=1) for stage_logits in logits])[exit_stage, np.arange(count)]
    return Routing(exit_stage, predicted)


def scores_of(logits: Sequence[FloatArray], exits: Sequence[ExitSpec]) -> list[FloatArray]:
    """The score of each early exit, (N,) each, for images that went through all before."""
    return [score for _, score in _decisions(logits, exits)]


def _decisions(logits: Sequence[FloatArray], exits: Sequence[ExitSpec]) -> Iterator[tuple[Array, FloatArray]]:
    """Of each early exit, by the very decision that serves: who would leave, and the scores."""
    policy, history = ExitPolicy(exits), no_history(len(logits[0]))
    for stage in range(len(exits) - 1):
        history = with_answers(history, logits[stage])
        yield policy.decide(stage, logits[stage], 0, history)


def fit_exits(
    logits: Sequence[FloatArray], labels: Array, stage_costs: Sequence[float], config: ExitConfig
) -> tuple[ExitSpec, ...]:
    """Temperatures first, then the thresholds of least mean cost whose accuracy is within the allowed drop.

    Args:
        logits: (N, C) of every exit, for all images, from the variant that will serve.
        labels: int64 (N,).
        stage_costs: of each stage alone, in any unit.

    Returns:
        One exit per stage; an exit that could not help within the drop is never taken.
    """
    return fit_exit_path(logits, labels, stage_costs, config, [config.max_accuracy_drop])[0]


def fit_exit_path(
    logits: Sequence[FloatArray], labels: Array, stage_costs: Sequence[float], config: ExitConfig, max_drops: Sequence[float]
) -> list[tuple[ExitSpec, ...]]:
    """As `fit_exits`, for several allowed drops of accuracy, shares of the images."""
    temperatures = [fit_temperature(stage_logits, labels) for stage_logits in logits]
    scores = scores_of(logits, [ExitSpec(score=config.score, temperature=each, threshold=NEVER) for each in temperatures])
    correct = np.stack([stage_logits.argmax(axis=1) == labels for stage_logits in logits])
    path = _fit_thresholds(scores, correct, np.cumsum(stage_costs), max_drops)
    last = ExitSpec(score=config.score, temperature=temperatures[-1] if config.labelled else 1.0, threshold=None)
    return [
        (
            *(
                ExitSpec(score=config.score, temperature=temperature, threshold=threshold)
                for temperature, threshold in zip(temperatures[:-1], thresholds, strict=True)
            ),
            last,
        )
        for thresholds in path
    ]


def with_thresholds(exits: Sequence[ExitSpec], thresholds: Sequence[float]) -> tuple[ExitSpec, ...]:
    """The same exits with other thresholds, one for each but the last."""
    early = zip(exits[:-1], thresholds, strict=True)
    return (*(exit_.model_copy(update={"threshold": threshold}) for exit_, threshold in early), exits[-1])


def never_early(exits: Sequence[ExitSpec]) -> tuple[ExitSpec, ...]:
    """The same exits, of which none but the last is taken."""
    return with_thresholds(exits, [NEVER] * (len(exits) - 1))


def _fit_thresholds(
    scores: Sequence[FloatArray], correct: Array, cost_through: Array, max_drops: Sequence[float]
) -> list[tuple[float, ...]]:
    """The thresholds of least mean cost: candidates for all exits but the last early one, for that one every score.

    Args:
        scores: (N,) of each early exit.
        correct: bool (exits, N).
        cost_through: of an image that leaves at each exit.
        max_drops: for each of which there is a set of thresholds.
    """
    if not scores:
        return [() for _ in max_drops]
    count = correct.shape[1]
    # 1e-9: 0.005 * 1000 may come out as 4.999...
    right_needed = [int(correct[-1].sum()) - int(max_drop * count + 1e-9) for max_drop in max_drops]
    per_exit = max(5, int(MAX_COMBINATIONS ** (1 / max(1, len(scores) - 1))))
    candidates = [np.append(np.unique(np.quantile(score, np.linspace(0, 1, per_exit))), NEVER) for score in scores[:-1]]
    best = [(np.inf, tuple(NEVER for _ in scores)) for _ in max_drops]
    for outer in itertools.product(*candidates):
        still_in = np.ones(count, dtype=bool)
        right, cost = 0, 0.0
        for stage, threshold in enumerate(outer):
            leaving = still_in & (scores[stage] >= np.float32(threshold))
            right += int(correct[stage][leaving].sum())
            cost += float(cost_through[stage]) * int(leaving.sum())
            still_in &= ~leaving
        still_needed = [needed - right for needed in right_needed]
        swept = _sweep(scores[-1][still_in], correct[-2:, still_in], cost_through[-2:], still_needed)
        for index, (threshold, inner_cost) in enumerate(swept):
            if cost + inner_cost < best[index][0]:
                best[index] = (cost + inner_cost, (*map(float, outer), threshold))
    return [thresholds for _, thresholds in best]


def _sweep(score: FloatArray, correct: Array, cost: Array, right_needed: Sequence[int]) -> list[tuple[float, float]]:
    """For each number of right answers, the lowest threshold of one exit that has them, and the cost, infinite for none.

    Args:
        score: (M,); correct: bool (2, M), here and at the last exit; cost: (2,), likewise.
    """
    order = np.argsort(-score, kind="stable")
    here, after = correct[:, order]
    # With the k surest leaving here, for k = 0 .. M:
    right = np.concatenate([[0], np.cumsum(here)]) + int(after.sum()) - np.concatenate([[0], np.cumsum(after)])
    falling = score[order]
    apart = np.concatenate([[True], falling[1:] < falling[:-1], [True]])[: len(score) + 1]  # equal scores leave together
    # The most right answers that a threshold has of those that let k or more leave; it falls with k.
    most = np.maximum.accumulate(np.where(apart, right, -1)[::-1])[::-1]
    found = []
    for last in (np.searchsorted(-most, -np.asarray(right_needed), side="right") - 1).tolist():
        if last < 0:
            found.append((NEVER, np.inf))
            continue
        threshold = float(falling[last - 1]) if last else NEVER
        found.append((threshold, float(cost[0]) * last + float(cost[1]) * (len(score) - last)))
    return found
