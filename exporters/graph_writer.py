"""Writes an ONNX graph node by node; each method takes and gives names of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from app.types import Array

OPSET = 20  # the first with Gelu
MICROSOFT, MICROSOFT_OPSET = "com.microsoft", 1
IR_VERSION = 9  # of opset 20
INT8_MAX = 127  # symmetric weights: -127 .. 127
UINT8_MAX = 255
LAST = 2**31 - 1  # as the end of a slice: all that there is
SMALLEST_SCALE = 1e-18  # of activations and of weights: their product is still a float32

IN_FP32 = ".in_fp32"  # in the name of weights inside attention: a step of INT8 is as large as what they work on
LOW, HIGH, MEAN = ".low", ".high", ".mean"  # behind a layer's name: the extremes that calibration wants, and the mean
ERRORS = ".errors"  # and what each of `REACHES` would do
REACHES = (1.0, 0.7, 0.5, 0.35, 0.25)  # of bytes for weights of attention: larger ones are taken for this

REDUCTIONS_KEY = "fovea.token_reductions"  # in a model's metadata: a list of `ReductionNote`, as JSON

Shape = tuple[int | str, ...]
Quantization = tuple[np.float32, np.uint8]  # scale and zero point


@dataclass(frozen=True, slots=True)
class ActivationRange:
    """Smallest and largest value that the input of a linear layer, or the output of a convolution, took in calibration.

    Outliers are input channels of a linear layer that range far beyond the others: they are left out of the range, and their
    part of the product stays fp32 (Dettmers et al., LLM.int8(), NeurIPS 2022; here chosen once, by calibration). So may the
    product of the tokens in front, of which the answer is made: what rounding does to a class token stays in it.
    """

    low: float
    high: float
    outliers: tuple[int, ...] = ()
    exact_tokens: int = 0  # in front, of (B, N, C)

    def scale_and_zero_point(self) -> Quantization:
        """Affine u8 quantization in which 0 is exact, as padding and ReLU want it (Jacob et al., CVPR 2018)."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = (high - low) / UINT8_MAX
        if scale < SMALLEST_SCALE:  # one value only
            scale = 1.0
        return np.float32(scale), np.uint8(np.clip(round(-low / scale), 0, UINT8_MAX))

    def symmetric_scale(self) -> np.float32:
        """Of -127 .. 127, for what is multiplied from the right: the kernels want it signed and without a zero point."""
        return np.float32(max(-self.low, self.high, INT8_MAX * SMALLEST_SCALE) / INT8_MAX)


@dataclass(frozen=True, slots=True)
class ReductionNote:
    """What a graph tells of one reduction of its patches, so that they can be followed through it (`exporters.receipt`).

    method: as `models.token_reduction` calls it; patches: how many there were; keep: how many are left.
    order: name of the tensor that sorts patches, int64 (B, ·); nearest: of that which says what a patch goes into; "" where the
    method has none.
    """

    method: str
    patches: int
    keep: int
    order: str = ""
    nearest: str = ""


def symmetric_int8(weight: Array, axis: int | tuple[int, ...], *, at_least: Array | None = None) -> tuple[Array, Array]:
    """Weights in -127 .. 127, and the scale of each channel.

    Args:
        axis: over which a channel goes.
        at_least: no channel's scale is smaller, (channels,); see `bias_scale`.

    Returns:
        int8, in the shape of `weight`; float32 (channels,).
    """
    largest = np.abs(weight).max(axis=axis, keepdims=True)
    smallest = np.float64(SMALLEST_SCALE) if at_least is None else np.maximum(at_least, SMALLEST_SCALE).reshape(largest.shape)
    scale = np.maximum(largest / INT8_MAX, smallest).astype(np.float32)
    return np.clip(np.rint(weight / scale), -INT8_MAX, INT8_MAX).astype(np.int8), scale.reshape(-1)


def bias_scale(bias: Array, input_scale: np.float32) -> Array:
    """The smallest scale of a channel's weights with which its bias is an int32: a channel may be its bias alone."""
    smallest: Array = np.abs(bias.astype(np.float64)) / (float(input_scale) * (2**31 - 2**8))
    return smallest


def quantized_bias(bias: Array, scale: Array) -> Array:
    """int32, in units of scale (of what goes in, times that of the channel's weights)."""
    return np.rint(bias.astype(np.float64) / scale).astype(np.int32)


