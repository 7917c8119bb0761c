"""Vision Transformers as timm keeps them: a state dict, and the `config.json` that lies beside it.

ViT (Dosovitskiy et al., ICLR 2021), DeiT and distilled DeiT (Touvron et al., ICML 2021), DeiT III (Touvron et al., ECCV 2022),
CaiT (Touvron et al., ICCV 2021).
Preprocessing comes from the configuration; nothing is assumed where it says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from exporters.sources.base import AS_IT_IS, Asked, Network, SourceError, at_size, faults_of, own_network
from models.manifest import PreprocessSpec
from models.vit_state import Told, num_heads_of, width_of
from models.weights import load_state_dict, sha256_of


class Pretrained(BaseModel):
    """How the network was trained to see."""

    input_size: tuple[int, int, int]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    crop_pct: float
    crop_mode: str = "center"  # timm leaves it out where it is this
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class TimmConfig(BaseModel):
    """What is used of a `config.json` as timm writes it to a hub."""

    architecture: str
    num_classes: int
    pretrained_cfg: Pretrained
    model_args: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class TimmSource:
    """A checkpoint and what lies beside it.

    Args:
        weights: `.safetensors`, or a state dict for `torch.load(weights_only=True)`.
        config: timm's `config.json`.
        labels: one per class, in the order of the classifier.
        asked: stages and sizes, where other than as it comes.
    """

    weights: Path
    config: Path
    labels: tuple[str, ...]
    asked: Asked = AS_IT_IS

    def load(self) -> Network:
        """Read it into our own network; it has no exits but its end.

        Raises:
            SourceError: the configuration lacks something, or says what is not supported.
            WeightsError: the checkpoint lacks a tensor, has one too many, or one of another shape.
        """
        told = told_by(self.config, self.labels)
        state = load_state_dict(self.weights)
        width = width_of(state)
        num_heads = told.model_args.get("num_heads", num_heads_of(state))
        if num_heads is None:
            where = f"num_heads in model_args of {self.config.name}"
            raise SourceError(f"say how many heads a network of width {width} has: {where}")
        spec = timm_preprocessing(told.pretrained_cfg)
        model = own_network(state, Told(spec.crop[0], num_heads, told.num_classes), self.asked)
        return Network(
            model,
            at_size(spec, model.config.image_size),
            self.labels,
            sha256_of(self.weights),
            told.architecture,
            has_exits=len(model.stages) == 1,
        )


def told_by(config: Path, labels: Sequence[str] | None = None) -> TimmConfig:
    """What a `config.json` says.

    Args:
        labels: where given, one per class.

    Raises:
        SourceError: it is not one of timm's, or has another number of classes.
    """
    try:
        told = TimmConfig.model_validate_json(config.read_bytes())
    except ValidationError as error:
        raise SourceError(f"{config.name} is not a configuration as timm writes it: {faults_of(error)}") from error
    if labels is not None and len(labels) != told.num_classes:
        raise SourceError(f"there are {len(labels)} labels, and {told.architecture} has {told.num_classes} classes")
    return told


def timm_preprocessing(told: Pretrained) -> PreprocessSpec:
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
