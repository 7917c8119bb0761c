"""ONNX against PyTorch: the same names, shapes and values, at several batch sizes. A kind of error per kind of failure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from app.runtime.backend import Backend
from app.types import Array
from models.manifest import LOGITS, PIXELS, PreprocessSpec, StageSpec
from models.multi_exit import MultiExitViT


class ValidationError(Exception):
    """The exported model is not the one that was given."""


class ShapeMismatch(ValidationError):
    """An output has another shape than the manifest says."""


class ValueMismatch(ValidationError):
    """An output differs from PyTorch's by more than the tolerance."""


def validate(
    backend: Backend,
    stages: Sequence[StageSpec],
    model: MultiExitViT,
    preprocess: PreprocessSpec,
    pixels: Array,
    *,
    batch_sizes: Sequence[int] = (1, 2, 8),
    atol: float = 1e-3,
) -> float:
    """Run the whole chain both ways; the largest absolute difference of a logit.

    Raises:
        ShapeMismatch, ValueMismatch: with the stage and the numbers.
    """
    worst = 0.0
    for batch_size in batch_sizes:
        batch = np.resize(pixels, (batch_size, *pixels.shape[1:]))
        with torch.no_grad():
            expected = [logits.numpy() for logits in model(normalised(batch, preprocess))]
        inputs: dict[str, Array] = {PIXELS: batch}
        for index, stage in enumerate(stages):
            output = backend.run(index, inputs)
            arrays = {LOGITS: output.logits, **output.state}
            for tensor in stage.outputs:
                shape = (batch_size, *tensor.shape[1:])
                if arrays[tensor.name].shape != shape:
                    raise ShapeMismatch(f"stage {index}: {tensor.name} has shape {arrays[tensor.name].shape}, not {shape}")
            difference = float(np.abs(output.logits - expected[index]).max())
            if not difference <= atol:
                raise ValueMismatch(
                    f"stage {index}, batch {batch_size}: logits differ from PyTorch's by {difference:.3g}, allowed {atol:.3g}"
                )
            worst = max(worst, difference)
            inputs = dict(output.state)
    return worst


def normalised(pixels: Array, preprocess: PreprocessSpec) -> torch.Tensor:
    """What the network itself takes: float32 (B, 3, H, W), from either layout."""
    x = torch.from_numpy(np.ascontiguousarray(pixels))
    if preprocess.layout == "float32_nchw":
        return x
    x = x.permute(0, 3, 1, 2).float() * preprocess.scale
    return (x - torch.tensor(preprocess.mean).view(1, 3, 1, 1)) / torch.tensor(preprocess.std).view(1, 3, 1, 1)
