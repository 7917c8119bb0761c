"""One threshold for all blocks becomes a count per block: as many as are below it in nine of ten images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters.config import SearchConfig
from exporters.reduction_schedule import ReductionSchedule, ScheduleError, apply_schedule
from exporters.schedule_threshold import schedule_by_threshold
from exporters.validation import normalised
from models.multi_exit import MultiExitViT
from models.token_reduction import METHODS
from models.vit import ViTConfig
from models.zoo import ZOO, create_model
from tests.images import plain_patches

SPEC = ZOO["test_vit"].preprocess
CONFIG = SearchConfig(num_images=20, covered=0.9)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Patches of plain colours."""
    return plain_patches(20)


@pytest.fixture
def model() -> MultiExitViT:
    """Attention that prefers some patches."""
    torch.manual_seed(0)
    found = create_model("test_vit").eval()
    for stage in found.stages:
        for block in stage.blocks:
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.25)
    return found


def attention_by_hand(model: MultiExitViT, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (B, heads, N, N), mean keys (B, N, d) and tokens behind attention of the first block."""
    block = model.stages[0].blocks[0]
    with torch.no_grad():
        tokens = model.stages[0].embedding(normalised(pixels, SPEC))
        q, k, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / 4).softmax(-1)
        behind = tokens + block.attn(block.norm1(tokens), None)[0]
    return weights.numpy(), k.mean(dim=1).numpy(), behind.numpy()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_first_block_gives_what_nine_of_ten_images_can_spare(method: str, model: MultiExitViT, pixels: np.ndarray) -> None:
    """Counted image by image, token by token."""
    weights, keys, tokens = attention_by_hand(model, pixels)
    threshold = 0.85 if method == "tome" else 0.95
    spare = []
    for image in range(len(pixels)):
        if method == "tome":
            unit = [key / np.linalg.norm(key) for key in keys[image, 1:]]
            nearest = [max(float(odd @ even) for even in unit[::2]) for odd in unit[1::2]]
            spare.append(sum(cosine > threshold for cosine in nearest))
            continue
        if method == "top_k_norm":
            scores = [float(np.linalg.norm(token)) for token in tokens[image, 1:]]
        elif method == "token_pooling":
            scores = [float(weights[image, :, :, column].mean()) for column in range(1, 17)]
        else:
            scores = [float(weights[image, :, 0, column].mean()) for column in range(1, 17)]
        spare.append(sum(score < threshold * sum(scores) / 16 for score in scores))
    in_nine_of_ten = sorted(spare)[2]  # 18 of 20 have no less

    schedule = schedule_by_threshold(model, pixels, SPEC, method, threshold, CONFIG)

    in_nine_of_ten = min(in_nine_of_ten, 8) if method == "mctf" else in_nine_of_ten  # half, the most there is to merge
    assert schedule.removed[0] == max(0, in_nine_of_ten - (method == "evit"))
    assert len(set(spare)) > 1
    assert schedule.removed[-1] == 0  # only the head is behind the last block, and it sees the class token
    assert sum(schedule.removed) > 0
    assert all(block.reduction is None for stage in model.stages for block in stage.blocks)
    apply_schedule(model, schedule)


def test_later_blocks_see_what_earlier_ones_left(model: MultiExitViT, pixels: np.ndarray) -> None:
    """Nothing goes where the threshold is out of reach, and a patch is left where everything is below it."""
    assert schedule_by_threshold(model, pixels, SPEC, "tome", 1.01, CONFIG).removed == (0,) * 6
    assert schedule_by_threshold(model, pixels, SPEC, "top_k_norm", 1e-6, CONFIG).removed == (0,) * 6
    assert schedule_by_threshold(model, pixels, SPEC, "top_k_norm", 1e6, CONFIG).removed == (15, 0, 0, 0, 0, 0)
    assert schedule_by_threshold(model, pixels, SPEC, "tome", 1e-6, CONFIG).removed[0] == 8  # half, the most there is to merge


def test_a_method_that_cannot_work_here_is_refused(pixels: np.ndarray) -> None:
    """There is no class token to score by."""
    network = MultiExitViT(ViTConfig(32, 8, 32, 2, 4, 5, mlp_ratio=2.0, pooling="mean"), (2,)).eval()
    with pytest.raises(ScheduleError, match="no class token"):
        schedule_by_threshold(network, pixels, SPEC, "evit", 0.5, CONFIG)
    assert isinstance(schedule_by_threshold(network, pixels, SPEC, "tome", 0.5, CONFIG), ReductionSchedule)
