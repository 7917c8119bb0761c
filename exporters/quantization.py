"""INT8 for any graph: linear layers and convolutions of constant weights, as `exporters.vit_graph` writes those of a ViT.

Linear layers become `QuantizeLinear` and `MatMulIntegerToFloat`, convolutions `QLinearConv` between bytes; a ReLU behind one is
its rounding to the unsigned range. What lies between stays fp32. Depthwise convolutions stay fp32: they have few products to
save, and one scale for many channels hurts them most (docs/adr/0014).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from app.types import Array
from exporters.graph_writer import HIGH, IN_FP32, LOW, ActivationRange, Quantization, bias_scale, quantized_bias, symmetric_int8
from exporters.whole_graph import OWN, constants, names_used, wanted_nodes
from models.manifest import LOGITS

MICROSOFT = "com.microsoft"
AXES_AS_INPUT = 18  # opset from which ReduceMin and ReduceMax take their axes as a tensor
BEHIND_CLASSIFIERS = {
    "Add",
    "Div",
    "Flatten",
    "GlobalAveragePool",
    "Identity",
    "Mul",
    "ReduceMean",
    "Relu",  # SqueezeNet has one there
    "Reshape",
    "Squeeze",
    "Sub",
}
INPUT, OUTPUT = ":input", ":output"  # behind a convolution's name: it has two ranges


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer or a convolution, with what goes into it."""

    name: str  # of its node
    kind: str  # "linear" or "conv"
    node: NodeProto
    weight: Array  # float32: linear (in, out), convolution (out, in, k, k)
    bias: Array  # float32 (out,)
    absorbed: NodeProto | None  # the addition of a bias, or a ReLU, right behind it

    @property
    def source(self) -> str:
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        return str((self.absorbed or self.node).output[0])


def layers_of(model: ModelProto) -> list[Layer]:
    """All that can be INT8, in their order; what classifies is left out."""
    weights, consumers = constants(model), _consumers(model)
    outputs = {value.name for value in model.graph.output}
    makers = {name: node for node in model.graph.node for name in node.output}

    def behind(node: NodeProto) -> NodeProto | None:
        """What alone takes the result."""
        takers = consumers.get(node.output[0], [])
        return takers[0] if len(takers) == 1 and node.output[0] not in outputs else None

    found = []
    for node in model.graph.node:
        if node.op_type not in {"MatMul", "Gemm", "Conv"} or node.input[1] not in weights or node.input[0] in weights:
            continue
        if IN_FP32 in node.input[1] or _beside_softmax(node, makers, consumers):
            continue
        layer = _linear(node, weights, behind(node)) if node.op_type != "Conv" else _convolution(node, weights, behind(node))
        if layer is not None:
            found.append(layer)
    last = _classifiers(model)
    return [layer for layer in found if layer.name not in last]


def _beside_softmax(node: NodeProto, makers: Mapping[str, NodeProto], consumers: Mapping[str, list[NodeProto]]) -> bool:
    """Heads of attention that talk: what they work on is small, and a step of INT8 is not."""
    before = makers.get(node.input[0])
    after = consumers.get(node.output[0], [])
    return (before is not None and before.op_type == "Softmax") or any(each.op_type == "Softmax" for each in after)


def _classifiers(model: ModelProto) -> set[str]:
    """What nothing but sums, means and shapes separates from the logits: it is tiny, and confidences come from it."""
    makers = {name: node for node in model.graph.node for name in node.output}
    waiting, found, seen = [LOGITS], set(), set()
    while waiting:
        node = makers.get(name := waiting.pop())
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in {"MatMul", "Gemm", "Conv"}:
            found.add(node.name)
        elif node.op_type in BEHIND_CLASSIFIERS:
            waiting += node.input
    return found


def exposed(model: ModelProto, layers: Sequence[Layer]) -> ModelProto:
    """The graph with the extremes that calibration wants as outputs."""
    graph = ModelProto()
    graph.CopyFrom(model)
    for layer in layers:
        if layer.kind == "linear":
            _expose(graph, layer.name, layer.source, len(layer.weight))
        else:
            _expose(graph, layer.name + INPUT, layer.source, 1)
            _expose(graph, layer.name + OUTPUT, layer.output, 1)
    return graph


