"""What a stem is made of: convolutions with their batch norms inside, patches as rows of a product, and pixels as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from app.types import Array
from exporters.graph_writer import UINT8_MAX, Quantization
from models.manifest import PreprocessSpec
from models.vit import ConvStem, PatchEmbed


@dataclass(slots=True)
class Convolution:
    """A square convolution that keeps the size but for its stride; ReLU follows."""

    weight: Array  # float32 (out, in, k, k)
    bias: Array  # float32 (out,)
    stride: int

    def attributes(self) -> dict[str, Any]:
        side = self.weight.shape[-1]
        return {"kernel_shape": [side, side], "strides": [self.stride] * 2, "pads": [side // 2] * 4}


def folded_convolutions(module: ConvStem) -> list[Convolution]:
    """Each convolution with its batch norm in evaluation mode inside."""
    folded = []
    for index in range(0, len(module.layers), 3):
        conv, norm = module.layers[index], module.layers[index + 1]
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            raise TypeError("the conv stem must be convolution, batch norm, ReLU in turn")
        if norm.running_mean is None or norm.running_var is None:
            raise TypeError("the batch norm has no running statistics")
        gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
        bias = norm.bias.detach().numpy() - norm.running_mean.numpy() * gain
        folded.append(Convolution(conv.weight.detach().numpy() * gain.reshape(-1, 1, 1, 1), bias, conv.stride[0]))
    return folded


def quantization_of_pixels(preprocess: PreprocessSpec) -> Quantization | None:
    """Scale and zero point with which bytes are the normalised pixels (but for the division by std); None if there are none."""
    zeros = {mean / preprocess.scale for mean in preprocess.mean}
    zero = round(next(iter(zeros)))
    if preprocess.layout != "uint8_nhwc" or not 0 <= zero <= UINT8_MAX or any(abs(z - zero) > 1e-3 for z in zeros):
        return None
    return np.float32(preprocess.scale), np.uint8(zero)


def folded_patches(module: PatchEmbed, preprocess: PreprocessSpec) -> tuple[Array, Array, int]:
    """The projection of a patch for bytes as they come: what normalises them is in weights and bias.

    Returns:
        Weights float64 (side * side * 3, D), bias float64 (D,), and the byte to be subtracted first: a weight that is rounded
        then errs by what a pixel differs from the middle, not by all of it.
    """
    if module.proj.bias is None:
        raise TypeError("the patch projection has no bias")
    mean, std = (np.array(v, dtype=np.float64).reshape(3, 1) for v in (preprocess.mean, preprocess.std))
    by_channel = module.proj.weight.detach().numpy().astype(np.float64).transpose(2, 3, 1, 0)  # (side, side, 3, D)
    bias = module.proj.bias.detach().numpy() - (by_channel * mean / std).sum(axis=(0, 1, 2))
    weight = (by_channel * preprocess.scale / std).reshape(-1, by_channel.shape[-1])
    middle = min(max(round(float(mean.mean()) / preprocess.scale), 0), UINT8_MAX)
    return weight, bias + middle * weight.sum(axis=0), middle
