"""What makes tokens of pixels, as parts of a graph: convolutions with their batch norms inside, or patches.

In INT8 the pixels are taken as the bytes that they are, where that is possible, so that nothing rounds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto
from torch import nn

from app.types import Array
from exporters.graph_writer import MICROSOFT, UINT8_MAX, GraphWriter, Quantization, bias_scale, quantized_bias, symmetric_int8
from models.manifest import PIXELS, PreprocessSpec
from models.vit import ConvLayer, ConvStem, PatchEmbed, ViTConfig

PATCH_EMBED = "patch_embed"


def patch_projection(graph: GraphWriter, module: PatchEmbed, config: ViTConfig, preprocess: PreprocessSpec) -> str:
    """Pixels -> tokens (B, N, D) by one projection per patch.

    INT8: a product of the bytes as they come, which nothing rounds, with the weights of each patch; what normalises the
    pixels is in the weights and the bias.
    """
    if module.proj.bias is None:
        raise TypeError("the patch projection has no bias")
    weight, bias = module.proj.weight, module.proj.bias
    side, across = weight.shape[-1], config.image_size // weight.shape[-1]
    if PATCH_EMBED not in graph.ranges:
        x = _normalised(graph, preprocess)
        if preprocess.layout == "uint8_nhwc":
            graph.expose(PATCH_EMBED, x)
        names = graph.weight("patch.weight", weight), graph.weight("patch.bias", bias)
        x = graph.node("Conv", x, *names, kernel_shape=[side, side], strides=[side, side])
        return _tokens_of(graph, x, config.width)
    x = PIXELS
    if across * side < config.image_size:  # what patches do not reach, as a convolution leaves it
        x = graph.slice(graph.slice(x, 0, across * side, axis=1), 0, across * side, axis=2)
    x = graph.node("Reshape", x, graph.constant([0, across, side, across, side * 3]))
    x = graph.node("Reshape", graph.node("Transpose", x, perm=[0, 1, 3, 2, 4]), graph.constant([0, across**2, side**2 * 3]))
    matrix, offset, middle = folded_patches(module, preprocess)
    integers, scale = symmetric_int8(matrix, axis=0)
    pixels = graph.quantization(PATCH_EMBED, (np.float32(1), np.uint8(middle)))
    weights = graph.weight("patch.weight", integers), graph.weight("patch.weight_scale", scale)
    return graph.integer_linear(x, pixels, *weights, graph.weight("patch.bias", offset.astype(np.float32)))


def conv_stem(graph: GraphWriter, module: ConvStem, config: ViTConfig, preprocess: PreprocessSpec) -> str:
    """Pixels -> tokens (B, N, D) through convolutions, each followed by ReLU, and by the largest of a window where it says so.

    INT8: bytes between the convolutions, whose rounding to the unsigned range is the ReLU. The pixels themselves are
    taken as bytes where one of them stands for zero, which padding needs; else the first convolution stays fp32.
    """
    layers = [folded(layer) for layer in module.layers]
    names = [f"stem.{number}" for number in range(len(layers))]
    sums = [_sum(name) for name, layer in zip(names, layers, strict=True) if layer.residual]
    x, known = PIXELS, None
    int8 = all(name in graph.ranges for name in (*names, *sums))
    if int8 and (known := quantization_of_pixels(preprocess)) is not None:
        x = graph.node("Transpose", PIXELS, perm=[0, 3, 1, 2])
        layers[0].weight /= np.array(preprocess.std, dtype=np.float32).reshape(1, 3, 1, 1)
    else:
        x = _normalised(graph, preprocess)
    for name, layer in zip(names, layers, strict=True):
        before, known_before = x, known
        if known is not None:
            x, known = _quantized(graph, name, x, known, layer)
        else:
            weights = graph.weight(f"{name}.weight", layer.weight), graph.weight(f"{name}.bias", layer.bias)
            x = graph.node("Relu", graph.node("Conv", x, *weights, **layer.attributes()))
            graph.expose(name, x)
            if int8:
                known = graph.ranges[name].scale_and_zero_point()
                x = graph.node("QuantizeLinear", x, *graph.quantization(f"{name}.output", known))
        if layer.pool > 1:
            x = graph.node("MaxPool", x, kernel_shape=[layer.pool] * 2, strides=[layer.pool] * 2)
        if layer.residual and known is not None and known_before is not None:
            inputs = (
                before,
                *graph.quantization(f"{name}.before", known_before),
                x,
                *graph.quantization(f"{name}.after", known),
            )
            known = graph.ranges[_sum(name)].scale_and_zero_point()
            x = graph.node("QLinearAdd", *inputs, *graph.quantization(f"{_sum(name)}.output", known), domain=MICROSOFT)
        elif layer.residual:
            x = graph.node("Add", before, x)
            graph.expose(_sum(name), x)
    if known is not None:
        x = graph.node("DequantizeLinear", x, *graph.quantization("stem.output", known))
    return _tokens_of(graph, x, config.width)


@dataclass(slots=True)
class Convolution:
    """A square convolution that keeps the size; ReLU follows, then the largest of each window of pool x pool."""

    weight: Array  # float32 (out, in, k, k)
    bias: Array  # float32 (out,)
    pool: int
    residual: bool

    def attributes(self) -> dict[str, Any]:
        side = self.weight.shape[-1]
        return {"kernel_shape": [side, side], "pads": [side // 2] * 4}


def folded(layer: nn.Module) -> Convolution:
    """With its batch norm in evaluation mode inside; the window may come after norm and ReLU, for both are rising."""
    if not isinstance(layer, ConvLayer):
        raise TypeError(f"no graph is known for a layer of the kind {type(layer).__name__} in a stem")
    norm = layer.norm
    if norm.running_mean is None or norm.running_var is None:
        raise TypeError("the batch norm has no running statistics")
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
    if layer.pool > 1 and not (gain > 0).all():
        raise ValueError("a batch norm behind a window has a gain that is not positive, so that it cannot be folded")
    bias = norm.bias.detach().numpy() - norm.running_mean.numpy() * gain
    weight = layer.conv.weight.detach().numpy() * gain.reshape(-1, 1, 1, 1)
    return Convolution(weight, bias, layer.pool, layer.residual)


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


def _quantized(graph: GraphWriter, name: str, x: str, known: Quantization, layer: Convolution) -> tuple[str, Quantization]:
    """A convolution of bytes to bytes; `known` and what is returned beside the name are scale and zero point."""
    weight, weight_scale = symmetric_int8(layer.weight, axis=(1, 2, 3), at_least=bias_scale(layer.bias, known[0]))
    bias = quantized_bias(layer.bias, known[0] * weight_scale)
    output = graph.ranges[name].scale_and_zero_point()
    x = graph.node(
        "QLinearConv",
        x,
        *graph.quantization(f"{name}.input", known),
        graph.weight(f"{name}.weight", weight),
        graph.weight(f"{name}.weight_scale", weight_scale),
        graph.weight(f"{name}.weight_zero_point", np.zeros(len(weight), dtype=np.int8)),
        *graph.quantization(f"{name}.output", output),
        graph.weight(f"{name}.bias", bias),
        **layer.attributes(),
    )
    return x, output


def _sum(name: str) -> str:
    """What a residual convolution gives, with what it got."""
    return f"{name}.sum"


def _normalised(graph: GraphWriter, preprocess: PreprocessSpec) -> str:
    """The pixels as the network was trained on them, float32 (B, 3, H, W)."""
    if preprocess.layout == "float32_nchw":
        return PIXELS
    x = graph.node("Cast", PIXELS, to=TensorProto.FLOAT)
    x = graph.node("Transpose", x, perm=[0, 3, 1, 2])
    mean, std = (np.array(v, dtype=np.float32).reshape(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    x = graph.node("Mul", x, graph.weight("pixels.scale", np.float32(preprocess.scale) / std))
    return graph.node("Sub", x, graph.weight("pixels.offset", mean / std))


def _tokens_of(graph: GraphWriter, features: str, width: int) -> str:
    """(B, D, h, w) -> (B, N, D)."""
    return graph.node("Transpose", graph.node("Reshape", features, graph.constant([0, width, -1])), perm=[0, 2, 1])
