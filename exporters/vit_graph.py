"""A stage of the Vision Transformer written directly as an ONNX graph.

As fast as torch's own export in fp32 and faster in INT8 (docs/adr/0005): linear layers become `QuantizeLinear` and
`MatMulIntegerToFloat` with per-channel weights, the stem's convolutions become `QLinearConv`, instead of QDQ pairs that ONNX
Runtime has to recognise. Add,
LayerNormalization, Softmax and Gelu stay plain: their fused forms are slower on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from app.types import Array
from models.manifest import BATCH, LOGITS, PIXELS, PreprocessSpec
from models.multi_exit import Stage
from models.vit import Block, ConvStem, Embedding, Head, PatchEmbed, ViTConfig

OPSET = 20  # the first with Gelu
MICROSOFT_OPSET = 1
IR_VERSION = 9  # of opset 20
INT8_MAX = 127  # symmetric weights: -127 .. 127
UINT8_MAX = 255

Shape = tuple[int | str, ...]


def tokens_name(stage: int) -> str:
    """The tokens that a stage gives to the next."""
    return f"tokens_{stage}"


@dataclass(frozen=True, slots=True)
class ActivationRange:
    """Smallest and largest value that the input of a linear layer, or the output of a convolution, took in calibration."""

    low: float
    high: float

    def scale_and_zero_point(self) -> tuple[np.float32, np.uint8]:
        """Affine u8 quantization in which 0 is exact, as padding and ReLU want it (Jacob et al., CVPR 2018)."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = (high - low) / UINT8_MAX or 1.0
        return np.float32(scale), np.uint8(np.clip(round(-low / scale), 0, UINT8_MAX))


def stage_graph(
    stage: Stage,
    index: int,
    config: ViTConfig,
    preprocess: PreprocessSpec,
    *,
    last: bool,
    ranges: Mapping[str, ActivationRange] | None = None,
    expose: bool = False,
) -> onnx.ModelProto:
    """The ONNX model of one stage.

    Args:
        stage: in evaluation mode.
        index: of the stage; it gives `tokens_<index>` and takes `tokens_<index - 1>`.
        config: of the whole network.
        preprocess: its layout decides the input of the first stage.
        last: the last stage gives logits only; the others the tokens too.
        ranges: of each linear layer's input and each convolution's output, by layer name; layers named become INT8 (the
            convolutions of a stem only together). None: all stay fp32.
        expose: give those inputs and outputs as graph outputs called by the layer's name, for calibration.
    """
    graph = _Graph(ranges or {}, expose=expose)
    source: tuple[str, int, Shape]
    if stage.embedding is not None:
        x = graph.embed(stage.embedding, config, preprocess)
        kind = TensorProto.UINT8 if preprocess.layout == "uint8_nhwc" else TensorProto.FLOAT
        source = (PIXELS, kind, preprocess.pixels().shape)
    else:
        x = tokens_name(index - 1)
        source = (x, TensorProto.FLOAT, (BATCH, config.num_tokens, config.width))
    for number, block in enumerate(stage.blocks):
        if not isinstance(block, Block):
            raise TypeError(f"no graph is known for a block of the kind {type(block).__name__}")
        # Behind the last block only the heads look, and they see the tokens in front.
        prefix_only = last and number == len(stage.blocks) - 1 and config.num_prefix_tokens > 0
        x = graph.block(block, f"blocks.{number}", x, config, prefix_only=prefix_only)
    graph.node("Identity", graph.head(stage.head, x), output=LOGITS)
    outputs: list[tuple[str, Shape]] = [(LOGITS, (BATCH, config.num_classes))]
    if not last:
        graph.node("Identity", x, output=tokens_name(index))
        outputs.append((tokens_name(index), (BATCH, config.num_tokens, config.width)))
    return graph.model(source, outputs)


