"""The Vision Transformer: shapes, the paper's formulas, and where gradients must reach."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models.vit import Attention, Block, ConvLayer, ConvStem, Embedding, Head, PatchEmbed, StemLayer, ViTConfig

CONFIG = ViTConfig(image_size=32, patch_size=8, width=48, depth=2, num_heads=3, num_classes=7)


def test_attention_follows_the_formula() -> None:
    """softmax(q k^T / sqrt(d)) v per head, written out by loops."""
    torch.manual_seed(0)
    attention = Attention(replace(CONFIG, width=12, num_heads=3))
    x = torch.randn(2, 5, 12)
    q, k, v = attention.qkv(x).split(12, dim=-1)

    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)).softmax(dim=-1)
        heads.append(weights @ v[..., part])
    expected = attention.proj(torch.cat(heads, dim=-1))

    torch.testing.assert_close(attention(x)[0], expected)


def test_width_that_heads_do_not_divide_is_refused() -> None:
    """A silent remainder would drop features."""
    with pytest.raises(ValueError, match="width 10 cannot be split into 3 heads"):
        Attention(replace(CONFIG, width=10, num_heads=3))


def test_block_is_two_residual_branches() -> None:
    """With both branches' last layers at zero a block passes its input through."""
    block = Block(CONFIG)
    for layer in (block.attn.proj, block.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x = torch.randn(2, CONFIG.num_tokens, CONFIG.width)

    torch.testing.assert_close(block(x)[0], x)


def test_patch_embedding_sees_each_patch_alone() -> None:
    """Changing one patch changes its own token and no other."""
    embed = PatchEmbed(CONFIG)
    image = torch.randn(1, 3, 32, 32)
    changed = image.clone()
    changed[:, :, 8:16, 0:8] += 1  # row 1, column 0 of 4 x 4 patches

    differs = (embed(image) - embed(changed)).abs().sum(-1)[0] > 0

    assert differs.nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize(("patch_size", "tokens"), [(2, 256), (4, 64), (8, 16)])
def test_conv_stem_gives_one_token_per_patch(patch_size: int, tokens: int) -> None:
    """Its pools multiply to the patch size."""
    halvings = patch_size.bit_length() - 1
    stem = (StemLayer(16), *[StemLayer(64, pool=2)] * halvings)
    config = ViTConfig(32, patch_size, 64, 2, 4, 10, stem=stem, pooling="mean")

    assert (1, tokens, 64) == tuple(ConvStem(config).eval()(torch.zeros(1, 3, 32, 32)).shape)
    assert tokens == config.num_tokens


@pytest.mark.parametrize(("channels", "pool"), [(48, 2), (64, 4)])
def test_conv_stem_that_does_not_lead_to_the_blocks_is_refused(channels: int, pool: int) -> None:
    """Its last channels are the width, its pools multiply to the patch size."""
    with pytest.raises(ValueError, match="must end at 64 channels, and its pools multiply to 4"):
        ViTConfig(32, 4, 64, 2, 4, 10, stem=(StemLayer(32, pool=2), StemLayer(channels, pool)))


def test_layers_of_a_stem_that_cannot_be_are_refused() -> None:
    """What is added must be alike, and a kernel has a middle."""
    for layer, reason in (
        (StemLayer(64, residual=True), "is added to what it gets: 32 channels, of the same size"),
        (StemLayer(32, pool=2, residual=True), "is added to what it gets"),
        (StemLayer(32, side=2), "kernels have odd sides"),
    ):
        with pytest.raises(ValueError, match=reason):
            ViTConfig(32, 4, 64, 2, 4, 10, stem=(StemLayer(32), layer, StemLayer(64, pool=4 // layer.pool)))


def test_a_layer_of_a_stem_is_what_it_says() -> None:
    """Convolution, largest of each window, batch norm, ReLU; added to what goes in where it is residual."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, 8)
    pooled, residual = ConvLayer(6, StemLayer(5, pool=2)).eval(), ConvLayer(6, StemLayer(6, residual=True, side=1)).eval()

    windows = torch.nn.functional.conv2d(x, pooled.conv.weight, padding=1).unfold(2, 2, 2).unfold(3, 2, 2)
    torch.testing.assert_close(pooled(x), (windows.amax(dim=(4, 5)) / (1 + pooled.norm.eps) ** 0.5).clamp(min=0))
    mixed = torch.einsum("bihw,oi->bohw", x, residual.conv.weight[:, :, 0, 0])
    torch.testing.assert_close(residual(x), x + (mixed / (1 + residual.norm.eps) ** 0.5).clamp(min=0))
    assert not pooled.norm.weight.requires_grad


def test_class_token_comes_first_and_only_where_the_head_uses_it() -> None:
    """`cls` pooling adds a token in front, `mean` pooling adds none."""
    torch.manual_seed(0)
    embedding = Embedding(CONFIG)
    assert embedding.cls_token is not None
    torch.nn.init.constant_(embedding.cls_token, 3.0)

    tokens = embedding(torch.randn(2, 3, 32, 32))

    assert tuple(tokens.shape) == (2, 17, 48)
    torch.testing.assert_close(tokens[:, 0], (embedding.cls_token + embedding.pos_embed[:, :1])[:, 0].expand(2, -1))
    mean = ViTConfig(32, 8, 48, 2, 3, 7, pooling="mean")
    assert tuple(Embedding(mean)(torch.randn(2, 3, 32, 32)).shape) == (2, 16, 48)


def test_head_pools_after_the_norm() -> None:
    """`cls` looks at token 0 alone, `mean` at all."""
    x = torch.randn(2, CONFIG.num_tokens, CONFIG.width)
    head = Head(CONFIG)
    torch.testing.assert_close(head(x), head.fc(head.norm(x)[:, 0]))
    mean = Head(ViTConfig(32, 8, 48, 2, 3, 7, pooling="mean"))
    torch.testing.assert_close(mean(x), mean.fc(mean.norm(x).mean(1)))


def test_sizes_that_do_not_go_together_are_refused() -> None:
    """Class attention without blocks, blocks without it, and heads that have no weights to talk about."""
    for more, words in (
        ({"pooling": "class_attention"}, "class_depth 0 does not go with class_attention"),
        ({"class_depth": 2}, "class_depth 2 does not go with"),
        ({"talking_heads": True, "attention": "performer", "attention_rank": 4}, "performer attention has no weights"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(CONFIG, **more)