class GraphWriter:
    """Collects nodes and weights.

    Args:
        ranges: of each linear layer's input, by layer name; those named become INT8.
        expose: give the extremes of what each layer's range is made of as outputs, for calibration.
    """

    def __init__(self, ranges: Mapping[str, ActivationRange], *, expose: bool) -> None:
        self.ranges = ranges
        self._expose = expose
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, Array] = {}
        self._exposed: list[tuple[str, Shape]] = []
        self._reductions: list[ReductionNote] = []

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

    def symmetric(self, name: str, known: ActivationRange) -> tuple[str, str]:
        """Names of a scale and of the zero point of signed bytes."""
        zero = self.weight("zero_point_int8", np.array(0, dtype=np.int8))
        return self.weight(f"{name}_scale", np.array(known.symmetric_scale())), zero

    def integer_linear(self, x: str, x_names: tuple[str, str], weight: str, weight_scale: str, bias: str) -> str:
        """float32 x @ weight + bias: x unsigned bytes with scale and zero point, weight signed bytes with a scale a column."""
        inputs = x, weight, x_names[0], weight_scale, x_names[1], "", bias  # weights are symmetric
        return self.node("MatMulIntegerToFloat", *inputs, domain=MICROSOFT)

    def integer_product(self, a: str, a_names: tuple[str, str], b: str, b_names: tuple[str, str]) -> str:
        """float32 a @ b of unsigned and signed bytes, each with its scale and zero point."""
        return self.node("MatMulIntegerToFloat", a, b, a_names[0], b_names[0], a_names[1], b_names[1], domain=MICROSOFT)

    def note(self, reduction: ReductionNote) -> None:
        """Told in the model's metadata, in the order of the blocks."""
        self._reductions.append(reduction)

    def slice(self, x: str, start: int, end: int, *, axis: int, step: int = 1) -> str:
        """x[start:end:step] along an axis."""
        return self.node("Slice", x, *(self.constant([value]) for value in (start, end, axis, step)))

    def expose(self, name: str, x: str, *, num_channels: int = 0, mean: bool = False) -> None:
        """Give a tensor's smallest and largest value as outputs `name.low` and `name.high`, if that is wanted at all.

        The graph itself reduces them: what all layers take is far more memory than a run of the network needs.

        Args:
            num_channels: where given, those of each channel of the last axis, (C,).
            mean: give the mean too, as `name.mean`.
        """
        if not self._expose:
            return
        rows = self.node("Reshape", x, self.constant([-1, max(1, num_channels)]))
        wanted = [(LOW, "ReduceMin"), (HIGH, "ReduceMax"), *([(MEAN, "ReduceMean")] if mean else [])]
        for end, kind in wanted:
            value = self.node(kind, rows, self.constant([0]), output=f"{name}{end}", keepdims=0)
            self._exposed.append((value, (max(1, num_channels),)))

    def expose_errors(self, name: str, weights: str, values: str) -> None:
        """Give, as output `name.errors`, how far what is gathered would be off with bytes that reach so far, (len(REACHES),).

        Args:
            weights: in [0, 1], a row's sum is 1, (B, heads, N, N).
            values: (B, heads, N, d); they will be centred.
        """
        if not self._expose:
            return
        self.expose(name, weights)
        centred = self.node("Sub", values, self.node("ReduceMean", values, self.constant([0, 2]), keepdims=1))
        errors = []
        for reach in REACHES:
            names = self.quantization(f"reach_{reach}", ActivationRange(0.0, reach).scale_and_zero_point())
            rounded = self.node("DequantizeLinear", self.node("QuantizeLinear", weights, *names), *names)
            off = self.node("MatMul", self.node("Sub", rounded, weights), centred)
            errors.append(self.node("Reshape", self.node("ReduceSumSquare", off, keepdims=0), self.constant([1])))
        self._exposed.append((self.node("Concat", *errors, output=f"{name}{ERRORS}", axis=0), (len(REACHES),)))

    def linear(self, name: str, x: str, weight: Array, bias: Array) -> str:
        """x @ weight + bias; weight float32 (in, out), bias float32 (out,)."""
        return self.linears(name, x, weight, bias, [""])[0]

    def linears(self, name: str, x: str, weight: Array, bias: Array, parts: Sequence[str]) -> list[str]:
        """x @ weight + bias in equal parts of the columns, a product each: to split one product would copy it.

        Args:
            parts: what of a weight's name stands behind that of the layer, for each part.
        """
        self.expose(name, x, num_channels=len(weight))
        pieces = [*zip(parts, np.split(weight, len(parts), axis=1), np.split(bias, len(parts)), strict=True)]
        if name not in self.ranges:
            products = [self.node("MatMul", x, self.weight(f"{name}{part}.weight", w)) for part, w, _ in pieces]
            added = zip(products, pieces, strict=True)
            return [self.node("Add", product, self.weight(f"{name}{part}.bias", b)) for product, (part, _, b) in added]
        outliers = [*self.ranges[name].outliers]
        a_names = self.quantization(f"{name}.input", self.ranges[name].scale_and_zero_point())
        x_bytes = self.node("QuantizeLinear", x, *a_names)
        taken = self.node("Gather", x, self.constant(outliers), axis=-1) if outliers else ""
        found = []
        for part, w, b in pieces:
            inside = w.copy()
            inside[outliers] = 0  # whatever they saturate at counts for nothing
            integers, scale = symmetric_int8(inside, axis=0)
            names = self.weight(f"{name}{part}.weight", integers), self.weight(f"{name}{part}.weight_scale", scale)
            product = self.integer_linear(x_bytes, a_names, *names, self.weight(f"{name}{part}.bias", b))
            if outliers:
                apart = self.weight(f"{name}{part}.weight_of_outliers", w[outliers])
                product = self.node("Add", product, self.node("MatMul", taken, apart))
            if count := self.ranges[name].exact_tokens:
                exact = self.weight(f"{name}{part}.weight_of_tokens", w), self.weight(f"{name}{part}.bias", b)
                front = self.node("Add", self.node("MatMul", self.slice(x, 0, count, axis=1), exact[0]), exact[1])
                product = self.node("Concat", front, self.slice(product, count, LAST, axis=1), axis=1)
            found.append(product)
        return found

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
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, MICROSOFT_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fovea")
        if self._reductions:
            helper.set_model_props(model, {REDUCTIONS_KEY: json.dumps([asdict(each) for each in self._reductions])})
        onnx.checker.check_model(model)
        return model
