"""What a run of a stage takes, as a curve over the batch size, kept up to date while it serves.

A run takes a fixed time and a time for each of its images. Both are fitted by least squares in which a run counts half after
`HALF_LIFE` further ones, so that the curve follows what the machine does now: other stages, decoding and strangers share its
cores. What was measured at load stays in with the weight of one run at each size; without it, nothing would be known of a
batch of one while all batches are full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from app.types import RunTime

HALF_LIFE = 64  # runs
QUICK_S = 0.02  # of a run: who waits for it, or leaves during it, loses little
AROUND_S = 0.004  # of a longer run: what lies around it, and the caches that this leaves cold
ENOUGH = 1.05  # times what an image costs in the largest batch
SHARE_HALF_LIFE = 256  # images
PRIOR_IMAGES = 8  # that went on everywhere, as long as few have been seen
DECAY, SHARE_DECAY = 0.5 ** (1 / HALF_LIFE), 0.5 ** (1 / SHARE_HALF_LIFE)


class CostCurve:
    """Seconds of a run by its batch size: `fixed_s + images * per_image_s`, neither below 0.

    Args:
        known: runs that are never forgotten.
    """

    def __init__(self, known: Iterable[RunTime] = ()) -> None:
        runs = tuple(known)
        self._known = (
            float(len(runs)),
            float(sum(run.images for run in runs)),
            float(sum(run.images * run.images for run in runs)),
            sum(run.seconds for run in runs),
            sum(run.images * run.seconds for run in runs),
        )
        self._weight = self._images = self._squares = self._seconds = self._products = 0.0
        self.fixed_s = self.per_image_s = 0.0
        self._fit()

    def observe(self, images: int, seconds: float) -> None:
        """One more run."""
        self._weight = DECAY * self._weight + 1
        self._images = DECAY * self._images + images
        self._squares = DECAY * self._squares + images * images
        self._seconds = DECAY * self._seconds + seconds
        self._products = DECAY * self._products + images * seconds
        self._fit()

    def seconds(self, images: int) -> float:
        """What a run of so many images takes; 0 while nothing is known."""
        return self.fixed_s + images * self.per_image_s

    def _fit(self) -> None:
        weight, images, squares, seconds, products = self._known
        weight += self._weight
        images += self._images
        squares += self._squares
        seconds += self._seconds
        products += self._products
        if not weight:
            return
        spread = weight * squares - images * images
        slope = (weight * products - images * seconds) / spread if spread > 1e-9 * squares * weight else products / squares
        slope = max(0.0, slope)
        fixed = (seconds - slope * images) / weight
        if fixed < 0:  # a line through the origin is the best that is not negative
            fixed, slope = 0.0, products / squares
        self.fixed_s, self.per_image_s = fixed, slope


@dataclass(frozen=True, eq=False, slots=True)
class Way:
    """How images of an operating point go through the stages."""

    first: int
    after: tuple[int | None, ...]  # of each stage, the one that those who go on get to; None: nobody does
    nobody_leaves: tuple[bool, ...]  # after each stage


class StageCosts:
    """The curves of all stages of a model, and the share of the images that go on after each.

    Args:
        known: what was measured of each stage at load.
        max_batch_size: most images in a batch.

    Attributes:
        batch_sizes: of a full batch, by stage: `max_batch_size`, or fewer where a run is long and more are not worth it.
    """

    def __init__(self, known: Sequence[Iterable[RunTime]], *, max_batch_size: int) -> None:
        known = [tuple(runs) for runs in known]
        self.curves = [CostCurve(runs) for runs in known]
        # What a batch gains by being fuller is best told by what was measured for that: under load sizes and times say little.
        self._at_load = [CostCurve(runs) if runs else curve for runs, curve in zip(known, self.curves, strict=True)]
        self.batch_sizes = [_batch_size(curve, max_batch_size) for curve in self._at_load]
        self._seen = [float(PRIOR_IMAGES)] * len(self.curves)
        self._gone_on = [float(PRIOR_IMAGES)] * len(self.curves)
        self._remaining: dict[Way, list[float]] = {}  # since the last run; every request asks
        self._paths: dict[tuple[Way, int], float] = {}

    def observe(self, stage: int, images: int, seconds: float, going_on: int) -> None:
        """One more run, and how many of its images the next stage gets."""
        self.curves[stage].observe(images, seconds)
        kept = SHARE_DECAY**images
        self._seen[stage] = kept * self._seen[stage] + images
        self._gone_on[stage] = kept * self._gone_on[stage] + going_on
        self._remaining.clear()
        self._paths.clear()

    def run_s(self, stage: int, images: int) -> float:
        """What a run takes for one of so many images that come together: of more than a full batch, a full one."""
        return self.curves[stage].seconds(min(images, self.batch_sizes[stage]))

    def fixed_s(self, stage: int) -> float:
        """The part of a run that does not depend on its size."""
        return self._at_load[stage].fixed_s

    def remaining_s(self, way: Way) -> list[float]:
        """What an image costs an instance from each stage on, in full batches and as images have gone on lately."""
        if (known := self._remaining.get(way)) is not None:
            return known
        costs = [0.0] * len(self.curves)
        for stage in reversed(range(len(self.curves))):
            full = self.batch_sizes[stage]
            costs[stage] = self.run_s(stage, full) / full
            if (after := way.after[stage]) is not None:
                costs[stage] += self._going_on(stage, way) * costs[after]
        self._remaining[way] = costs
        return costs

    def path_s(self, way: Way, images: int) -> float:
        """How long an image is computed on its way, in batches of so many, or in full ones that have fewer."""
        if (known := self._paths.get((way, images))) is not None:
            return known
        total, reaching, stage = 0.0, 1.0, way.first
        while True:
            total += reaching * self.run_s(stage, images)
            if (after := way.after[stage]) is None:
                break
            reaching *= self._going_on(stage, way)
            stage = after
        self._paths[way, images] = total
        return total

    def _going_on(self, stage: int, way: Way) -> float:
        return 1.0 if way.nobody_leaves[stage] else self._gone_on[stage] / self._seen[stage]


def _batch_size(curve: CostCurve, most: int) -> int:
    """The smallest one in which an image costs hardly more than in a full one, or a larger one where a run is quick anyway."""
    if not curve.per_image_s:
        return most
    around_s = curve.fixed_s + AROUND_S
    enough = around_s / (ENOUGH * (curve.per_image_s + around_s / most) - curve.per_image_s)
    quick = (QUICK_S - curve.fixed_s) / curve.per_image_s
    return min(most, max(math.ceil(enough), math.floor(quick)))
