"""One temperature and one threshold per exit, fitted on the very variant that will serve (docs/adr/0005)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.exits import SCORES, ExitPolicy
from app.postprocess import softmax
from app.types import Array, FloatArray
from exporters.config import ExitConfig
from models.manifest import ExitSpec

NEVER = 1.01  # above every score: nobody leaves here
TEMPERATURES = np.geomspace(0.05, 20, 400)  # steps of 1.5 %, far finer than what the fit can tell apart
MAX_COMBINATIONS = 500  # of candidate thresholds; for the last early exit every possible one is tried


@dataclass(frozen=True, slots=True)
class Routing:
    """What a set of exits does on some images."""

    exit_stage: Array  # int64 (N,): where each image left
    predicted: Array  # int64 (N,): its class there


def fit_temperature(logits: FloatArray, labels: Array) -> float:
    """The temperature with the least negative log-likelihood, on logits (N, C) and labels (N,).

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    rows = np.arange(len(labels))
    losses = [-np.log(np.maximum(softmax(logits, t)[rows, labels], 1e-30)).mean() for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])


def route(logits: Sequence[FloatArray], exits: Sequence[ExitSpec]) -> Routing:
    """Send images through exits; `logits` (N, C) of every exit, for all images."""
    count = len(logits[0])
    exit_stage = np.full(count, len(exits) - 1)
    policy = ExitPolicy(exits)  # the very decision that serves
    for stage in reversed(range(len(exits) - 1)):
        exit_stage[policy.decide(stage, logits[stage])[0]] = stage
    predicted = np.stack([stage_logits.argmax(axis=1) for stage_logits in logits])[exit_stage, np.arange(count)]
    return Routing(exit_stage, predicted)


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
    temperatures = [fit_temperature(stage_logits, labels) for stage_logits in logits]
    scores = [SCORES[config.score](softmax(z, t)) for z, t in zip(logits[:-1], temperatures[:-1], strict=True)]
    correct = np.stack([stage_logits.argmax(axis=1) == labels for stage_logits in logits])
    thresholds = _fit_thresholds(scores, correct, np.cumsum(stage_costs), config.max_accuracy_drop)
    specs = [
        ExitSpec(score=config.score, temperature=temperature, threshold=threshold)
        for temperature, threshold in zip(temperatures[:-1], thresholds, strict=True)
    ]
    return (*specs, ExitSpec(score=config.score, temperature=temperatures[-1], threshold=None))


def _fit_thresholds(scores: Sequence[FloatArray], correct: Array, cost_through: Array, max_drop: float) -> tuple[float, ...]:
    """The thresholds of least mean cost: candidates for all exits but the last early one, for that one every score.

    Args:
        scores: (N,) of each early exit.
        correct: bool (exits, N).
        cost_through: of an image that leaves at each exit.
    """
    if not scores:
        return ()
    count = correct.shape[1]
    right_needed = int(correct[-1].sum()) - int(max_drop * count + 1e-9)  # 1e-9: 0.005 * 1000 may come out as 4.999...
    per_exit = max(5, int(MAX_COMBINATIONS ** (1 / max(1, len(scores) - 1))))
    candidates = [np.append(np.unique(np.quantile(score, np.linspace(0, 1, per_exit))), NEVER) for score in scores[:-1]]
    best, best_cost = tuple(NEVER for _ in scores), np.inf
    for outer in itertools.product(*candidates):
        still_in = np.ones(count, dtype=bool)
        right, cost = 0, 0.0
        for stage, threshold in enumerate(outer):
            leaving = still_in & (scores[stage] >= np.float32(threshold))
            right += int(correct[stage][leaving].sum())
            cost += float(cost_through[stage]) * int(leaving.sum())
            still_in &= ~leaving
        threshold, inner_cost = _sweep(scores[-1][still_in], correct[-2:, still_in], cost_through[-2:], right_needed - right)
        if cost + inner_cost < best_cost:
            best, best_cost = (*(float(t) for t in outer), threshold), cost + inner_cost
    return best


def _sweep(score: FloatArray, correct: Array, cost: Array, right_needed: int) -> tuple[float, float]:
    """The lowest threshold of one exit with enough images right, and the cost; infinite when there is none.

    Args:
        score: (M,); correct: bool (2, M), here and at the last exit; cost: (2,), likewise.
    """
    order = np.argsort(-score, kind="stable")
    here, after = correct[:, order]
    # With the k surest leaving here, for k = 0 .. M:
    right = np.concatenate([[0], np.cumsum(here)]) + int(after.sum()) - np.concatenate([[0], np.cumsum(after)])
    falling = score[order]
    apart = np.concatenate([[True], falling[1:] < falling[:-1], [True]])[: len(score) + 1]  # equal scores leave together
    possible = np.flatnonzero(apart & (right >= right_needed))
    if not len(possible):
        return NEVER, np.inf
    leaving = int(possible[-1])
    threshold = float(falling[leaving - 1]) if leaving else NEVER
    return threshold, float(cost[0]) * leaving + float(cost[1]) * (len(score) - leaving)
