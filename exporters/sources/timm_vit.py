"""Vision Transformers as timm keeps them: a state dict, and the `config.json` that lies beside it.

ViT (Dosovitskiy et al., ICLR 2021), DeiT and distilled DeiT (Touvron et al., ICML 2021), DeiT III (Touvron et al., ECCV 2022).
What is only another way of writing the same numbers is folded into the weights: LayerScale, a class token without position,
the two classifiers of distilled DeiT. Preprocessing comes from the configuration; nothing is assumed where it says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from exporters.sources.base import Network, SourceError
from models.manifest import PreprocessSpec
from models.multi_exit import MultiExitViT
from models.vit import ViTConfig
from models.weights import WeightsError, load_state_dict, sha256_of

# Heads by width, of the sizes that the papers name; others must be told (`model_args` of the configuration).
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
BLOCK_TENSORS = (
    *(
        f"{layer}.{kind}"
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
)


class _Pretrained(BaseModel):
    input_size: tuple[int, int, int]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    crop_pct: float
    crop_mode: str = "center"  # timm leaves it out where it is this
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class _TimmConfig(BaseModel):
    """What is used of a `config.json` as timm writes it to a hub."""

    architecture: str
    num_classes: int
    pretrained_cfg: _Pretrained
    model_args: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class TimmSource:
    """A checkpoint and what lies beside it.

    Args:
        weights: `.safetensors`, or a state dict for `torch.load(weights_only=True)`.
        config: timm's `config.json`.
        labels: one per class, in the order of the classifier.
        boundaries: numbers of blocks after which a stage ends; none: one stage.
    """

    weights: Path
    config: Path
    labels: tuple[str, ...]
    boundaries: tuple[int, ...] = ()

    def load(self) -> Network:
        """Read it into our own network; it has no exits but its end.

        Raises:
            SourceError: the configuration lacks something, or says what is not supported.
            WeightsError: the checkpoint lacks a tensor, has one too many, or one of another shape.
        """
        try:
            told = _TimmConfig.model_validate_json(self.config.read_bytes())
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise SourceError(f"{self.config.name} is not a configuration as timm writes it: {faults}") from error
        if len(self.labels) != told.num_classes:
            raise SourceError(f"there are {len(self.labels)} labels, and {told.architecture} has {told.num_classes} classes")
        state = load_state_dict(self.weights)
        vit = _config_of(state, told)
        try:
            model = MultiExitViT(vit, self.boundaries or (vit.depth,))
        except ValueError as error:
            raise SourceError(str(error)) from error
        found = _converted(state, vit, model.boundaries)
        missing, unexpected = model.load_state_dict(found, strict=False)
        last = f"stages.{len(model.stages) - 1}."
        assert not unexpected  # noqa: S101 - the names are ours
        assert all(".head." in name and not name.startswith(last) for name in missing)  # noqa: S101
        model.eval()
        return Network(
            model,
            preprocessing(told.pretrained_cfg),
            self.labels,
            sha256_of(self.weights),
            told.architecture,
            has_exits=len(model.stages) == 1,
        )


def preprocessing(told: _Pretrained) -> PreprocessSpec:
    """As timm evaluates: the shorter side to size / crop_pct, rounded down, then the centre."""
    _, height, width = told.input_size
    if told.crop_mode != "center" or height != width:
        raise SourceError(f"crop mode {told.crop_mode!r} at {height} x {width} is not supported, only the centre of a square")
    return PreprocessSpec(
        resize=math.floor(height / told.crop_pct),
        crop=(height, width),
        interpolation=told.interpolation,
        mean=told.mean,
        std=told.std,
        layout="uint8_nhwc",
    )


def _config_of(state: dict[str, Tensor], told: _TimmConfig) -> ViTConfig:
    if missing := [name for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight") if name not in state]:
        raise WeightsError(f"this is no Vision Transformer as timm keeps it: {', '.join(missing)} missing")
    kernel = state["patch_embed.proj.weight"]
    width, patch_size = kernel.shape[0], kernel.shape[-1]
    num_heads = told.model_args.get("num_heads", HEADS.get(width))
    if num_heads is None:
        raise SourceError(f"say how many heads a network of width {width} has: num_heads in model_args of the configuration")
    if "dist_token" in state:
        pooling: Literal["cls", "cls_dist", "mean"] = "cls_dist"
    else:
        pooling = "cls" if "cls_token" in state and "fc_norm.weight" not in state else "mean"
    return ViTConfig(
        image_size=told.pretrained_cfg.input_size[1],
        patch_size=patch_size,
        width=width,
        depth=1 + max(int(match[1]) for name in state if (match := BLOCK.fullmatch(name))),
        num_heads=num_heads,
        num_classes=told.num_classes,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        pooling=pooling,
    )


def _converted(state: dict[str, Tensor], config: ViTConfig, boundaries: Sequence[int]) -> dict[str, Tensor]:
    """The same numbers under our names. Every tensor must have a use: what is left over would change the answer."""
    left = dict(state)

    def take(name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        if name not in left:
            raise WeightsError(f"the checkpoint lacks {name}")
        value = left.pop(name).float()
        if shape is not None and tuple(value.shape) != shape:
            raise WeightsError(f"{name} has shape {tuple(value.shape)}, not {shape}")
        return value

    found = {
        "stages.0.embedding.patch_embed.proj.weight": take("patch_embed.proj.weight"),
        "stages.0.embedding.patch_embed.proj.bias": take("patch_embed.proj.bias", (config.width,)),
    }
    prefix = [take(name, (1, 1, config.width)) for name in ("cls_token", "dist_token") if name in left]
    if config.num_prefix_tokens:
        found["stages.0.embedding.cls_token"] = torch.cat(prefix, dim=1)
    found["stages.0.embedding.pos_embed"] = _positions(take("pos_embed"), config)
    starts = (0, *boundaries[:-1])
    for number in range(config.depth):
        stage = max(index for index, start in enumerate(starts) if start <= number)
        tensors = {name: take(f"blocks.{number}.{name}") for name in BLOCK_TENSORS}
        for branch, last in (("1", "attn.proj"), ("2", "mlp.fc2")):
            for name in (f"blocks.{number}.ls{branch}.gamma", f"blocks.{number}.gamma_{branch}"):
                if name in left:  # LayerScale (Touvron et al., CaiT, ICCV 2021): a factor on what the branch gives
                    gamma = take(name, (config.width,))
                    tensors[f"{last}.weight"] *= gamma.unsqueeze(1)
                    tensors[f"{last}.bias"] *= gamma
        for name, value in tensors.items():
            found[f"stages.{stage}.blocks.{number - starts[stage]}.{name}"] = value
    head = f"stages.{len(boundaries) - 1}.head"
    norm = "fc_norm" if "fc_norm.weight" in left else "norm"
    found |= {f"{head}.norm.{kind}": take(f"{norm}.{kind}", (config.width,)) for kind in ("weight", "bias")}
    heads = ["head", *(["head_dist"] if config.pooling == "cls_dist" else [])]
    shape = (config.num_classes, config.width)
    found[f"{head}.fc.weight"] = torch.cat([take(f"{name}.weight", shape) for name in heads], dim=1) / len(heads)
    found[f"{head}.fc.bias"] = torch.stack([take(f"{name}.bias", shape[:1]) for name in heads]).mean(dim=0)
    if left:
        raise WeightsError(f"no use is known for {', '.join(sorted(left)[:8])}: this is another network than a plain ViT")
    return found


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