def quantized(model: ModelProto, layers: Sequence[Layer], ranges: Mapping[str, ActivationRange]) -> ModelProto:
    """The graph with the layers that have ranges in INT8; a convolution needs both of its own."""
    rewriter = _Rewriter(model)
    chosen: dict[str, Layer] = {}
    skipped: set[str] = set()
    for layer in layers:
        if all(name in ranges for name in range_names(layer)):
            chosen[layer.name] = layer
            if layer.absorbed is not None:
                skipped.add(layer.absorbed.name)
    for node in model.graph.node:
        if node.name in skipped:
            continue
        if node.name not in chosen:
            rewriter.keep(node)
        elif chosen[node.name].kind == "linear":
            rewriter.linear(chosen[node.name], ranges[node.name])
        else:
            rewriter.convolution(chosen[node.name], ranges[node.name + INPUT], ranges[node.name + OUTPUT])
    return rewriter.model()


def range_names(layer: Layer) -> tuple[str, ...]:
    """What calibration must know of a layer."""
    return (layer.name,) if layer.kind == "linear" else (layer.name + INPUT, layer.name + OUTPUT)


@dataclass
class _Rewriter:
    """Nodes of the new graph, one after the other."""

    original: ModelProto
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    as_bytes: dict[tuple[str, float, int], str] = field(default_factory=dict)  # (tensor, scale, zero point) -> its bytes

    def keep(self, node: NodeProto) -> None:
        """As it is."""
        self.nodes.append(node)

    def linear(self, layer: Layer, known: ActivationRange) -> None:
        """x @ weight + bias."""
        name, outliers = layer.name, [*known.outliers]
        weight = layer.weight.copy()
        weight[outliers] = 0  # whatever they saturate at counts for nothing
        integers, scale = symmetric_int8(weight, axis=0)
        quantization = known.scale_and_zero_point()
        inputs = [
            self._bytes(layer.source, quantization),
            self._weight(f"{name}.weight", integers),
            self._scale(quantization),
            self._weight(f"{name}.weight_scale", scale),
            self._zero_point(quantization),
            "",  # weights are symmetric
            self._weight(f"{name}.bias", layer.bias),
        ]
        product = f"{OWN}{name}.product" if outliers else layer.output
        self._node("MatMulIntegerToFloat", inputs, product, domain=MICROSOFT)
        if outliers:
            chosen = self._weight(f"{name}.outliers", np.array(outliers))
            taken = self._node("Gather", [layer.source, chosen], f"{OWN}{name}.taken", axis=-1)
            apart = self._weight(f"{name}.weight_of_outliers", layer.weight[outliers])
            self._node("Add", [product, self._node("MatMul", [taken, apart], f"{OWN}{name}.apart")], layer.output)

    def convolution(self, layer: Layer, taken: ActivationRange, given: ActivationRange) -> None:
        """Bytes to bytes, and floats again for whoever wants them."""
        name, before, after = layer.name, taken.scale_and_zero_point(), given.scale_and_zero_point()
        integers, scale = symmetric_int8(layer.weight, axis=(1, 2, 3), at_least=bias_scale(layer.bias, before[0]))
        inputs = [
            self._bytes(layer.source, before),
            self._scale(before),
            self._zero_point(before),
            self._weight(f"{name}.weight", integers),
            self._weight(f"{name}.weight_scale", scale),
            self._weight(f"{name}.weight_zero_point", np.zeros(len(scale), dtype=np.int8)),
            self._scale(after),
            self._zero_point(after),
            self._weight(f"{name}.bias", quantized_bias(layer.bias, before[0] * scale)),
        ]
        attributes = {each.name: helper.get_attribute_value(each) for each in layer.node.attribute}
        result = self._node("QLinearConv", inputs, f"{OWN}{layer.output}.bytes", **attributes)
        self.as_bytes[layer.output, float(after[0]), int(after[1])] = result
        self._node("DequantizeLinear", [result, self._scale(after), self._zero_point(after)], layer.output)

    def model(self) -> ModelProto:
        """The new graph; weights and nodes that nothing wants any more are gone."""
        graph = ModelProto()
        graph.CopyFrom(self.original)
        nodes = wanted_nodes(self.nodes, {value.name for value in graph.graph.output})
        taken = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in graph.graph.initializer if tensor.name in taken]
        del graph.graph.initializer[:], graph.graph.node[:], graph.graph.value_info[:]
        graph.graph.initializer.extend(kept)
        graph.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in self.weights.items())
        graph.graph.node.extend(nodes)
        if MICROSOFT not in {opset.domain for opset in graph.opset_import}:
            graph.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        return graph

    def _bytes(self, tensor: str, known: Quantization) -> str:
        key = tensor, float(known[0]), int(known[1])
        if key not in self.as_bytes:
            inputs = [tensor, self._scale(known), self._zero_point(known)]
            self.as_bytes[key] = self._node("QuantizeLinear", inputs, f"{OWN}{tensor}.bytes_{len(self.as_bytes)}")
        return self.as_bytes[key]

    def _scale(self, known: Quantization) -> str:
        return self._weight(f"scale_{float(known[0])!r}", np.array(known[0], dtype=np.float32))

    def _zero_point(self, known: Quantization) -> str:
        return self._weight(f"zero_point_{int(known[1])}", np.array(known[1], dtype=np.uint8))

    def _weight(self, name: str, value: Array) -> str:
        self.weights[OWN + name] = value
        return OWN + name

    def _node(self, kind: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, [*inputs], [output], name=f"{output}.{kind}", domain=domain, **attributes))
        return output


