"""A searched schedule saves what was asked for and changes the answer less than an even one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from exporters.config import SearchConfig
from exporters.reduction_schedule import ReductionSchedule, ScheduleError, apply_schedule, clear_schedule
from exporters.schedule_search import _as_large_a_share, _as_many, _candidates, search_schedule
from exporters.staging import stage_specs
from exporters.validation import normalised
from models.multi_exit import MultiExitViT
from models.zoo import ZOO, create_model
from tests.exporters.listener import Listener
from tests.images import plain_patches

SPEC = ZOO["test_vit"].preprocess
CONFIG = SearchConfig(num_images=24)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Patches of plain colours."""
    return plain_patches(24)


@pytest.fixture
def model() -> MultiExitViT:
    """Early blocks look at single patches: tokens are dear there and cheap behind."""
    torch.manual_seed(0)
    found = create_model("test_vit").eval()
    torch.nn.init.normal_(found.stages[-1].head.fc.weight, std=0.5)
    blocks = [block for stage in found.stages for block in stage.blocks]
    for number, block in enumerate(blocks):
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.4 if number < 3 else 0.02)
        torch.nn.init.normal_(block.attn.proj.weight, std=0.4 if number < 3 else 0.02)
    return found


def gmacs(model: MultiExitViT) -> float:
    """Of all stages."""
    return sum(stage.gmacs for stage in stage_specs(model, SPEC))


@torch.no_grad()
def change(model: MultiExitViT, pixels: np.ndarray, schedule: ReductionSchedule) -> tuple[float, float]:
    """Divergence from the answer without it, and the share of the multiply-adds."""
    clear_schedule(model)
    before, full = F.log_softmax(model(normalised(pixels, SPEC))[-1], dim=1), gmacs(model)
    apply_schedule(model, schedule)
    after, left = F.log_softmax(model(normalised(pixels, SPEC))[-1], dim=1), gmacs(model)
    clear_schedule(model)
    return float(F.kl_div(after, before, reduction="batchmean", log_target=True)), left / full


@pytest.mark.parametrize("method", ["tome", "top_k_attention"])
def test_it_saves_what_was_asked_for_and_costs_less_than_an_even_one(
    model: MultiExitViT, pixels: np.ndarray, method: str
) -> None:
    """Against the same method in every block, which saves no more."""
    said = Listener()
    found = search_schedule(model, pixels, SPEC, method, 0.75, CONFIG, said)

    assert all(block.reduction is None for stage in model.stages for block in stage.blocks)
    lost, share = change(model, pixels, found)
    even = next(r for r in range(1, 16) if change(model, pixels, ReductionSchedule(method, (r,) * 6, up_to=True))[1] <= 0.76)
    lost_evenly, even_share = change(model, pixels, ReductionSchedule(method, (even,) * 6, up_to=True))
    assert 0.65 < share <= 0.75
    assert lost < lost_evenly / 2, (str(found), even)
    assert even_share > 0.6


def test_far_fewer_tokens_are_reached_with_what_each_block_can_give(model: MultiExitViT, pixels: np.ndarray) -> None:
    """Merging takes half of a block's tokens at most; what is found says what each really gives."""
    found = search_schedule(model, pixels, SPEC, "tome", 0.4, CONFIG)

    assert change(model, pixels, found)[1] <= 0.4
    assert found.settled(16) == found  # no block is asked for more than half of what it has
    assert ReductionSchedule("tome", (8, 8, 8), up_to=True).settled(16) == ReductionSchedule("tome", (8, 4, 2))


def test_equally_many_and_equal_shares_of_what_is_left_are_tried(model: MultiExitViT, pixels: np.ndarray) -> None:
    """Of 16 patches a third each time; all that is tried saves what was asked for, and hardly more."""
    candidates, _ = _candidates(model, SPEC, "tome", 0.75)
    shares = [change(model, pixels, schedule)[1] for schedule in candidates]

    assert _as_many((1, 3), 4, 6, 16) == [0, 4, 0, 4, 0, 0]
    assert _as_large_a_share((1, 2, 4), 5, 6, 16) == [0, 5, 3, 0, 2, 0]
    assert any(len({*schedule.removed} - {0}) > 2 for schedule in candidates)
    assert all(0.65 < share <= 0.75 for share in shares)
    assert len({*candidates}) == len(candidates)


def test_a_method_that_cannot_work_is_told_by_its_reason(pixels: np.ndarray) -> None:
    """Not by how far it came."""
    with pytest.raises(ScheduleError, match="the network has no class token"):
        search_schedule(create_model("vit_cifar10").eval(), pixels, ZOO["vit_cifar10"].preprocess, "evit", 0.5, CONFIG)


def test_what_the_method_cannot_reach_is_told_and_the_network_is_as_it_was(model: MultiExitViT, pixels: np.ndarray) -> None:
    """Patches can go, the embedding and the heads stay."""
    with pytest.raises(ScheduleError, match=r"tome leaves \d+ % of the multiply-adds at least, not 3 %"):
        search_schedule(model, pixels, SPEC, "tome", 0.03, CONFIG)
    assert all(block.reduction is None for stage in model.stages for block in stage.blocks)
