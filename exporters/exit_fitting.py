"""One temperature and one threshold per exit, fitted on the very variant that will serve (docs/adr/0005)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.exits import SCORES
from app.postprocess import softmax
from app.types import Array, FloatArray
from exporters.config import ExitConfig
from models.manifest import ExitSpec

NEVER = 1.01  # above every score: nobody leaves here
TEMPERATURES = np.geomspace(0.05, 20, 400)  # steps of 1.5 %, far finer than what the fit can tell apart
MAX_COMBINATIONS = 40_000  # of candidate thresholds that are tried


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
    for stage in reversed(range(len(exits) - 1)):
        spec = exits[stage]
        score = SCORES[spec.score](softmax(logits[stage], spec.temperature))
        exit_stage[score >= np.float32(spec.threshold if spec.threshold is not None else NEVER)] = stage
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
    needed = correct[-1].mean() - config.max_accuracy_drop
    cost_through = np.cumsum(stage_costs)

    per_exit = max(5, int(MAX_COMBINATIONS ** (1 / max(1, len(scores)))))
    candidates = [np.append(np.unique(np.quantile(score, np.linspace(0, 1, per_exit))), NEVER) for score in scores]
    best, best_cost = tuple(NEVER for _ in scores), float(cost_through[-1])
    for thresholds in itertools.product(*candidates):
        accuracy, cost = _accuracy_and_cost(scores, correct, cost_through, thresholds)
        if accuracy >= needed and cost < best_cost:
            best, best_cost = tuple(float(t) for t in thresholds), cost

    specs = [
        ExitSpec(score=config.score, temperature=temperature, threshold=threshold)
        for temperature, threshold in zip(temperatures[:-1], best, strict=True)
    ]
    return (*specs, ExitSpec(score=config.score, temperature=temperatures[-1], threshold=None))


def _accuracy_and_cost(
    scores: Sequence[FloatArray], correct: Array, cost_through: Array, thresholds: Sequence[float]
) -> tuple[float, float]:
    still_in = np.ones(correct.shape[1], dtype=bool)
    right, cost = 0, 0.0
    for stage, (score, threshold) in enumerate(zip(scores, thresholds, strict=True)):
        leaving = still_in & (score >= np.float32(threshold))
        right += int(correct[stage][leaving].sum())
        cost += float(cost_through[stage]) * int(leaving.sum())
        still_in &= ~leaving
    right += int(correct[-1][still_in].sum())
    cost += float(cost_through[-1]) * int(still_in.sum())
    return right / correct.shape[1], cost / correct.shape[1]
