"""Bounds on what an operating point loses that hold for any distribution of images, as long as future ones are alike.

Each candidate is a hypothesis, "it loses more than epsilon", and a p-value says how likely the images at hand would be if that
were so. Candidates are tested in an order fixed before these images were looked at, from the safest to the fastest, each at
level delta, until one cannot be rejected: then no candidate that was rejected breaks its promise, but with a probability of
delta at most, however many there are.

Sources: Angelopoulos et al., Learn then Test, 2021, section 3 (fixed-sequence testing); Jazbec et al., Fast yet Safe:
Early-Exiting with Risk Control, NeurIPS 2024. Those use bounds for losses anywhere in an interval. An image is right or wrong
in both answers that are compared, so the tests here are the exact ones for counts: of a binomial, and, where gains pay for
losses, of a trinomial, with its unknown rate of gains within bounds (Berger and Boos, 1994).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from app.types import Array

NUISANCE_LEVEL = 2e-3  # probability that the unknown rate of gains is out of its bounds: added to the p-value
NUISANCE_STEPS = 24  # within those bounds, at which the p-value is looked at; it changes smoothly
TAIL = 1e-12  # probability of counts that are left out, added to the p-value

Risk = Literal["accuracy", "disagreement"]


@dataclass(frozen=True, slots=True)
class PairedCounts:
    """How two answers for the same images differ.

    lost: images that the reference answers rightly and the candidate wrongly; gained: the other way round. Without labels
    every image on which they disagree is lost, and none gained.
    """

    lost: int
    gained: int
    images: int

    @property
    def loss(self) -> float:
        """Net share of the images, in -1 .. 1."""
        return (self.lost - self.gained) / self.images


def paired_counts(reference: Array, candidate: Array, labels: Array | None) -> PairedCounts:
    """From two predicted classes of each image, int64 (N,), and the true ones, None for disagreement."""
    if labels is None:
        return PairedCounts(int((reference != candidate).sum()), 0, len(reference))
    before, after = reference == labels, candidate == labels
    return PairedCounts(int((before & ~after).sum()), int((after & ~before).sum()), len(labels))


def disagreement_p_value(counts: PairedCounts, epsilon: float) -> float:
    """Of "more than epsilon of all images would be answered otherwise": the binomial's exact tail."""
    return float(stats.binom.cdf(counts.lost + counts.gained, counts.images, epsilon))


def accuracy_p_value(counts: PairedCounts, epsilon: float) -> float:
    """Of "the accuracy is lower by more than epsilon": how likely a net loss as small as this one would be, at worst.

    The rate of gains is not known. How many images differ at all bounds it, but with probability `NUISANCE_LEVEL`; the p-value
    is the largest within those bounds, plus that probability (Berger and Boos, Journal of the American Statistical
    Association, 1994).
    """
    images, differing, net = counts.images, counts.lost + counts.gained, counts.lost - counts.gained
    most = float(stats.beta.ppf(1 - NUISANCE_LEVEL, differing + 1, images - differing)) if differing < images else 1.0
    highest = (most - epsilon) / 2  # lost - gained = epsilon and lost + gained <= most
    if highest < 0:  # so few differ that a loss of epsilon is out of bounds
        return NUISANCE_LEVEL
    gain_rates = np.linspace(0, min(highest, (1 - epsilon) / 2), NUISANCE_STEPS)[:, None]
    gains = np.arange(int(stats.binom.ppf(1 - TAIL, images, gain_rates[-1, 0])) + 1)  # more are as good as impossible
    rest = np.minimum(1.0, (gain_rates + epsilon) / (1 - gain_rates))  # rate of losses among images that are no gains
    tails: Array = stats.binom.pmf(gains, images, gain_rates) * stats.binom.cdf(net + gains, images - gains, rest)
    return min(1.0, float(tails.sum(axis=1).max()) + TAIL + NUISANCE_LEVEL)


P_VALUES: dict[Risk, Callable[[PairedCounts, float], float]] = {
    "accuracy": accuracy_p_value,
    "disagreement": disagreement_p_value,
}


def last_safe(candidates: Sequence[PairedCounts], risk: Risk, epsilon: float, delta: float) -> int | None:
    """Index of the last candidate before the first that cannot be said to lose at most epsilon; None where that is the first.

    Args:
        candidates: in an order that these images had no part in, safest first.
        risk: what is bounded.
        epsilon: largest loss, a share of the images.
        delta: largest probability that the candidate chosen loses more.
    """
    p_value, safe = P_VALUES[risk], None
    for index, counts in enumerate(candidates):
        if p_value(counts, epsilon) > delta:
            break
        safe = index
    return safe


def smallest_epsilon(counts: PairedCounts, risk: Risk, epsilons: Sequence[float], delta: float) -> float | None:
    """The smallest of some losses that one candidate keeps, tested from the largest on; None where it keeps not even that."""
    p_value, kept = P_VALUES[risk], None
    for epsilon in sorted(epsilons, reverse=True):
        if p_value(counts, epsilon) > delta:
            break
        kept = epsilon
    return kept


def images_needed(risk: Risk, epsilon: float, delta: float, *, observed: PairedCounts | None = None) -> int:
    """How many images could certify epsilon: at least, where not one differed; else at the rates of what was observed.

    Raises:
        ValueError: at those rates no number could, since the loss is not below epsilon.
    """
    if not (0 < epsilon < 1 and 0 < delta < 1):
        raise ValueError(f"epsilon {epsilon} and delta {delta} are probabilities between 0 and 1")
    if risk == "accuracy" and delta <= NUISANCE_LEVEL + TAIL:
        raise ValueError(f"a delta of {delta} is finer than this test can tell: it needs more than {NUISANCE_LEVEL}")

    def enough(images: int) -> bool:
        if observed is None:
            return P_VALUES[risk](PairedCounts(0, 0, images), epsilon) <= delta
        lost, gained = (math.ceil(count / observed.images * images) for count in (observed.lost, observed.gained))
        return P_VALUES[risk](PairedCounts(lost, gained, images), epsilon) <= delta

    if observed is not None:
        rate = observed.loss if risk == "accuracy" else (observed.lost + observed.gained) / observed.images
        if rate >= epsilon:
            raise ValueError(f"{100 * rate:.2g} points are lost, and {100 * epsilon:.2g} are to be kept")
    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if high > 10**8:
            raise ValueError("no number of images that one could have would do")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
