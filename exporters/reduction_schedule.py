"""Which token reduction, in which block, how strong: from a short text to every block."""

from __future__ import annotations

from dataclasses import dataclass

from models.multi_exit import MultiExitViT
from models.token_reduction import METHODS, TokenReduction
from models.vit import Block


class ScheduleError(ValueError):
    """A schedule that cannot be read, or that the network cannot follow."""


@dataclass(frozen=True, slots=True)
class ReductionSchedule:
    """A method, and how many tokens each block removes, from the first on.

    `up_to`: merging takes at most half of the tokens at once; a block that cannot give so many gives what it can.
    """

    method: str
    removed: tuple[int, ...]
    up_to: bool = False

    @classmethod
    def parse(cls, text: str, depth: int) -> ReductionSchedule:
        """`METHOD:R` in every block, `METHOD:RxN` in the last N, or `METHOD:R,R,…` block by block.

        Raises:
            ScheduleError: it is none of these, or of another depth.
        """
        method, _, amounts = text.partition(":")
        if method not in METHODS:
            raise ScheduleError(f"no token reduction called {method!r}; there are {', '.join(METHODS)}")
        try:
            if "x" in amounts:
                amount, last = (int(part) for part in amounts.split("x"))
                removed = (0,) * (depth - last) + (amount,) * last
            else:
                removed = tuple(int(part) for part in amounts.split(","))
                removed = removed * depth if len(removed) == 1 else removed
            by_block = "," in amounts
        except ValueError as error:
            raise ScheduleError(f"{text!r} is no schedule: say METHOD:13, METHOD:20x9 or METHOD:0,0,8,…") from error
        if len(removed) != depth or min(removed) < 0:
            raise ScheduleError(f"{text!r} is no schedule for {depth} blocks")
        return cls(method, removed, up_to=not by_block)

    def __str__(self) -> str:
        return f"{self.method}:{','.join(map(str, self.removed))}"


def apply_schedule(model: MultiExitViT, schedule: ReductionSchedule) -> None:
    """Give every block that removes tokens its reduction.

    Raises:
        ScheduleError: a block would be left with too few, or the method cannot work in this network.
    """
    count, num_prefix = model.config.num_patches, model.config.num_prefix_tokens
    merges = schedule.method == "tome"
    blocks = [block for stage in model.stages for block in stage.blocks]  # type: ignore[union-attr]  # ModuleLists
    for number, (block, asked) in enumerate(zip(blocks, schedule.removed, strict=True)):
        amount = min(asked, count // 2) if merges and schedule.up_to else asked
        if not amount:
            continue
        if not isinstance(block, Block):
            raise ScheduleError(f"block {number} is a {type(block).__name__}")
        if merges and amount > count // 2:
            raise ScheduleError(
                f"block {number} has {count} patch tokens, of which at most {count // 2} can be merged, not {amount}"
            )
        try:
            block.reduction = TokenReduction(schedule.method, count - amount, num_prefix)
        except ValueError as error:
            raise ScheduleError(f"block {number}: {error}") from error
        count -= amount
