"""Which token reduction, in which block, how strong: from a short text to every block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from models.learned_pruning import LearnedPruning, TokenPredictor
from models.multi_exit import MultiExitViT
from models.slow_fast import EVO_VIT, SlowFast
from models.token_reduction import MERGES_PAIRS, METHODS, TokenReduction
from models.vit import Block

LEARNED = "dynamicvit"  # its predictors are trained with the network (`models.learned_pruning`)


class ScheduleError(ValueError):
    """A schedule that cannot be read, or that the network cannot follow."""


@dataclass(frozen=True, slots=True)
class ReductionSchedule:
    """A method, and how many tokens each block removes, from the first on.

    With `evo_vit`, how many patches each block does not compute: they are all there again in the next.
    `up_to`: merging takes at most half of the tokens at once; a block that cannot give so many gives what it can.
    """

    method: str
    removed: tuple[int, ...]
    up_to: bool = False

    @classmethod
    def parse(cls, text: str, depth: int, num_patches: int) -> ReductionSchedule:
        """`METHOD:R` in every block, `METHOD:RxN` in the last N, `METHOD:R,R,…` block by block, `METHOD:0.7@4,7,10`.

        The last keeps that share of the patches in the 4th, 7th and 10th block, as EViT, DynamicViT and IA-RED2 do.

        Raises:
            ScheduleError: it is none of these, or of another depth.
        """
        method, _, amounts = text.partition(":")
        if method not in (known := (*METHODS, LEARNED, EVO_VIT)):
            raise ScheduleError(f"no token reduction called {method!r}; there are {', '.join(known)}")
        try:
            if "@" in amounts:
                removed = _at_blocks(method, amounts, depth, num_patches)
            elif "x" in amounts:
                amount, last = (int(part) for part in amounts.split("x"))
                removed = (0,) * (depth - last) + (amount,) * last
            else:
                removed = tuple(int(part) for part in amounts.split(","))
                removed = removed * depth if len(removed) == 1 else removed
            by_block = "," in amounts or "@" in amounts
        except ValueError as error:
            raise ScheduleError(
                f"{text!r} is no schedule: say METHOD:13, METHOD:20x9, METHOD:0,0,8,…, METHOD:0.7@4,7,10, METHOD:55% or "
                "METHOD:>0.3"
            ) from error
        if len(removed) != depth or min(removed) < 0:
            raise ScheduleError(f"{text!r} is no schedule for {depth} blocks")
        return cls(method, removed, up_to=not by_block)

    def settled(self, num_patches: int) -> ReductionSchedule:
        """With what each block really gives."""
        removed, count = [], num_patches
        for asked in self.removed:
            removed.append(min(asked, count // 2) if self.method in MERGES_PAIRS and self.up_to else asked)
            count -= removed[-1]
        return ReductionSchedule(self.method, tuple(removed))

    def __str__(self) -> str:
        return f"{self.method}:{','.join(map(str, self.removed))}"


@dataclass(frozen=True, slots=True)
class Wish:
    """A schedule that is said by what it is to reach: it has to be found for one network, with images.

    kind: "share", of the multiply-adds that are to be left, in 0 .. 1; or "threshold", below which a token goes: of its
    importance over the mean of all patches, and for tome the likeness (cosine) above which a pair is merged.
    """

    method: str
    kind: Literal["share", "threshold"]
    amount: float


def wish_of(text: str) -> Wish | None:
    """What `METHOD:55%` or `METHOD:>0.3` wishes for; None of a schedule that is said outright.

    Raises:
        ScheduleError: no known method, no number, or one that means nothing.
    """
    method, _, amount = text.partition(":")
    if not amount.endswith("%") and not amount.startswith(">"):
        return None
    if method in (LEARNED, EVO_VIT):
        raise ScheduleError(f"{method} is not searched for: say {method}:0.7@4,7,10")
    if method not in METHODS:
        raise ScheduleError(f"no token reduction called {method!r}; there are {', '.join(METHODS)}")
    try:
        number = float(amount.strip("%>"))
    except ValueError as error:
        raise ScheduleError(f"{amount!r} is no number: say METHOD:55% or METHOD:>0.3") from error
    if amount.startswith(">"):
        if not 0 < number < math.inf:
            raise ScheduleError(f"{text!r}: a threshold is above 0")
        return Wish(method, "threshold", number)
    if not 0 < number < 100:
        raise ScheduleError(f"{text!r}: shares are between 0 and 100 %")
    return Wish(method, "share", number / 100)


def _at_blocks(method: str, amounts: str, depth: int, num_patches: int) -> tuple[int, ...]:
    share, _, numbers = amounts.partition("@")
    removed, count = [0] * depth, num_patches
    blocks = sorted(int(part) for part in numbers.split(","))
    if len(set(blocks)) != len(blocks) or not 0 < float(share) <= 1:
        raise ValueError(amounts)
    for number in blocks:
        if not 1 <= number <= depth:
            raise ValueError(amounts)
        if method == EVO_VIT:  # of all patches, in each of the blocks
            removed[number - 1] = num_patches - math.ceil(float(share) * num_patches)
            continue
        if method == LEARNED:  # of all patches each time, rounded down
            kept = int(num_patches * float(share) ** (1 + blocks.index(number)))
        else:  # EViT keeps the share, and one token more in which the others are fused.
            kept = min(count, math.ceil(float(share) * count) + (method == "evit"))
        removed[number - 1], count = count - kept, kept
    return tuple(removed)


def check_method(model: MultiExitViT, method: str) -> None:
    """Whether a method can work in a network at all.

    Raises:
        ScheduleError: and why not.
    """
    try:
        apply_schedule(model, ReductionSchedule(method, (0,) * (model.config.depth - 1) + (1,)))
    finally:
        clear_schedule(model)


def clear_schedule(model: MultiExitViT) -> None:
    """All tokens in every block."""
    for stage in model.stages:
        for block in stage.blocks:  # type: ignore[union-attr]  # ModuleLists
            if isinstance(block, Block):
                block.reduction = block.pruning = block.slow_fast = None


def apply_schedule(model: MultiExitViT, schedule: ReductionSchedule) -> None:
    """Give every block that removes tokens its reduction.

    Raises:
        ScheduleError: a block would be left with too few, or the method cannot work in this network.
    """
    if model.config.attention != "softmax":
        raise ScheduleError(f"token reduction needs softmax attention, and the network has {model.config.attention}")
    if schedule.method == EVO_VIT:
        _apply_slow_fast(model, schedule)
        return
    count, num_prefix = model.config.num_patches, model.config.num_prefix_tokens
    merges = schedule.method in MERGES_PAIRS
    blocks = [block for stage in model.stages for block in stage.blocks]  # type: ignore[union-attr]  # ModuleLists
    asking = sum(amount > 0 for amount in schedule.removed)
    if schedule.method == LEARNED and asking != len(model.predictors):
        raise ScheduleError(f"{schedule} asks for {asking} trained predictors, and the checkpoint has {len(model.predictors)}")
    predictors = iter(model.predictors)
    settled = schedule.settled(model.config.num_patches)
    for number, (block, amount) in enumerate(zip(blocks, settled.removed, strict=True)):
        if not amount:
            continue
        if not isinstance(block, Block):
            raise ScheduleError(f"block {number} is a {type(block).__name__}")
        if merges and amount > count // 2:
            raise ScheduleError(
                f"block {number} has {count} patch tokens, of which at most {count // 2} can be merged, not {amount}"
            )
        if schedule.method == LEARNED:
            block.pruning = _pruning(next(predictors), count - amount, num_prefix, number)
            count -= amount
            continue
        try:
            block.reduction = TokenReduction(schedule.method, count - amount, num_prefix)
        except ValueError as error:
            raise ScheduleError(f"block {number}: {error}") from error
        count -= amount


def _apply_slow_fast(model: MultiExitViT, schedule: ReductionSchedule) -> None:
    """Every block from the one before the first that leaves patches out, which has to note how important each is."""
    first = next((number for number, amount in enumerate(schedule.removed) if amount), None)
    if first == 0:
        raise ScheduleError(f"{EVO_VIT} needs a block before the first that leaves patches out, to see which matter")
    for number, block in enumerate(block for stage in model.stages for block in stage.blocks):  # type: ignore[union-attr]
        if first is None or number < first - 1:
            continue
        if not isinstance(block, Block):
            raise ScheduleError(f"block {number} is a {type(block).__name__}")
        left_out = schedule.removed[number]
        try:
            computed = model.config.num_patches - left_out if left_out else None
            block.slow_fast = SlowFast(computed, model.config.num_prefix_tokens)
        except ValueError as error:
            raise ScheduleError(f"block {number}: {error}") from error


def _pruning(predictor: nn.Module, keep: int, num_prefix: int, number: int) -> LearnedPruning:
    if not isinstance(predictor, TokenPredictor):
        raise ScheduleError(f"a predictor is a {type(predictor).__name__}")
    if keep < 1:
        raise ScheduleError(f"block {number}: {keep} patch tokens cannot be left")
    return LearnedPruning(predictor, keep, num_prefix)
