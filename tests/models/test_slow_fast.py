"""Slow and fast tokens against a plain loop written from the paper, patch by patch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.slow_fast import SlowFast
from models.vit import Block, ViTConfig

BATCH, PREFIX, PATCHES, WIDTH = 2, 2, 9, 8
CONFIG = ViTConfig(
    image_size=12, patch_size=4, width=WIDTH, depth=1, num_heads=2, num_classes=3, mlp_ratio=2.0, pooling="cls_dist"
)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    found = Block(CONFIG).eval()
    torch.nn.init.normal_(found.attn.qkv.weight, std=0.5)
    return found


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, PREFIX + PATCHES, WIDTH, generator=torch.Generator().manual_seed(1))


def whole(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A block on the tokens of one image (N, D), and how much the first looks at each, (N,)."""
    x = tokens.unsqueeze(0)
    gathered, weights, _ = block.attn(block.norm1(x))
    assert weights is not None
    x = x + gathered
    return (x + block.mlp(block.norm2(x)))[0], weights[0, :, 0].mean(dim=0)


@torch.no_grad()
def test_patches_that_matter_are_computed_and_the_others_follow(block: Block, x: Tensor) -> None:
    """Equations of section 3.2 and 3.3: two blocks after one that notes the importance."""
    watching, computed = SlowFast(None, PREFIX), 4
    block.slow_fast = watching
    found, importance = block(x)
    block.slow_fast = SlowFast(computed, PREFIX)
    for _ in range(2):
        found, importance = block(found, importance)

    assert importance is not None
    assert tuple(found.shape) == tuple(x.shape)
    for image in range(BATCH):
        tokens, looked_at = whole(block, x[image])
        patches, noted = list(tokens[PREFIX:]), looked_at[PREFIX:].tolist()
        front = tokens[:PREFIX]
        for _ in range(2):
            order = sorted(range(PATCHES), key=lambda patch, noted=noted: -noted[patch])
            slow, fast = order[:computed], order[computed:]
            total = sum(noted[i] for i in fast)
            stands_for = sum((patches[i] * (noted[i] / total) for i in fast), torch.zeros(WIDTH))
            given = torch.stack([*front, *(patches[i] for i in slow), stands_for])
            after, looked_at = whole(block, given)
            front, step = after[:PREFIX], after[-1] - given[-1]
            for place, i in enumerate(slow):
                patches[i] = after[PREFIX + place]
                noted[i] = 0.5 * noted[i] + 0.5 * float(looked_at[PREFIX + place])
            for i in fast:
                patches[i] = patches[i] + step
        torch.testing.assert_close(found[image, :PREFIX], front, atol=1e-5, rtol=1e-4)
        mine = sorted(zip(importance[image].tolist(), found[image, PREFIX:].tolist(), strict=True))
        theirs = sorted(zip(noted, (patch.tolist() for patch in patches), strict=True))
        torch.testing.assert_close(
            torch.tensor([[a, *p] for a, p in mine]), torch.tensor([[a, *p] for a, p in theirs]), atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
def test_a_block_that_computes_all_goes_on_noting(block: Block, x: Tensor) -> None:
    """Tokens as without; the importance is the mean of what it was and what the class token looks at now."""
    block.slow_fast = SlowFast(None, PREFIX)
    before = torch.rand(BATCH, PATCHES, generator=torch.Generator().manual_seed(2))

    found, importance = block(x, before)

    for image in range(BATCH):
        tokens, looked_at = whole(block, x[image])
        torch.testing.assert_close(found[image], tokens, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(importance[image], (before[image] + looked_at[PREFIX:]) / 2)


def test_what_cannot_work_is_refused() -> None:
    """No class token that could look, no patch to compute."""
    with pytest.raises(ValueError, match="no class token"):
        SlowFast(4, 0)
    with pytest.raises(ValueError, match="0 patch tokens cannot"):
        SlowFast(0, 1)
