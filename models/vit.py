"""The Vision Transformer, readable from top to bottom.

Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021; pre-norm blocks, learned position embedding.
Departures, chosen by the configuration:

- `stem`: a few 3 x 3 convolutions instead of one large patch projection (Xiao et al., Early Convolutions Help Transformers
  See Better, NeurIPS 2021), with max pooling where they use strides. It learns faster from small images.
- `pooling="cls_dist"`: a distillation token beside the class token, a classifier on each and their mean as the answer (Touvron
  et al., DeiT, ICML 2021). Here it is one linear layer over both tokens, which is the same.
- `pooling="mean"`: the heads see the mean of the patch tokens and there is no class token (as in section D.3 of the paper).
- `pooling="class_attention"`: a class token appears only in the head, where it looks at the patches in blocks of its own; with
  `talking_heads` the heads of attention mix before and after the softmax (Touvron et al., CaiT, ICCV 2021; Shazeer et al.,
  Talking-Heads Attention, 2020).

Parameter names follow timm where both have the part, so that its checkpoints can be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from models.efficient_attention import GATHERS
from models.learned_pruning import LearnedPruning
from models.slow_fast import SlowFast
from models.token_reduction import TokenReduction

LAYER_NORM_EPS = 1e-6  # timm and the paper's code; torch's own default is 1e-5


@dataclass(frozen=True, slots=True)
class StemLayer:
    """A convolution, the largest value of each window behind it, batch norm and ReLU."""

    channels: int
    pool: int = 1  # side of the window; 1: none
    residual: bool = False  # what goes in is added to what comes out
    side: int = 3  # of the kernel


@dataclass(frozen=True, slots=True)
class ViTConfig:
    """Sizes of a Vision Transformer."""

    image_size: int  # pixels, square
    patch_size: int  # pixels per token side
    width: int  # D
    depth: int
    num_heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    pooling: Literal["cls", "cls_dist", "mean", "class_attention"] = "cls"
    class_depth: int = 0  # blocks of class attention in a head
    talking_heads: bool = False
    norm_eps: float = LAYER_NORM_EPS
    stem: tuple[StemLayer, ...] = ()  # none: one projection per patch
    attention: Literal["softmax", "linformer", "performer", "nystromformer"] = "softmax"
    attention_rank: int = 0  # of the last three: how many mixtures, features or landmarks
    num_predictors: int = 0  # of which patches are worth keeping, where they were trained with the network

    def __post_init__(self) -> None:
        if (self.pooling == "class_attention") != (self.class_depth > 0):
            raise ValueError(f"class_depth {self.class_depth} does not go with {self.pooling} pooling")
        if self.talking_heads and self.attention != "softmax":
            raise ValueError(f"{self.attention} attention has no weights that heads could talk about")
        if (self.attention == "softmax") != (self.attention_rank == 0):
            raise ValueError(f"attention_rank {self.attention_rank} does not go with {self.attention} attention")
        reduced = math.prod(layer.pool for layer in self.stem)
        if self.stem and (self.stem[-1].channels != self.width or reduced != self.patch_size):
            raise ValueError(
                f"the stem {self.stem} must end at {self.width} channels, and its pools multiply to {self.patch_size}"
            )
        for before, layer in pairwise((StemLayer(3), *self.stem)):
            if layer.residual and (layer.channels, layer.pool) != (before.channels, 1):
                raise ValueError(f"{layer} is added to what it gets: {before.channels} channels, of the same size")
            if layer.side % 2 == 0:
                raise ValueError(f"{layer} would change the size of what it gets: kernels have odd sides")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches, which the heads see: class, and distillation."""
        return {"cls": 1, "cls_dist": 2, "mean": 0, "class_attention": 0}[self.pooling]

    @property
    def num_tokens(self) -> int:
        """Patches, and the tokens in front of them."""
        return self.num_patches + self.num_prefix_tokens

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.width * self.mlp_ratio)


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) -> tokens (B, N, D) by one projection per patch."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class ConvLayer(nn.Module):
    """Features (B, C, h, w) -> (B, C', h / pool, w / pool), as `StemLayer` says.

    The window comes before the norm, which then has less to do (Page, How to Train Your ResNet, 2018). Where there is one, the
    norm's scale is not trained: while it is positive the norm can be folded into the convolution, since the largest stays the
    largest.
    """

    def __init__(self, in_channels: int, layer: StemLayer) -> None:
        super().__init__()
        self.pool, self.residual = layer.pool, layer.residual
        self.conv = nn.Conv2d(in_channels, layer.channels, layer.side, padding=layer.side // 2, bias=False)
        self.norm = nn.BatchNorm2d(layer.channels)
        self.norm.weight.requires_grad_(layer.pool == 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        if self.pool > 1:
            features = F.max_pool2d(features, self.pool)
        features = F.relu(self.norm(features))
        return x + features if self.residual else features


class ConvStem(nn.Module):
    """Image (B, 3, H, W) -> tokens (B, N, D) by convolutions."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        channels = (3, *(layer.channels for layer in config.stem))
        self.layers = nn.Sequential(*(ConvLayer(c, layer) for c, layer in zip(channels, config.stem, strict=False)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, num_heads = config.width, config.num_heads
        if width % num_heads:
            raise ValueError(f"width {width} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_l = nn.Linear(num_heads, num_heads) if config.talking_heads else None  # of logits, before the softmax
        self.proj_w = nn.Linear(num_heads, num_heads) if config.talking_heads else None  # of weights, behind it
        self.gather: nn.Module | None = None  # softmax attention, written out below
        if config.attention != "softmax":
            self.gather = GATHERS[config.attention](config.num_tokens, width // num_heads, config.attention_rank)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Attend.

        Args:
            x: (B, N, D).
            sizes: how many patches each token stands for, (B, N, 1): a token is looked at as if all of them were there
                (proportional attention: Bolya et al., Token Merging, ICLR 2023). None: one each.

        Returns:
            What was gathered (B, N, D), the weights (B, heads, N, N), None where the attention is no softmax over all
            tokens, and the keys' mean over the heads (B, N, d).
        """
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        if self.gather is not None:
            gathered = self.gather(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
            return self.proj(gathered), None, k.mean(dim=1)
        # Written out: at 64 tokens, forward and backward on a CPU in bf16, torch's fused kernel takes four times as long.
        weights = (q * (width // self.num_heads) ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
        if self.proj_l is not None:
            weights = _across_heads(self.proj_l, weights)
        if sizes is not None:
            weights = weights + sizes.log().transpose(1, 2).unsqueeze(1)
        weights = weights.softmax(dim=-1)
        mixed = weights if self.proj_w is None else _across_heads(self.proj_w, weights)  # may be negative: nothing to score by
        x = mixed @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width)), weights, k.mean(dim=1)


def _across_heads(linear: nn.Linear, weights: Tensor) -> Tensor:
    """(B, heads, N, N), each new head a mixture of all."""
    return linear(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class ClassAttention(nn.Module):
    """What a class token gathers from itself and the patches."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.width, config.width)
        self.k = nn.Linear(config.width, config.width)
        self.v = nn.Linear(config.width, config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, sizes: Tensor | None) -> Tensor:
        """Class token and patches (B, 1 + N, D), and how many patches each stands for (B, 1 + N, 1) -> (B, 1, D)."""
        q, k, v = (
            part(of).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, 1 or 1 + N, d)
            for part, of in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, 1, 1 + N)
        if sizes is not None:
            weights = weights + sizes.log().transpose(1, 2).unsqueeze(1)
        weights = weights.softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ClassBlock(nn.Module):
    """A block that changes the class token alone."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = ClassAttention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.hidden)

    def forward(self, token: Tensor, patches: Tensor, sizes: Tensor | None) -> Tensor:
        """Class token (B, 1, D), patches (B, N, D) and their sizes (B, N, 1) -> class token."""
        if sizes is not None:
            sizes = torch.cat([torch.ones_like(sizes[:, :1]), sizes], dim=1)
        token = token + self.attn(self.norm1(torch.cat([token, patches], dim=1)), sizes)
        return token + self.mlp(self.norm2(token))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    With fewer tokens before, by `pruning`, between, by `reduction`, or around both, by `slow_fast`.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.hidden)
        self.pruning: LearnedPruning | None = None  # its weights are the network's: set by whoever wants it
        self.reduction: TokenReduction | None = None  # no weights of its own: likewise
        self.slow_fast: SlowFast | None = None  # likewise, and instead of the others

    def forward(self, x: Tensor, carried: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, D) and what goes along with them -> the same, perhaps fewer tokens.

        Args:
            x: tokens.
            carried: how many patches each token stands for, (B, N, 1), None for one each; with `slow_fast` the importance of
                each patch, (B, M), None where no block has noted it yet.
        """
        if self.slow_fast is not None:
            return self._evolve(self.slow_fast, x, carried)
        sizes = carried
        if self.pruning is not None:
            x = self.pruning(x)
        gathered, weights, keys = self.attn(self.norm1(x), sizes)
        x = x + gathered
        if self.reduction is not None:
            if weights is None:
                raise ValueError("token reduction needs softmax attention")
            known = torch.ones_like(x[..., :1]) if sizes is None else sizes
            x, known = self.reduction(x, known, weights, keys)
            sizes = known if self.reduction.tracks_sizes else None
        return x + self.mlp(self.norm2(x)), sizes

    def _evolve(self, slow_fast: SlowFast, x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        before, rest, importance = slow_fast.split(x, importance)
        gathered, weights, _ = self.attn(self.norm1(before))
        if weights is None:
            raise ValueError("slow and fast tokens need softmax attention")
        after = before + gathered
        after = after + self.mlp(self.norm2(after))
        return slow_fast.join(before, after, rest, importance, weights)


class Embedding(nn.Module):
    """Image (B, 3, H, W), normalised -> tokens (B, N, D) with class token and positions."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_embed = ConvStem(config) if config.stem else PatchEmbed(config)
        prefix = config.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, prefix, config.width)) if prefix else None  # (1, P, D)
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, config.width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos_embed


class Head(nn.Module):
    """Tokens (B, N, D) and their sizes (B, N, 1), None for one each -> logits (B, C): norm, pool, linear."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_prefix_tokens = config.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_depth else None
        self.class_blocks = nn.ModuleList(ClassBlock(config) for _ in range(config.class_depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.fc = nn.Linear(config.width * max(1, self.num_prefix_tokens), config.num_classes)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        if self.cls_token is not None:
            token = self.cls_token.expand(len(x), -1, -1)
            for block in self.class_blocks:
                token = block(token, x, sizes)
            x = token
        x = self.norm(x)
        x = x[:, : self.num_prefix_tokens].flatten(1) if self.num_prefix_tokens else x.mean(dim=1)
        return self.fc(x)  # type: ignore[no-any-return]


def init_weights(module: nn.Module) -> None:
    """Truncated normal for linear layers, as the ViT line of papers does; use with `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
