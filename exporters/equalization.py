"""Even out the channels before quantization: what makes one channel small makes the weights behind it large, exactly.

A tensor has one scale for all its channels, so a channel that ranges over little has few steps left. Dividing each channel by a
number of its own, in the layer that makes it, and multiplying the rows of the next layer by it changes nothing in fp32. The
normalisations in front of attention and MLP take the division in their gain and bias, the values of attention in their rows of
the projection. Behind the GELU there is nothing to take it. Values of attention are centred besides, where they become INT8.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019; between activations and
weights as in Xiao et al., SmoothQuant, ICML 2023, equation 4.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from app.types import Array
from exporters.attention_graph import VALUE
from exporters.calibration import Extremes
from exporters.staging import blocks_of, stages_of
from models.multi_exit import MultiExitViT
from models.vit import Block

LARGEST_FACTOR = 32.0  # beyond it weights lose more than activations gain
# How much of a channel's reach the weights take: 1 is all of it. Behind a norm they have steps to spare, for each of their
# columns has a scale of its own. Values become bytes twice, before attention and behind it: one factor must suit both
# (docs/adr/0005).
BEHIND_NORM, OF_VALUES = 0.8, 0.5


def equalize(model: MultiExitViT, extremes: Sequence[Mapping[str, Extremes]]) -> tuple[MultiExitViT, list[dict[str, Extremes]]]:
    """A copy that computes the same, and what its layers' inputs range over.

    Args:
        extremes: of every linear layer's input, by stage and layer, as calibration saw them in `model`.
    """
    model = copy.deepcopy(model)
    changed = [dict(stage) for stage in extremes]
    for stage, seen in zip(stages_of(model), changed, strict=True):
        for number, block in enumerate(blocks_of(stage)):
            _equalize_block(block, f"blocks.{number}", seen)
    return model, changed


@torch.no_grad()
def _equalize_block(block: Block, name: str, seen: dict[str, Extremes]) -> None:
    attention = [f"{name}.attn.{layer}" for layer in ("qkv", "kv", "q") if f"{name}.attn.{layer}" in seen]
    _behind_norm(block.norm1, block.attn.qkv, attention, seen)
    _behind_norm(block.norm2, block.mlp.fc1, [f"{name}.mlp.fc1"], seen)
    projection, values = f"{name}.attn.proj", f"{name}.attn.mix{VALUE}"
    if values in seen:
        _centre(block, projection, values, seen)
    if projection in seen:
        factor = _factor(seen[projection], block.attn.proj.weight, OF_VALUES)
        width = len(factor)
        block.attn.qkv.weight[2 * width :] /= factor.unsqueeze(1)
        block.attn.qkv.bias[2 * width :] /= factor
        block.attn.proj.weight *= factor
        for layer in (projection, values):
            if layer in seen:
                seen[layer] = seen[layer].divided(factor.numpy())


def _centre(block: Block, projection: str, values: str, seen: dict[str, Extremes]) -> None:
    """Take the mean from the values and give it back behind attention: the weights of attention sum to 1, so that is exact.

    What rounding takes from a weight then costs its share of what a value differs from the mean, not of all of it; and signed
    bytes without a zero point suit what lies around zero.
    """
    mean = seen[values].mean
    if mean is None:  # not asked for
        return
    offset = torch.from_numpy(mean)
    block.attn.qkv.bias[-len(mean) :].sub_(offset)
    block.attn.proj.bias.add_(block.attn.proj.weight @ offset)
    for layer in (projection, values):
        seen[layer] = seen[layer].moved(-mean)


def _behind_norm(norm: nn.LayerNorm, linear: nn.Linear, layers: Sequence[str], seen: dict[str, Extremes]) -> None:
    if not layers:
        return
    factor = _factor(seen[layers[0]], linear.weight, BEHIND_NORM)  # the first sees all tokens
    norm.weight.div_(factor)
    norm.bias.div_(factor)
    linear.weight *= factor
    for layer in layers:
        seen[layer] = seen[layer].divided(factor.numpy())


def _factor(extremes: Extremes, weight: torch.Tensor, share: float) -> torch.Tensor:
    """Of each input channel: largest activation ** share / largest weight ** (1 - share), 1 in the geometric mean."""
    activation: Array = np.maximum(np.abs(extremes.low), np.abs(extremes.high))
    of_weight = weight.abs().amax(dim=0).numpy()
    used = (activation > 0) & (of_weight > 0)
    factor = np.ones_like(of_weight)
    factor[used] = activation[used] ** share / of_weight[used] ** (1 - share)
    factor[used] /= np.exp(np.log(factor[used]).mean()) if used.any() else 1
    return torch.from_numpy(np.clip(factor, 1 / LARGEST_FACTOR, LARGEST_FACTOR).astype(np.float32))
