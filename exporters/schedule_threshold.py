"""A schedule from one threshold: each block lets go as many tokens as are below it in nine of ten images.

A-ViT (Yin et al., CVPR 2022) and LTMP (Bonnaerens and Dambre, TMLR 2023) compare each image's tokens with a threshold, so that
an easy image keeps fewer. Batches want one shape: here the threshold is turned into a count per block once, on images, and what
is adapted to is the block and not the image. Exits are there for easy images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from app.types import Array
from exporters.calibration import spread
from exporters.config import SearchConfig
from exporters.progress import SILENT, Progress
from exporters.reduction_schedule import ReductionSchedule, ScheduleError, check_method, clear_schedule
from exporters.staging import blocks_of, stages_of
from exporters.validation import normalised
from models.manifest import PreprocessSpec
from models.multi_exit import MultiExitViT
from models.token_reduction import MERGES_PAIRS, TokenReduction, likeness, relative_importance
from models.vit import Block

BATCH_SIZE = 32


@torch.no_grad()
def schedule_by_threshold(
    model: MultiExitViT,
    pixels: Array,
    spec: PreprocessSpec,
    method: str,
    threshold: float,
    config: SearchConfig,
    progress: Progress = SILENT,
) -> ReductionSchedule:
    """The schedule, which is not applied; the network is left as it came, without any.

    Args:
        pixels: (N, ...), what stage 0 takes; labels are not needed.
        threshold: see `exporters.reduction_schedule.Wish`.

    Raises:
        ScheduleError: the method cannot work in this network.
    """
    chosen = normalised(pixels[spread(len(pixels), config.num_images)], spec)
    check_method(model, method)
    stages, num_prefix = stages_of(model), model.config.num_prefix_tokens
    embedding = stages[0].embedding
    if embedding is None:
        raise ScheduleError("the first stage embeds no image")
    states: list[tuple[Tensor, Tensor | None]] = [(embedding(part), None) for part in torch.split(chosen, BATCH_SIZE)]
    removed: list[int] = []
    try:
        for block in progress.track([block for stage in stages for block in blocks_of(stage)], "fitting a schedule"):
            count = states[0][0].shape[1] - num_prefix
            spare = torch.cat([_spare(block, method, threshold, num_prefix, *state) for state in states])
            only_the_head_behind = num_prefix > 0 and len(removed) == model.config.depth - 1
            amount = 0 if only_the_head_behind else _amount(method, spare, count, config.covered)
            if amount:
                block.reduction = TokenReduction(method, count - amount, num_prefix)
            removed.append(amount)
            states = [block(*state) for state in states]
    finally:
        clear_schedule(model)
    return ReductionSchedule(method, tuple(removed))


def _spare(block: Block, method: str, threshold: float, num_prefix: int, x: Tensor, sizes: Tensor | None) -> Tensor:
    """How many patches each image could do without, (B,)."""
    gathered, weights, keys = block.attn(block.norm1(x), sizes)
    if method == "tome":
        return (likeness(keys[:, num_prefix:]) > threshold).sum(dim=1)
    patches = (x + gathered)[:, num_prefix:]
    return (relative_importance(method, patches, weights[..., num_prefix:]) < threshold).sum(dim=1)


def _amount(method: str, spare: Tensor, count: int, covered: float) -> int:
    """What goes in every image: no more than is spare in the share `covered` of them, and never all."""
    amount = int(spare.sort(descending=True).values[math.ceil(covered * len(spare)) - 1])
    if method == "evit":
        amount -= 1  # the others are fused into one
    return max(0, min(amount, count // 2 if method in MERGES_PAIRS else count - 1))
