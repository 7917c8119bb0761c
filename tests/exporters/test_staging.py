"""Costs of stages: counted by formula, checked against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from exporters.staging import stage_specs
from models.vit import Block
from models.zoo import ZOO, create_model


@pytest.mark.parametrize("name", sorted(ZOO))
def test_macs_are_those_that_pytorch_counts(name: str) -> None:
    """Half the floating-point operations of one image through each stage."""
    model, entry = create_model(name).eval(), ZOO[name]
    x = torch.zeros(1, 3, entry.config.image_size, entry.config.image_size)
    specs = stage_specs(model, entry.preprocess)
    for index, (stage, spec) in enumerate(zip(model.stages, specs, strict=True)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            before_last = x
            if stage.embedding is not None:
                before_last = stage.embedding(x)
            for block in stage.blocks[:-1]:
                before_last, _ = block(before_last)
            if index == len(specs) - 1 and entry.config.num_prefix_tokens:
                stage.head(prefix_of_block(stage.blocks[-1], before_last, entry.config.num_prefix_tokens))
            else:
                x, _ = stage.blocks[-1](before_last)
                stage.head(x)
        assert counter.get_total_flops() / 2 == pytest.approx(spec.gmacs * 1e9, rel=1e-6)


def prefix_of_block(block: Block, x: torch.Tensor, count: int) -> torch.Tensor:
    """A block's first tokens, without what only the others need; the same numbers as the block gives."""
    width, heads = x.shape[-1], block.attn.num_heads
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    normed = block.norm1(x)
    q = F.linear(normed[:, :count], weight[:width], bias[:width])
    k, v = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    mixed = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(dim=-1) @ v
    y = x[:, :count] + block.attn.proj(mixed.transpose(1, 2).flatten(2))
    return y + block.mlp(block.norm2(y))


def test_the_first_tokens_alone_are_those_of_the_whole_block() -> None:
    """The count above is of the right thing."""
    torch.manual_seed(0)
    block = create_model("test_vit").stages[0].blocks[0].eval()
    x = torch.randn(2, ZOO["test_vit"].config.num_tokens, ZOO["test_vit"].config.width)

    torch.testing.assert_close(prefix_of_block(block, x, 1), block(x)[0][:, :1])
