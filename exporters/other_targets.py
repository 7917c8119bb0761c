"""Variants for hardware other than the CPU that exports: the same graphs in half precision, and INT8 as QDQ pairs.

They are made by rewriting graphs that are validated already, and validated again here, on the CPU, where they are slow. How
fast they are on their own hardware only a measurement there tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from app.types import Array
from exporters.whole_graph import constants, names_used


def as_fp16(model: ModelProto) -> ModelProto:
    """Weights and all between in float16; what goes in and comes out stays as it is."""
    copy = ModelProto()
    copy.CopyFrom(model)  # the converter changes what it is given
    return convert_float_to_float16(copy, keep_io_types=True)  # type: ignore[no-any-return]  # without types


def as_qdq(model: ModelProto) -> ModelProto:
    """Products and convolutions of bytes as ONNX's own operators between `QuantizeLinear` and `DequantizeLinear`.

    It is the form that OpenVINO reads; ONNX Runtime's CPU has operators of its own for it (docs/adr/0005).
    """
    writer = _Writer(constants(model))
    for node in model.graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            writer.product(node)
        elif node.op_type == "QLinearConv":
            writer.convolution(node)
        elif node.op_type == "QLinearAdd":
            writer.sum(node)
        else:
            writer.nodes.append(node)
    used = {name for node in writer.nodes for name in names_used(node)}
    found = ModelProto()
    found.CopyFrom(model)
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    added = [numpy_helper.from_array(value, name) for name, value in writer.added.items()]
    del found.graph.initializer[:], found.graph.node[:], found.graph.value_info[:], found.opset_import[:]
    found.graph.initializer.extend([*kept, *added])
    found.graph.node.extend(writer.nodes)
    domains = {node.domain for node in writer.nodes} | {""}
    found.opset_import.extend(opset for opset in model.opset_import if opset.domain in domains)
    onnx.checker.check_model(found)
    return found


class _Writer:
    """Nodes of the new graph; what is dequantized once is not dequantized again."""

    def __init__(self, weights: dict[str, Array]) -> None:
        self.nodes: list[NodeProto] = []
        self.added: dict[str, Array] = {}
        self._weights = weights
        self._floats: dict[tuple[str, ...], str] = {}

    def product(self, node: NodeProto) -> None:
        """(A - zero) * scale @ (B - zero) * scale + bias."""
        a, b, a_scale, b_scale, a_zero, b_zero, bias = [*node.input, "", ""][:7]  # the last may be left out
        a, b = self._float([a, a_scale, a_zero]), self._float([b, b_scale, b_zero], axis=1)
        product = f"{node.output[0]}.product" if bias else node.output[0]
        self._node("MatMul", [a, b], product)
        if bias:
            self._node("Add", [product, bias], node.output[0])

    def convolution(self, node: NodeProto) -> None:
        """Bytes to bytes; the bias is int32 in units of both scales."""
        x, x_scale, x_zero, weight, scale, zero, y_scale, y_zero, bias = node.input
        inputs = [self._float([x, x_scale, x_zero]), self._float([weight, scale, zero], axis=0)]
        both = f"{bias}.scale"
        self.added[both] = self._weights[both] = (self._weights[x_scale] * self._weights[scale]).astype(np.float32)
        inputs.append(self._float([bias, both], axis=0))
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        self._node("Conv", inputs, f"{node.output[0]}.float", **attributes)
        self._node("QuantizeLinear", [f"{node.output[0]}.float", y_scale, y_zero], node.output[0])

    def sum(self, node: NodeProto) -> None:
        """Of bytes, as bytes."""
        inputs, output = node.input, node.output[0]
        self._node("Add", [self._float(inputs[:3]), self._float(inputs[3:6])], f"{output}.float")
        self._node("QuantizeLinear", [f"{output}.float", *inputs[6:]], output)

    def _float(self, inputs: Sequence[str], axis: int | None = None) -> str:
        """Dequantized; per channel along the axis where there is a scale for each."""
        named = tuple(name for name in inputs if name)  # a zero point of zero need not be said
        if named not in self._floats:
            per_channel = axis is not None and self._weights[inputs[1]].ndim == 1
            self._floats[named] = self._node(
                "DequantizeLinear", named, f"{'.'.join(named)}.float", **({"axis": axis} if per_channel else {})
            )
        return self._floats[named]

    def _node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, [*inputs], [output], name=f"{output}.{kind}", **attributes))
        return output