class _Graph:
    """Collects nodes and weights; a method per part of the network, each taking and giving tensor names."""

    def __init__(self, ranges: Mapping[str, ActivationRange], *, expose: bool) -> None:
        self._ranges = ranges
        self._expose = expose
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, Array] = {}
        self._exposed: list[tuple[str, Shape]] = []

    def node(self, kind: str, *inputs: str, output: str = "", domain: str = "", **attributes: Any) -> str:
        output = output or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def weight(self, name: str, value: Array | Tensor) -> str:
        array = value.detach().numpy() if isinstance(value, Tensor) else value
        self._weights[name] = np.asarray(array, order="C")  # ascontiguousarray would make a scalar an array
        return name

    def constant(self, name: str, values: Sequence[int]) -> str:
        return self.weight(name, np.array(values, dtype=np.int64))

    def linear(self, name: str, x: str, weight: Array, bias: Array) -> str:
        """x @ weight + bias; weight float32 (in, out), bias float32 (out,)."""
        if self._expose:
            self._exposed.append((self.node("Identity", x, output=name), (BATCH, "N", len(weight))))
        if name not in self._ranges:
            product = self.node("MatMul", x, self.weight(f"{name}.weight", weight))
            return self.node("Add", product, self.weight(f"{name}.bias", bias))
        weight_scale = (np.abs(weight).max(axis=0) / INT8_MAX).clip(min=np.finfo(np.float32).tiny).astype(np.float32)
        quantized = np.clip(np.rint(weight / weight_scale), -INT8_MAX, INT8_MAX).astype(np.int8)
        a_scale, a_zero = self.quantization(f"{name}.input", self._ranges[name].scale_and_zero_point())
        return self.node(
            "MatMulIntegerToFloat",
            self.node("QuantizeLinear", x, a_scale, a_zero),
            self.weight(f"{name}.weight", quantized),
            a_scale,
            self.weight(f"{name}.weight_scale", weight_scale),
            a_zero,
            "",  # weights are symmetric
            self.weight(f"{name}.bias", bias),
            domain="com.microsoft",
        )

    def norm(self, name: str, module: nn.LayerNorm, x: str) -> str:
        scale, bias = self.weight(f"{name}.weight", module.weight), self.weight(f"{name}.bias", module.bias)
        return self.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=module.eps)

    def embed(self, module: Embedding, config: ViTConfig, preprocess: PreprocessSpec) -> str:
        """Pixels -> tokens (B, N, D) with positions; normalises where the preprocessing leaves it to the graph."""
        stem = module.patch_embed
        if isinstance(stem, ConvStem):
            x = self.conv_stem(stem, preprocess)  # (B, D, h, w)
        elif isinstance(stem, PatchEmbed):
            side = stem.proj.kernel_size[0]
            names = self.weight("patch.weight", stem.proj.weight), self.weight("patch.bias", _vector(stem.proj.bias))
            x = self.node("Conv", self.normalised(preprocess), *names, kernel_shape=[side, side], strides=[side, side])
        else:
            raise TypeError(f"no graph is known for a stem of the kind {type(stem).__name__}")
        x = self.node("Reshape", x, self.constant("patches.shape", [0, config.width, -1]))
        x = self.node("Transpose", x, perm=[0, 2, 1])  # (B, N, D)
        positions = module.pos_embed.detach().numpy().copy()
        if module.cls_token is not None:
            # Rows of zeros in front, and the class token inside the positions: no node asks for the batch size.
            x = self.node("Pad", x, self.constant("cls.pads", [0, config.num_prefix_tokens, 0, 0, 0, 0]))
            positions[:, : config.num_prefix_tokens] += module.cls_token.detach().numpy()
        return self.node("Add", x, self.weight("positions", positions))

    def normalised(self, preprocess: PreprocessSpec) -> str:
        """The pixels as the network was trained on them, float32 (B, 3, H, W)."""
        if preprocess.layout == "float32_nchw":
            return PIXELS
        x = self.node("Cast", PIXELS, to=TensorProto.FLOAT)
        x = self.node("Transpose", x, perm=[0, 3, 1, 2])
        mean, std = (np.array(v, dtype=np.float32).reshape(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
        x = self.node("Mul", x, self.weight("pixels.scale", np.float32(preprocess.scale) / std))
        return self.node("Sub", x, self.weight("pixels.offset", mean / std))

    def conv_stem(self, module: ConvStem, preprocess: PreprocessSpec) -> str:
        """Pixels -> features (B, D, h, w), through convolutions, each followed by ReLU.

        INT8: bytes between the convolutions, whose rounding to the unsigned range is the ReLU. The pixels themselves are
        taken as bytes where one of them stands for zero, which padding needs; else the first convolution stays fp32.
        """
        layers = [(f"stem.{number}", layer) for number, layer in enumerate(_folded(module))]
        x, known = PIXELS, None
        int8 = all(name in self._ranges for name, _ in layers)
        if int8 and (known := _quantization_of_pixels(preprocess)) is not None:
            x = self.node("Transpose", PIXELS, perm=[0, 3, 1, 2])
            layers[0][1].weight /= np.array(preprocess.std, dtype=np.float32).reshape(1, 3, 1, 1)
        else:
            x = self.normalised(preprocess)
        for name, layer in layers:
            if known is not None:
                x, known = self.quantized_convolution(name, x, known, layer)
                continue
            names = self.weight(f"{name}.weight", layer.weight), self.weight(f"{name}.bias", layer.bias)
            x = self.node("Relu", self.node("Conv", x, *names, **layer.attributes()))
            if self._expose:
                shape = (BATCH, len(layer.bias), f"{name}.height", f"{name}.width")
                self._exposed.append((self.node("Identity", x, output=name), shape))
            if int8:
                known = self._ranges[name].scale_and_zero_point()
                x = self.node("QuantizeLinear", x, *self.quantization(f"{name}.output", known))
        if known is None:
            return x
        return self.node("DequantizeLinear", x, *self.quantization("stem.output", known))

    def quantized_convolution(
        self, name: str, x: str, known: tuple[np.float32, np.uint8], layer: _Convolution
    ) -> tuple[str, tuple[np.float32, np.uint8]]:
        """A convolution of bytes to bytes; `known` and what is returned beside the name are scale and zero point."""
        per_channel = np.abs(layer.weight).max(axis=(1, 2, 3)) / INT8_MAX
        weight_scale = per_channel.clip(min=np.finfo(np.float32).tiny).astype(np.float32)
        weight = np.clip(np.rint(layer.weight / weight_scale.reshape(-1, 1, 1, 1)), -INT8_MAX, INT8_MAX).astype(np.int8)
        bias = np.rint(layer.bias / (known[0] * weight_scale)).astype(np.int32)
        output = self._ranges[name].scale_and_zero_point()
        x = self.node(
            "QLinearConv",
            x,
            *self.quantization(f"{name}.input", known),
            self.weight(f"{name}.weight", weight),
            self.weight(f"{name}.weight_scale", weight_scale),
            self.weight(f"{name}.weight_zero_point", np.zeros(len(weight), dtype=np.int8)),
            *self.quantization(f"{name}.output", output),
            self.weight(f"{name}.bias", bias),
            **layer.attributes(),
        )
        return x, output

    def quantization(self, name: str, known: tuple[np.float32, np.uint8]) -> tuple[str, str]:
        """Names of a scale and a zero point."""
        return self.weight(f"{name}_scale", np.array(known[0])), self.weight(f"{name}_zero_point", np.array(known[1]))

    def prefix(self, x: str, count: int) -> str:
        """The first `count` tokens."""
        names = [self.constant(f"prefix.{part}", [value]) for part, value in (("start", 0), ("end", count), ("axis", 1))]
        return self.node("Slice", x, *names)

    def block(self, module: Block, name: str, x: str, config: ViTConfig, *, prefix_only: bool = False) -> str:
        """Tokens -> tokens; `prefix_only` gives those in front of the patches alone, exactly as they would be among all."""
        attended = self.attention(
            module, f"{name}.attn", self.norm(f"{name}.norm1", module.norm1, x), config, prefix_only=prefix_only
        )
        x = self.node("Add", self.prefix(x, config.num_prefix_tokens) if prefix_only else x, attended)
        hidden = self.norm(f"{name}.norm2", module.norm2, x)
        hidden = self.linear(f"{name}.mlp.fc1", hidden, *_matrix(module.mlp.fc1))
        hidden = self.node("Gelu", hidden, approximate="none")
        return self.node("Add", x, self.linear(f"{name}.mlp.fc2", hidden, *_matrix(module.mlp.fc2)))

    def attention(self, module: Block, name: str, x: str, config: ViTConfig, *, prefix_only: bool) -> str:
        heads, width = config.num_heads, config.width
        head_width = width // heads
        weight, bias = _matrix(module.attn.qkv)
        # softmax(q k / sqrt(d)) = softmax((q / sqrt(d)) k): the scale goes into the query's weights.
        weight, bias = weight.copy(), bias.copy()
        weight[:, :width] /= np.sqrt(head_width)
        bias[:width] /= np.sqrt(head_width)
        names = {part: f"{name}.{part}" for part in "qkv"}
        if prefix_only:
            asking = self.prefix(x, config.num_prefix_tokens)
            names["q"] = self.linear(f"{name}.q", asking, weight[:, :width], bias[:width])
            self.split(self.linear(f"{name}.kv", x, weight[:, width:], bias[width:]), [names["k"], names["v"]], width)
        else:
            self.split(self.linear(f"{name}.qkv", x, weight, bias), [*names.values()], width)
        shape = self.constant(f"{name}.heads", [0, 0, heads, head_width])
        q, k, v = (
            self.node("Transpose", self.node("Reshape", names[part], shape), perm=perm)
            for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
        )
        weights = self.node("Softmax", self.node("MatMul", q, k), axis=-1)  # (B, heads, N or P, N)
        mixed = self.node("Transpose", self.node("MatMul", weights, v), perm=[0, 2, 1, 3])
        mixed = self.node("Reshape", mixed, self.constant(f"{name}.merge", [0, 0, width]))
        return self.linear(f"{name}.proj", mixed, *_matrix(module.attn.proj))

    def split(self, x: str, parts: Sequence[str], width: int) -> None:
        """The last axis in parts of `width`, each called as told."""
        sizes = self.constant(f"{parts[0]}.split", [width] * len(parts))
        self._nodes.append(helper.make_node("Split", [x, sizes], list(parts), name=f"{parts[0]}.split", axis=-1))

    def head(self, module: Head, x: str) -> str:
        """Tokens -> logits, always fp32: it is tiny, and confidences come from it."""
        if module.num_prefix_tokens:  # the norm is per token, so the others need none
            x = self.norm("head.norm", module.norm, self.prefix(x, module.num_prefix_tokens))
            x = self.node("Flatten", x)  # (B, P * D)
        else:
            x = self.norm("head.norm", module.norm, x)
            x = self.node("ReduceMean", x, self.constant("head.axes", [1]), keepdims=0)
        weight, bias = _matrix(module.fc)
        return self.node("Gemm", x, self.weight("head.weight", weight), self.weight("head.bias", bias))

    def model(self, source: tuple[str, int, Shape], outputs: Sequence[tuple[str, Shape]]) -> onnx.ModelProto:
        """The checked model."""
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (*outputs, *self._exposed)]
        graph = helper.make_graph(
            self._nodes,
            "stage",
            [helper.make_tensor_value_info(*source)],
            values,
            [numpy_helper.from_array(np.asarray(value), name) for name, value in self._weights.items()],
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", MICROSOFT_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fovea")
        onnx.checker.check_model(model)
        return model


def _matrix(module: nn.Linear) -> tuple[Array, Array]:
    """Weight as (in, out) and bias of a linear layer."""
    return module.weight.detach().numpy().T, module.bias.detach().numpy()


def _vector(value: Tensor | None) -> Tensor:
    if value is None:
        raise TypeError("the patch projection has no bias")
    return value


@dataclass(slots=True)
class _Convolution:
    """A square convolution that keeps the size but for its stride; ReLU follows."""

    weight: Array  # float32 (out, in, k, k)
    bias: Array  # float32 (out,)
    stride: int

    def attributes(self) -> dict[str, Any]:
        side = self.weight.shape[-1]
        return {"kernel_shape": [side, side], "strides": [self.stride] * 2, "pads": [side // 2] * 4}


def _folded(module: ConvStem) -> list[_Convolution]:
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
        folded.append(_Convolution(conv.weight.detach().numpy() * gain.reshape(-1, 1, 1, 1), bias, conv.stride[0]))
    return folded


def _quantization_of_pixels(preprocess: PreprocessSpec) -> tuple[np.float32, np.uint8] | None:
    """Scale and zero point with which bytes are the normalised pixels (but for the division by std); None if there are none."""
    zeros = {mean / preprocess.scale for mean in preprocess.mean}
    zero = round(next(iter(zeros)))
    if preprocess.layout != "uint8_nhwc" or not 0 <= zero <= UINT8_MAX or any(abs(z - zero) > 1e-3 for z in zeros):
        return None
    return np.float32(preprocess.scale), np.uint8(zero)