def _linear(node: NodeProto, weights: Mapping[str, Array], behind: NodeProto | None) -> Layer | None:
    weight = weights[node.input[1]]
    if weight.ndim != 2 or weight.dtype != np.float32:
        return None
    bias, absorbed = np.zeros(weight.shape[1], dtype=np.float32), None
    if node.op_type == "Gemm":
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1 or attributes.get("beta", 1.0) != 1:
            return None
        weight = weight.T if attributes.get("transB", 0) else weight
        bias = np.zeros(weight.shape[1], dtype=np.float32)
        if len(node.input) > 2 and node.input[2]:
            if node.input[2] not in weights or weights[node.input[2]].shape != bias.shape:
                return None
            bias = weights[node.input[2]]
    elif behind is not None and behind.op_type == "Add":
        added = [weights[name] for name in behind.input if name in weights]
        if added and added[0].shape == bias.shape:
            bias, absorbed = added[0], behind
    return Layer(node.name, "linear", node, np.ascontiguousarray(weight), bias, absorbed)


def _convolution(node: NodeProto, weights: Mapping[str, Array], behind: NodeProto | None) -> Layer | None:
    weight = weights[node.input[1]]
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if weight.ndim != 4 or weight.dtype != np.float32 or attributes.get("group", 1) != 1:
        return None
    bias = np.zeros(len(weight), dtype=np.float32)
    if len(node.input) > 2 and node.input[2]:
        if node.input[2] not in weights:
            return None
        bias = weights[node.input[2]]
    relu = behind if behind is not None and behind.op_type == "Relu" else None
    return Layer(node.name, "conv", node, weight, bias, relu)


def _expose(graph: ModelProto, name: str, tensor: str, num_channels: int) -> None:
    """Extremes of each channel of the last axis, (C,), or of all, (1,)."""
    version = next(opset.version for opset in graph.opset_import if opset.domain in {"", "ai.onnx"})
    shape, axes, rows = f"{OWN}{name}.rows_shape", f"{OWN}{name}.rows_axes", f"{OWN}{name}.rows"
    graph.graph.initializer.append(numpy_helper.from_array(np.array([-1, num_channels]), shape))
    graph.graph.node.append(helper.make_node("Reshape", [tensor, shape], [rows]))
    if version >= AXES_AS_INPUT:
        graph.graph.initializer.append(numpy_helper.from_array(np.array([0]), axes))
    for end, kind in ((LOW, "ReduceMin"), (HIGH, "ReduceMax")):
        if version >= AXES_AS_INPUT:
            node = helper.make_node(kind, [rows, axes], [name + end], keepdims=0)
        else:
            node = helper.make_node(kind, [rows], [name + end], axes=[0], keepdims=0)
        graph.graph.node.append(node)
        graph.graph.output.append(helper.make_tensor_value_info(name + end, TensorProto.FLOAT, [num_channels]))


def _consumers(model: ModelProto) -> dict[str, list[NodeProto]]:
    found: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in set(names_used(node)):
            found.setdefault(name, []).append(node)
    return found
