"""A Vision Transformer out of a state dict under timm's names: what the readers of several formats have in common.

What is only another way of writing the same numbers is folded into the weights: LayerScale, a class token without position,
the two classifiers of distilled DeiT. DynamicViT's predictors come along where a checkpoint has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from models.multi_exit import MultiExitViT
from models.vit import LAYER_NORM_EPS, ViTConfig
from models.weights import WeightsError

# Heads by width, of the sizes that the papers name; others must be told.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
CAIT = "blocks_token_only.0.norm1.weight"  # a tensor that only class attention has
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
BLOCK_LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
CLASS_LAYERS = ("norm1", "attn.q", "attn.k", "attn.v", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
BLOCK_TENSORS = tuple(f"{layer}.{kind}" for layer in BLOCK_LAYERS for kind in ("weight", "bias"))


@dataclass(frozen=True, slots=True)
class Told:
    """What weights cannot say of themselves."""

    image_size: int  # pixels, square
    num_heads: int
    num_classes: int
    norm_eps: float = LAYER_NORM_EPS
    patch_size: int | None = None  # pixels; None: as it was trained


def width_of(state: dict[str, Tensor]) -> int:
    """The width of the network.

    Raises:
        WeightsError: this is no Vision Transformer.
    """
    if missing := [name for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight") if name not in state]:
        raise WeightsError(f"this is no Vision Transformer that is known: {', '.join(missing)} missing")
    return int(state["patch_embed.proj.weight"].shape[0])


def num_heads_of(state: dict[str, Tensor]) -> int | None:
    """Heads of attention, where the weights tell it: by what CaiT's heads say to each other, or by the papers' widths."""
    talking = state.get("blocks.0.attn.proj_l.weight")
    return HEADS.get(width_of(state)) if talking is None else len(talking)


def network_of(state: dict[str, Tensor], told: Told, boundaries: Sequence[int]) -> MultiExitViT:
    """Our network with these weights, in evaluation mode; heads of early exits are not fitted yet.

    Args:
        boundaries: numbers of blocks after which a stage ends; none: one stage.

    Raises:
        ValueError: the boundaries do not fit the depth.
        WeightsError: a tensor is missing, of another shape, or has no use: it would change the answer.
    """
    config = _config_of(state, told)
    model = MultiExitViT(config, tuple(boundaries) or (config.depth,))
    missing, unexpected = model.load_state_dict(_converted(state, config, model.boundaries), strict=False)
    last = f"stages.{len(model.stages) - 1}."
    if unexpected or any(".head." not in name or name.startswith(last) for name in missing):
        raise AssertionError(f"our own names are wrong: {missing}, {unexpected}")
    return model.eval()


def _config_of(state: dict[str, Tensor], told: Told) -> ViTConfig:
    width = width_of(state)
    pooling: Literal["cls", "cls_dist", "mean", "class_attention"]
    if CAIT in state:
        pooling = "class_attention"
    elif "dist_token" in state:
        pooling = "cls_dist"
    else:
        pooling = "cls" if "cls_token" in state and "fc_norm.weight" not in state else "mean"
    return ViTConfig(
        image_size=told.image_size,
        patch_size=told.patch_size or state["patch_embed.proj.weight"].shape[-1],
        width=width,
        depth=1 + max(int(match[1]) for name in state if (match := BLOCK.fullmatch(name))),
        num_heads=told.num_heads,
        num_classes=told.num_classes,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        pooling=pooling,
        class_depth=len({name.split(".")[1] for name in state if name.startswith("blocks_token_only.")}),
        talking_heads="blocks.0.attn.proj_l.weight" in state,
        norm_eps=told.norm_eps,
        num_predictors=len({name.split(".")[1] for name in state if name.startswith("score_predictor.")}),
    )


def _converted(state: dict[str, Tensor], config: ViTConfig, boundaries: Sequence[int]) -> dict[str, Tensor]:
    """The same numbers under our names. Every tensor must have a use: what is left over would change the answer."""
    left = dict(state)

    def take(name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        if name not in left:
            raise WeightsError(f"the checkpoint lacks {name}")
        value = left.pop(name).float()  # may be the caller's own: never changed in place
        if shape is not None and tuple(value.shape) != shape:
            raise WeightsError(f"{name} has shape {tuple(value.shape)}, not {shape}")
        return value

    found = {
        "stages.0.embedding.patch_embed.proj.weight": resized_patches(take("patch_embed.proj.weight"), config.patch_size),
        "stages.0.embedding.patch_embed.proj.bias": take("patch_embed.proj.bias", (config.width,)),
    }
    prefix = [take(name, (1, 1, config.width)) for name in ("cls_token", "dist_token") if name in left]
    head = f"stages.{len(boundaries) - 1}.head"
    if config.num_prefix_tokens:
        found["stages.0.embedding.cls_token"] = torch.cat(prefix, dim=1)
    elif config.pooling == "class_attention":
        if not prefix:
            raise WeightsError("the checkpoint lacks cls_token")
        found[f"{head}.cls_token"] = prefix[0]
    found["stages.0.embedding.pos_embed"] = _positions(take("pos_embed"), config)
    starts = (0, *boundaries[:-1])
    for number in range(config.depth):
        stage = max(index for index, start in enumerate(starts) if start <= number)
        tensors = {name: take(f"blocks.{number}.{name}", block_shape(name, config)) for name in BLOCK_TENSORS}
        if config.talking_heads:
            heads = {"weight": (config.num_heads,) * 2, "bias": (config.num_heads,)}
            names = [(f"attn.{part}.{kind}", shape) for part in ("proj_l", "proj_w") for kind, shape in heads.items()]
            tensors |= {name: take(f"blocks.{number}.{name}", shape) for name, shape in names}
        _fold_layer_scale(tensors, f"blocks.{number}", left, take, config.width)
        for name, value in tensors.items():
            found[f"stages.{stage}.blocks.{number - starts[stage]}.{name}"] = value
    for number in range(config.class_depth):
        block = f"blocks_token_only.{number}"
        parts = [f"{layer}.{kind}" for layer in CLASS_LAYERS for kind in ("weight", "bias")]
        tensors = {name: take(f"{block}.{name}", block_shape(name, config)) for name in parts}
        _fold_layer_scale(tensors, block, left, take, config.width)
        found |= {f"{head}.class_blocks.{number}.{name}": value for name, value in tensors.items()}
    found |= _predictors(config, take)
    norm = "fc_norm" if "fc_norm.weight" in left else "norm"
    found |= {f"{head}.norm.{kind}": take(f"{norm}.{kind}", (config.width,)) for kind in ("weight", "bias")}
    shape = (config.num_classes, config.width)
    weight, bias = take("head.weight", shape), take("head.bias", shape[:1])
    if config.pooling == "cls_dist":
        if "head_dist.weight" in left:  # the mean of two classifiers is one over both tokens
            weight = torch.cat([weight, take("head_dist.weight", shape)], dim=1) / 2
            bias = (bias + take("head_dist.bias", shape[:1])) / 2
        else:  # a distillation token that only the others see
            weight = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    found |= {f"{head}.fc.weight": weight, f"{head}.fc.bias": bias}
    if left:
        raise WeightsError(f"no use is known for {', '.join(sorted(left)[:8])}: this is another network than a plain ViT")
    return found


def _predictors(config: ViTConfig, take: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Those of DynamicViT, under our names."""
    width, found = config.width, {}
    layers = {
        "in_conv.0": ("norm", (width,)),
        "in_conv.1": ("fc", (width, width)),
        "out_conv.0": ("out1", (width // 2, width)),
        "out_conv.2": ("out2", (width // 4, width // 2)),
        "out_conv.4": ("out3", (2, width // 4)),
    }
    for number in range(config.num_predictors):
        for theirs, (ours, shape) in layers.items():
            layer = f"score_predictor.{number}.{theirs}"
            found[f"predictors.{number}.{ours}.weight"] = take(f"{layer}.weight", shape)
            found[f"predictors.{number}.{ours}.bias"] = take(f"{layer}.bias", shape[:1])
    return found


def block_shape(name: str, config: ViTConfig) -> tuple[int, ...]:
    """Of a tensor of a block, by its name inside it."""
    layer, _, kind = name.rpartition(".")
    rows, columns = {
        "attn.qkv": (3 * config.width, config.width),
        "mlp.fc1": (config.hidden, config.width),
        "mlp.fc2": (config.width, config.hidden),
    }.get(layer, (config.width, config.width))
    return (rows,) if kind == "bias" or layer.startswith("norm") else (rows, columns)


def _fold_layer_scale(
    tensors: dict[str, Tensor], block: str, left: dict[str, Tensor], take: Callable[..., Tensor], width: int
) -> None:
    """LayerScale (Touvron et al., CaiT, ICCV 2021): a factor on what a branch gives goes into its last layer."""
    for branch, last in (("1", "attn.proj"), ("2", "mlp.fc2")):
        for name in (f"{block}.ls{branch}.gamma", f"{block}.gamma_{branch}"):
            if name in left:
                gamma = take(name, (width,))
                tensors[f"{last}.weight"] = tensors[f"{last}.weight"] * gamma.unsqueeze(1)
                tensors[f"{last}.bias"] = tensors[f"{last}.bias"] * gamma


def resized_patches(weight: Tensor, side: int) -> Tensor:
    """Weights (D, 3, p, p) of a patch embedding for patches of another size, (D, 3, side, side).

    A patch that is resized gives what it gave: exactly where it is enlarged, as nearly as can be for patches of any content
    where it is reduced.

    Source: Beyer et al., FlexiViT, CVPR 2023, section 3.4, PI-resize.
    """
    before = weight.shape[-1]
    if side == before:
        return weight
    pixels = torch.eye(before**2, dtype=torch.float64).view(-1, 1, before, before)
    # Row i: what pixel i of a patch becomes. <resized(x), new> = <x, old> for all x: resize @ new = old.
    resize = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).flatten(1)
    new: Tensor = weight.double().flatten(2) @ torch.linalg.pinv(resize).T
    return new.reshape(*new.shape[:2], side, side).float()


def _positions(positions: Tensor, config: ViTConfig) -> Tensor:
    """Position embedding (1, N, D) for the configuration's tokens: resampled for another image size."""
    num_prefix = config.num_prefix_tokens
    without_prefix = math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]  # DeiT III's class token has no position
    prefix = positions.new_zeros(1, num_prefix, config.width) if without_prefix else positions[:, :num_prefix]
    patches = positions if without_prefix else positions[:, num_prefix:]
    side, wanted = math.isqrt(patches.shape[1]), config.image_size // config.patch_size
    if side**2 != patches.shape[1]:
        raise WeightsError(f"pos_embed has {patches.shape[1]} positions, which is no square")
    if side != wanted:
        grid = patches.reshape(1, side, side, config.width).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", antialias=True)
        patches = grid.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([prefix, patches], dim=1)
