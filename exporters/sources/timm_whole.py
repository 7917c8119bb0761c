"""Networks of timm other than plain ViT and DeiT: MViT, TinyViT, EfficientFormer and the like, where timm is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.sources.base import SourceError, WholeModel
from exporters.sources.timm_vit import timm_preprocessing, told_by
from exporters.sources.torch_graph import answers, traced
from exporters.whole_graph import first_line
from models.weights import WeightsError, load_state_dict, sha256_of


@dataclass(frozen=True, slots=True)
class TimmWholeSource:
    """A checkpoint and what lies beside it.

    Args:
        weights: `.safetensors`, or a state dict for `torch.load(weights_only=True)`.
        config: timm's `config.json`.
        labels: one per class, in the order of the classifier.
    """

    weights: Path
    config: Path
    labels: tuple[str, ...]

    def load(self) -> WholeModel:
        """Build, fill and trace it.

        Raises:
            SourceError: timm is missing or does not know it, or it has no ONNX.
            WeightsError: the checkpoint does not fit.
        """
        timm = _package()
        told = told_by(self.config, self.labels)
        try:
            model: torch.nn.Module = timm.create_model(
                told.architecture, pretrained=False, num_classes=told.num_classes, exportable=True, **told.model_args
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise SourceError(f"timm does not build {told.architecture}: {first_line(error)}") from error
        state = load_state_dict(self.weights)
        try:
            missing, unexpected = model.load_state_dict(state, strict=False)
        except RuntimeError as error:  # tensors of other shapes
            lines = str(error).strip().splitlines()
            raise WeightsError(f"the checkpoint is not one of {told.architecture}: {' '.join(lines[:2])}") from error
        if missing or unexpected:
            raise WeightsError(
                f"the checkpoint is not one of {told.architecture}: it lacks {missing[:3]}, and {unexpected[:3]} have no use"
            )
        model.eval()
        spec = timm_preprocessing(told.pretrained_cfg)

        def forward(x: Tensor) -> Tensor:
            logits: Tensor = model(x)
            return logits

        graph = traced(model, forward, told.architecture, spec.crop)
        return WholeModel(graph, answers(forward), spec, self.labels, sha256_of(self.weights), told.architecture)


def _package() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # without its own torchvision it fails in either way
        raise SourceError(f"networks of timm other than ViT and DeiT need it: pip install timm ({error})") from error
    return timm
