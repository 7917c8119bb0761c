"""Writes an ONNX graph node by node; each method takes and gives names of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from app.types import Array
from models.manifest import BATCH

OPSET = 20  # the first with Gelu
MICROSOFT_OPSET = 1
IR_VERSION = 9  # of opset 20
INT8_MAX = 127  # symmetric weights: -127 .. 127
UINT8_MAX = 255

Shape = tuple[int | str, ...]
Quantization = tuple[np.float32, np.uint8]  # scale and zero point


@dataclass(frozen=True, slots=True)
class ActivationRange:
    """Smallest and largest value that the input of a linear layer, or the output of a convolution, took in calibration.

    Outliers are input channels of a linear layer that range far beyond the others: they are left out of the range, and their
    part of the product stays fp32 (Dettmers et al., LLM.int8(), NeurIPS 2022; here chosen once, by calibration).
    """

    low: float
    high: float
    outliers: tuple[int, ...] = ()

    def scale_and_zero_point(self) -> Quantization:
        """Affine u8 quantization in which 0 is exact, as padding and ReLU want it (Jacob et al., CVPR 2018)."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = (high - low) / UINT8_MAX or 1.0
        return np.float32(scale), np.uint8(np.clip(round(-low / scale), 0, UINT8_MAX))


class GraphWriter:
    """Collects nodes and weights.

    Args:
        ranges: of each linear layer's input, by layer name; those named become INT8.
        expose: give the input of each linear layer as an output called by the layer's name, for calibration.
    """

    def __init__(self, ranges: Mapping[str, ActivationRange], *, expose: bool) -> None:
        self.ranges = ranges
        self._expose = expose
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, Array] = {}
        self._exposed: list[tuple[str, Shape]] = []

    def node(self, kind: str, *inputs: str, output: str = "", domain: str = "", **attributes: Any) -> str:
        """A node of one output."""
        output = output or f"{kind.lower()}_{len(self._nodes)}"
        return self.nodes(kind, inputs, [output], domain=domain, **attributes)[0]

    def nodes(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node of several outputs, called as told; it is called as the first."""
        self._nodes.append(helper.make_node(kind, [*inputs], [*outputs], name=outputs[0], domain=domain, **attributes))
        return [*outputs]

    def weight(self, name: str, value: Array | Tensor) -> str:
        """A constant of that name."""
        array = value.detach().numpy() if isinstance(value, Tensor) else value
        self._weights[name] = np.asarray(array, order="C")  # ascontiguousarray would make a scalar an array
        return name

    def scalar(self, name: str, value: float) -> str:
        """float32 of no axis."""
        return self.weight(name, np.array(value, dtype=np.float32))

    def constant(self, values: Sequence[int]) -> str:
        """int64; equal ones are there once."""
        return self.weight("ints_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def quantization(self, name: str, known: Quantization) -> tuple[str, str]:
        """Names of a scale and a zero point."""
        return self.weight(f"{name}_scale", np.array(known[0])), self.weight(f"{name}_zero_point", np.array(known[1]))

    def slice(self, x: str, start: int, end: int, *, axis: int, step: int = 1) -> str:
        """x[start:end:step] along an axis."""
        return self.node("Slice", x, *(self.constant([value]) for value in (start, end, axis, step)))

    def expose(self, name: str, x: str, shape: Shape) -> None:
        """Give a tensor as an output of that name, if that is wanted at all."""
        if self._expose:
            self._exposed.append((self.node("Identity", x, output=name), shape))

    def linear(self, name: str, x: str, weight: Array, bias: Array) -> str:
        """x @ weight + bias; weight float32 (in, out), bias float32 (out,)."""
        self.expose(name, x, (BATCH, f"{name}.tokens", len(weight)))
        if name not in self.ranges:
            product = self.node("MatMul", x, self.weight(f"{name}.weight", weight))
            return self.node("Add", product, self.weight(f"{name}.bias", bias))
        outliers = [*self.ranges[name].outliers]
        apart, weight = weight[outliers], weight.copy()
        weight[outliers] = 0  # whatever they saturate at counts for nothing
        weight_scale = (np.abs(weight).max(axis=0) / INT8_MAX).clip(min=np.finfo(np.float32).tiny).astype(np.float32)
        quantized = np.clip(np.rint(weight / weight_scale), -INT8_MAX, INT8_MAX).astype(np.int8)
        a_scale, a_zero = self.quantization(f"{name}.input", self.ranges[name].scale_and_zero_point())
        product = self.node(
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
        if not outliers:
            return product
        taken = self.node("Gather", x, self.constant(outliers), axis=-1)
        return self.node("Add", product, self.node("MatMul", taken, self.weight(f"{name}.weight_of_outliers", apart)))

    def model(self, inputs: Sequence[tuple[str, int, Shape]], outputs: Sequence[tuple[str, Shape]]) -> onnx.ModelProto:
        """The checked model; inputs are name, ONNX's number of the type, and shape."""
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (*outputs, *self._exposed)]
        graph = helper.make_graph(
            self._nodes,
            "stage",
            [helper.make_tensor_value_info(*each) for each in inputs],
            values,
            [numpy_helper.from_array(np.asarray(value), name) for name, value in self._weights.items()],
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", MICROSOFT_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fovea")
        onnx.checker.check_model(model)
        return model
