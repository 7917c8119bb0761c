"""A schedule of token reduction found for one network: where tokens less cost least.

Candidates are windows of blocks, every one, every second or every third, that all remove as many tokens, or all the same share
of those that are left, just enough to leave the multiply-adds that were asked for; the one that changes the network's own
answer least is taken. A greedy choice, block by block, changed it more: what a first step costs says little of what many do
together (docs/adr/0012).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from app.types import Array
from exporters.calibration import spread
from exporters.config import SearchConfig
from exporters.progress import SILENT, Progress
from exporters.reduction_schedule import (
    ReductionSchedule,
    ScheduleError,
    Wish,
    apply_schedule,
    check_method,
    clear_schedule,
    wish_of,
)
from exporters.schedule_threshold import schedule_by_threshold
from exporters.staging import stage_specs
from exporters.validation import normalised
from models.manifest import PreprocessSpec
from models.multi_exit import MultiExitViT

DISTANCES = (1, 2, 3)  # between blocks that remove tokens


def find_schedule(
    model: MultiExitViT, pixels: Array, spec: PreprocessSpec, wish: Wish, config: SearchConfig, progress: Progress = SILENT
) -> ReductionSchedule:
    """By whichever way the wish asks for; see `search_schedule` and `exporters.schedule_threshold`."""
    find = search_schedule if wish.kind == "share" else schedule_by_threshold
    return find(model, pixels, spec, wish.method, wish.amount, config, progress)


def schedule_of(
    model: MultiExitViT, text: str, pixels: Array, spec: PreprocessSpec, config: SearchConfig, progress: Progress = SILENT
) -> ReductionSchedule:
    """What the text says outright, or what it wishes for, found on these images; not applied.

    Raises:
        ScheduleError: it cannot be read, or the network cannot follow it.
    """
    wish = wish_of(text)
    if wish is None:
        return ReductionSchedule.parse(text, model.config.depth, model.config.num_patches)
    schedule = find_schedule(model, pixels, spec, wish, config, progress)
    progress.step(f"token reduction {schedule}")
    return schedule


def search_schedule(
    model: MultiExitViT,
    pixels: Array,
    spec: PreprocessSpec,
    method: str,
    share: float,
    config: SearchConfig,
    progress: Progress = SILENT,
) -> ReductionSchedule:
    """The schedule, which is not applied; the network is left as it came, without any.

    Args:
        pixels: (N, ...), what stage 0 takes; labels are not needed.
        share: of the multiply-adds that are to be left, in 0 .. 1.

    Raises:
        ScheduleError: the method cannot work in this network, or not go so far.
    """
    chosen = normalised(pixels[spread(len(pixels), config.num_images)], spec)
    check_method(model, method)
    candidates, lowest = _candidates(model, spec, method, share)
    if not candidates:
        raise ScheduleError(f"{method} leaves {100 * lowest:.0f} % of the multiply-adds at least, not {100 * share:.0f} %")
    few = chosen[spread(len(chosen), config.first_images)]
    changes = _changes(model, candidates, few, progress)
    kept = sorted(candidates, key=changes.__getitem__)[: math.ceil(config.kept * len(candidates))]
    changes = _changes(model, kept, chosen, progress)
    # Each reduction takes time besides: the fewest of those that are as good as the best.
    bound = (1 + config.tolerance) * min(changes.values())
    good = [schedule for schedule in kept if changes[schedule] <= bound]
    return min(good, key=lambda schedule: (sum(amount > 0 for amount in schedule.removed), changes[schedule]))


def _changes(
    model: MultiExitViT, schedules: Sequence[ReductionSchedule], pixels: Tensor, progress: Progress
) -> dict[ReductionSchedule, float]:
    """How much each changes the answers."""
    reference, changes = _log_probabilities(model, pixels), {}
    try:
        for schedule in progress.track(schedules, f"searching a schedule on {len(pixels)} images"):
            apply_schedule(model, schedule)
            changes[schedule] = _change(reference, _log_probabilities(model, pixels))
            clear_schedule(model)
    finally:
        clear_schedule(model)
    return changes


def _candidates(model: MultiExitViT, spec: PreprocessSpec, method: str, share: float) -> tuple[list[ReductionSchedule], float]:
    """Schedules that leave at most this share of the multiply-adds, but hardly less, and the least share that any leaves."""
    full = _gmacs(model, spec)

    def left(removed: list[int]) -> float | None:
        """The share of the multiply-adds; None where a block has not so many tokens to give."""
        try:
            apply_schedule(model, ReductionSchedule(method, tuple(removed), up_to=True))
            return _gmacs(model, spec) / full
        except ScheduleError:
            return None
        finally:
            clear_schedule(model)

    depth, num_patches, found, lowest = model.config.depth, model.config.num_patches, {}, 1.0
    for blocks, shape in itertools.product(dict.fromkeys(_windows(depth)), (_as_many, _as_large_a_share)):
        low, high = 0, num_patches  # tokens the first block removes: too few, and enough or impossible
        while high - low > 1:
            middle = (low + high) // 2
            reached = left(shape(blocks, middle, depth, num_patches))
            lowest = min(lowest, reached or 1.0)
            low, high = (middle, high) if reached is not None and reached > share else (low, middle)
        removed = shape(blocks, high, depth, num_patches)
        reached = left(removed)
        if reached is None or reached > share:
            continue
        for number in reversed(blocks):  # what is a little too much is given back
            fewer = [amount - (n == number) for n, amount in enumerate(removed)]
            reached = left(fewer) if min(fewer) >= 0 else None
            removed = fewer if reached is not None and reached <= share else removed
        found[ReductionSchedule(method, tuple(removed), up_to=True).settled(num_patches)] = True
    return [*found], lowest


def _as_many(blocks: tuple[int, ...], first: int, depth: int, num_patches: int) -> list[int]:
    """Tokens each block of the network removes: every one of these as many as the first."""
    return [first * (number in blocks) for number in range(depth)]


def _as_large_a_share(blocks: tuple[int, ...], first: int, depth: int, num_patches: int) -> list[int]:
    """The same, every one of these the share of the tokens it is given that the first takes of all."""
    removed, count = [0] * depth, num_patches
    for number in blocks:
        removed[number] = count * first // num_patches
        count -= removed[number]
    return removed


def _windows(depth: int) -> Iterator[tuple[int, ...]]:
    """The blocks that remove tokens."""
    for distance in DISTANCES:
        for first in range(depth):
            blocks = tuple(range(first, depth, distance))
            for number in range(len(blocks)):
                yield blocks[: number + 1]


@torch.no_grad()
def _log_probabilities(model: MultiExitViT, pixels: Tensor) -> Tensor:
    return torch.cat([F.log_softmax(model(part)[-1], dim=1) for part in torch.split(pixels, 32)])


def _change(reference: Tensor, now: Tensor) -> float:
    """Kullback-Leibler divergence from the answer without reduction, nats an image."""
    return float(F.kl_div(now, reference, reduction="batchmean", log_target=True))


def _gmacs(model: MultiExitViT, spec: PreprocessSpec) -> float:
    return sum(stage.gmacs for stage in stage_specs(model, spec))
