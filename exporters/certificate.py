"""Exits whose loss is bounded: fitted on one half of the images, chosen and certified on the other.

The tests are those of `exporters.risk_control`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.types import Array, FloatArray
from exporters.config import BoundConfig, ExitConfig
from exporters.exit_fitting import NEVER, fit_exit_path, never_early, route, scores_of
from exporters.risk_control import PairedCounts, Risk, images_needed, last_safe, paired_counts
from models.manifest import Certificate, ExitSpec

COMPARED_WITH = "the last exit of the same variant"
METHOD = (
    "exits fitted on one half of the images for a row of allowed losses; on the other half that row tested from the safest on, "
    "by an exact test, until one fails (Learn then Test, fixed sequence)"
)
LIMITS = (
    "It holds on average over images drawn like those it was tested on, not for single images or classes; of other images, and "
    "of the accuracy itself, it promises nothing."
)
ALREADY_SEEN = "no bound: INT8 or a schedule was fitted on these images before; certify on others"
SHARES = np.linspace(0.0, 1.0, 21)[1:-1]  # of those that leave early with the first exits of the path: its steps before these
STEPS = np.linspace(0.0, 2.0, 41)[1:]  # behind these: losses allowed on the fitting images, in units of the one to be certified


@dataclass(frozen=True, slots=True)
class Certified:
    """Exits, their certificate, None where nothing but the full depth could be proved, and why, in words."""

    exits: tuple[ExitSpec, ...]
    certificate: Certificate | None
    reason: str


def split(count: int, bound: BoundConfig) -> Array | None:
    """Which of the images are set apart to test on, bool (N,): a half, drawn by a fixed seed; None where that is too few."""
    half = count // 2
    if half < images_needed("accuracy", bound.epsilon, bound.delta):
        return None
    apart = np.zeros(count, dtype=bool)
    apart[np.random.default_rng(bound.seed).permutation(count)[:half]] = True
    return apart


def too_few(count: int, bound: BoundConfig) -> str:
    """What to say then."""
    needed = 2 * images_needed("accuracy", bound.epsilon, bound.delta)
    return (
        f"no bound: to prove that exits cost at most {100 * bound.epsilon:.3g} points, with {100 * (1 - bound.delta):.3g} % "
        f"confidence, takes at least {needed} images to fit on, and there are {count}"
    )


def certified_exits(
    fitting: tuple[Sequence[FloatArray], Array],
    apart: tuple[Sequence[FloatArray], Array],
    stage_costs: Sequence[float],
    config: ExitConfig,
    bound: BoundConfig,
    *,
    images_sha256: str,
    risk: Risk = "accuracy",
) -> Certified:
    """The cheapest exits that lose at most epsilon against the full depth, with a probability of 1 - delta.

    Args:
        fitting: logits (N, C) of every exit, and labels (N,), of the images that exits are fitted on.
        apart: likewise, of those that had no part in anything.
        stage_costs: of each stage alone, in any unit.
        config: how exits are fitted; its allowed drop is not used.
        bound: epsilon and delta.
        images_sha256: of the set that both are halves of.
        risk: "disagreement" where the labels are the last exit's own answers.
    """
    logits, labels = apart
    path = _path(*fitting, stage_costs, config, bound.epsilon)
    reference = logits[-1].argmax(axis=1)
    counts = [
        paired_counts(reference, route(logits, exits).predicted, labels if risk == "accuracy" else None) for exits in path
    ]
    chosen = last_safe(counts, risk, bound.epsilon, bound.delta)
    if chosen is None:
        return Certified(never_early(path[0]), None, _why_not(counts[0], risk, bound))
    certificate = Certificate(
        risk=risk,
        compared_with=COMPARED_WITH,
        epsilon=bound.epsilon,
        delta=bound.delta,
        images=len(labels),
        images_sha256=images_sha256,
        method=METHOD,
        limits=LIMITS,
    )
    return Certified(path[chosen], certificate, str(certificate))


def _path(
    logits: Sequence[FloatArray], labels: Array, stage_costs: Sequence[float], config: ExitConfig, epsilon: float
) -> list[tuple[ExitSpec, ...]]:
    """Exits, safest first: those that only the surest images take, then the cheapest for each allowed loss.

    The cheapest that lose nothing on the images they were fitted on lose something on others.
    """
    fitted = fit_exit_path(logits, labels, stage_costs, config, [float(step) * epsilon for step in STEPS])
    leaves_at, scores_at = route(logits, fitted[0]).exit_stage, scores_of(logits, fitted[0])
    careful = []
    for share in SHARES:
        exits = list(fitted[0])
        for stage, exit_ in enumerate(exits[:-1]):
            scores = np.sort(scores_at[stage][leaves_at == stage])[::-1]
            last = int(share * len(scores)) - 1
            exits[stage] = exit_.model_copy(update={"threshold": float(scores[last]) if last >= 0 else NEVER})
        careful.append(tuple(exits))
    return careful + fitted


def _why_not(counts: PairedCounts, risk: Risk, bound: BoundConfig) -> str:
    lost = f"nobody leaves early: even the most careful exits answer {counts.lost} of {counts.images} images worse"
    gained = f" and {counts.gained} better" if counts.gained else ""
    try:
        needed = images_needed(risk, bound.epsilon, bound.delta, observed=counts)
    except ValueError:
        return f"{lost}{gained}, which is more than {100 * bound.epsilon:.3g} points: allow more (--max-drop)"
    return (
        f"{lost}{gained}; to prove that it is at most {100 * bound.epsilon:.3g} points takes some {2 * needed} images to fit on"
    )
