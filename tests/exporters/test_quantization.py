"""INT8 of any graph: near fp32, bytes from convolution to convolution, and only where it should be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters.calibration import collect_ranges
from exporters.config import CalibrationConfig
from exporters.graph_writer import ActivationRange, bias_scale, quantized_bias, symmetric_int8
from exporters.quantization import exposed, layers_of, quantized, range_names
from exporters.whole_graph import run
from models.manifest import LOGITS, PIXELS

RNG = np.random.default_rng(0)


def graph(nodes: list[Any], weights: dict[str, Any], *, opset: int = 20) -> onnx.ModelProto:
    """`pixels` (B, 3, 8, 8) -> `logits`."""
    for index, node in enumerate(nodes):
        node.name = f"{node.op_type}_{index}"
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, ["B", 3, 8, 8])],
            [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["B", "C"])],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    return model


def draw(*shape: int) -> np.ndarray:
    """Weights of a layer that keeps the size of what goes through."""
    return (RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]) if len(shape) == 4 else shape[0])).astype(np.float32)


def network(opset: int = 20) -> onnx.ModelProto:
    """Two convolutions that follow each other, a depthwise one, two kinds of linear layers, and a classifier."""
    make = helper.make_node
    nodes = [
        make("Conv", [PIXELS, "c0", "b0"], ["x0"], pads=[1, 1, 1, 1]),
        make("Relu", ["x0"], ["x1"]),
        make("Conv", ["x1", "c1"], ["x2"], pads=[1, 1, 1, 1], strides=[2, 2]),
        make("Conv", ["x2", "c2"], ["x3"], pads=[1, 1, 1, 1], group=16),
        make("Reshape", ["x3", "rows"], ["x4"]),
        make("Transpose", ["x4"], ["x5"], perm=[0, 2, 1]),
        make("MatMul", ["x5", "w0"], ["x6"]),
        make("Add", ["b1", "x6"], ["x7"]),
        make("MatMul", ["x5", "w1"], ["x8"]),  # no bias, and the same input
        make("Add", ["x7", "x8"], ["x9"]),
        make("Reshape", ["x9", "flat"], ["x10"]),
        make("Gemm", ["x10", "w2", "b2"], ["x11"], transB=1),
        make("Tanh", ["x11"], ["x12"]),
        make("Gemm", ["x12", "w3"], [LOGITS]),
    ]
    weights = {
        "c0": draw(16, 3, 3, 3),
        "b0": draw(16, 1)[:, 0],
        "c1": draw(16, 16, 3, 3),
        "c2": draw(16, 1, 3, 3),
        "rows": np.array([0, 16, 16]),
        "w0": draw(16, 12),
        "b1": draw(12, 1)[:, 0],
        "w1": draw(16, 12),
        "flat": np.array([0, 192]),
        "w2": draw(192, 10).T.copy(),
        "b2": draw(10, 1)[:, 0],
        "w3": draw(10, 5),
    }
    return graph(nodes, weights, opset=opset)


def ranges_of(model: onnx.ModelProto, pixels: np.ndarray) -> dict[str, ActivationRange]:
    """By calibration."""
    return collect_ranges([exposed(model, layers_of(model))], pixels, CalibrationConfig(outliers=()))[0]


PICTURES = RNG.normal(size=(40, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("opset", [13, 20])
def test_int8_is_near_fp32_and_has_the_nodes_that_are_fast(opset: int) -> None:
    """Whatever the opset; the classifier and the depthwise convolution stay as they were."""
    model = network(opset)
    int8 = quantized(model, layers_of(model), ranges_of(model, PICTURES))
    onnx.checker.check_model(int8)

    mine, theirs = (run(each, {PIXELS: PICTURES})[LOGITS] for each in (int8, model))

    assert 0 < np.abs(mine - theirs).max() < 0.05 * np.ptp(theirs)
    kinds = Counter(node.op_type for node in int8.graph.node)
    assert kinds["MatMulIntegerToFloat"] == 3
    assert kinds["QLinearConv"] == 2
    assert (kinds["Conv"], kinds["Gemm"], kinds["Relu"], kinds["MatMul"]) == (1, 1, 0, 0)
    # The pixels, what the two MatMuls share, and what the Gemm takes; between the convolutions there are bytes already.
    assert kinds["QuantizeLinear"] == 3
    assert kinds["DequantizeLinear"] == 1
    assert {tensor.name for tensor in int8.graph.initializer} >= {"c2", "w3"}
    assert not {tensor.name for tensor in int8.graph.initializer} & {"c0", "c1", "w0", "w1", "w2"}


def test_an_answer_does_not_depend_on_its_neighbours() -> None:
    """Static ranges: bit for bit, whatever the batch."""
    model = network()
    int8 = quantized(model, layers_of(model), ranges_of(model, PICTURES))
    together = run(int8, {PIXELS: PICTURES})[LOGITS]
    alone = np.concatenate([run(int8, {PIXELS: PICTURES[i : i + 1]})[LOGITS] for i in range(8)])
    np.testing.assert_array_equal(together[:8], alone)


def test_layers_without_ranges_stay_as_they_were() -> None:
    """Nothing named, nothing changed; a convolution with half of its ranges is none."""
    model = network()
    layers, ranges = layers_of(model), ranges_of(model, PICTURES)
    untouched = quantized(model, layers, {})
    half = quantized(model, layers, {name: each for name, each in ranges.items() if name.endswith(":input")})

    assert [node.op_type for node in untouched.graph.node] == [node.op_type for node in model.graph.node]
    assert "QLinearConv" not in {node.op_type for node in half.graph.node}
    assert [range_names(layer) for layer in layers][:2] == [
        ("Conv_0:input", "Conv_0:output"),
        ("Conv_2:input", "Conv_2:output"),
    ]


def test_an_outlier_channel_is_kept_apart() -> None:
    """As in a ViT's own graph: its part of the product is fp32, and the others have their steps back."""
    model = network()
    layers, ranges = layers_of(model), ranges_of(model, PICTURES)
    first = next(layer.name for layer in layers if layer.kind == "linear")
    wide = {first: replace(ranges[first], low=-3000.0, high=3000.0)}
    apart = {first: replace(ranges[first], outliers=(3, 7))}
    exact = run(model, {PIXELS: PICTURES})[LOGITS]

    errors = [np.abs(run(quantized(model, layers, each), {PIXELS: PICTURES})[LOGITS] - exact).max() for each in (wide, apart)]

    assert errors[1] < errors[0] / 10
    kinds = Counter(node.op_type for node in quantized(model, layers, apart).graph.node)
    assert kinds["Gather"] == 1


def test_what_is_not_a_layer_of_ours_is_left_alone() -> None:
    """A product of two activations, weights of more than two axes, a scaled Gemm, weights on the left."""
    make = helper.make_node
    nodes = [
        make("Reshape", [PIXELS, "rows"], ["x0"]),
        make("Transpose", ["x0"], ["x1"], perm=[0, 2, 1]),
        make("MatMul", ["x0", "x1"], ["x2"]),
        make("MatMul", ["x2", "w0"], ["x3"]),
        make("MatMul", ["w3", "x3"], ["x4"]),
        make("Reshape", ["x4", "flat"], ["x5"]),
        make("Gemm", ["x5", "w1"], ["x6"], alpha=0.5),
        make("Tanh", ["x6"], ["x7"]),
        make("MatMul", ["x7", "w2"], [LOGITS]),
    ]
    weights = {
        "rows": np.array([0, 3, 64]),
        "w0": draw(3, 3)[None],
        "w3": draw(3, 3),
        "flat": np.array([0, 9]),
        "w1": draw(9, 4),
        "w2": draw(4, 2),
    }
    assert layers_of(graph(nodes, weights)) == []


def test_a_result_that_others_want_too_stays_what_it_was() -> None:
    """A residual beside a ReLU, a bias whose sum is not the only taker, weights that two layers share, odd paddings."""
    make = helper.make_node
    nodes = [
        make("Conv", [PIXELS, "c0", "b0"], ["x0"], pads=[1, 0, 1, 2], dilations=[1, 1]),
        make("Relu", ["x0"], ["x1"]),
        make("Conv", ["x1", "c1"], ["x2"], auto_pad="SAME_UPPER", strides=[1, 1]),
        make("Conv", ["x2", "c1"], ["x3"], pads=[2, 2, 2, 2], dilations=[2, 2]),
        make("Add", ["x0", "x3"], ["x4"]),  # before the ReLU
        make("GlobalAveragePool", ["x4"], ["x5"]),
        make("Reshape", ["x5", "flat"], ["x6"]),
        make("MatMul", ["x6", "w0"], ["x7"]),
        make("Add", ["x7", "b1"], ["x8"]),
        make("Mul", ["x7", "x8"], ["x9"]),
        make("Sigmoid", ["x9"], ["x10"]),
        make("Gemm", ["x10", "w1"], [LOGITS]),
    ]
    weights = {
        "c0": draw(8, 3, 3, 3),
        "b0": draw(8, 1)[:, 0],
        "c1": draw(8, 8, 3, 3),
        "flat": np.array([0, 8]),
        "w0": draw(8, 8) * 3,
        "b1": draw(8, 1)[:, 0],
        "w1": draw(8, 4) * 4,
    }
    model = graph(nodes, weights)
    layers = layers_of(model)
    assert [(layer.name, layer.absorbed) for layer in layers] == [
        ("Conv_0", None),
        ("Conv_2", None),
        ("Conv_3", None),
        ("MatMul_7", None),
    ]
    int8 = quantized(model, layers, ranges_of(model, PICTURES))
    onnx.checker.check_model(int8)

    mine, theirs = (run(each, {PIXELS: PICTURES})[LOGITS] for each in (int8, model))

    assert np.ptp(theirs) > 0.1
    assert 0 < np.abs(mine - theirs).max() < 0.05 * np.ptp(theirs)


def test_an_output_of_the_graph_is_not_absorbed() -> None:
    """What comes before the bias goes to the next stage as well."""
    make = helper.make_node
    nodes = [
        make("Reshape", [PIXELS, "rows"], ["x0"]),
        make("MatMul", ["x0", "w0"], ["asked"]),
        make("Add", ["asked", "b0"], ["x1"]),
        make("Tanh", ["x1"], ["x2"]),
        make("Reshape", ["x2", "flat"], ["x3"]),
        make("MatMul", ["x3", "w1"], [LOGITS]),
    ]
    weights = {"rows": np.array([0, 3, 64]), "w0": draw(64, 6), "b0": draw(6, 1)[:, 0]}
    weights |= {"flat": np.array([0, 18]), "w1": draw(18, 4)}
    model = graph(nodes, weights)
    assert [layer.absorbed is None for layer in layers_of(model)] == [False]
    model.graph.output.append(helper.make_tensor_value_info("asked", TensorProto.FLOAT, ["B", 3, 6]))

    layers = layers_of(model)
    int8 = quantized(model, layers, ranges_of(model, PICTURES))

    assert [layer.absorbed for layer in layers] == [None]
    assert set(run(int8, {PIXELS: PICTURES})) == {LOGITS, "asked"}


@pytest.mark.parametrize("kind", ["two heads", "a convolution"])
def test_what_classifies_stays_fp32(kind: str) -> None:
    """Two heads whose mean is taken; a 1 x 1 convolution that is pooled. A layer inside is INT8 nevertheless."""
    make = helper.make_node
    nodes = [make("Conv", [PIXELS, "c0"], ["x0"]), make("Tanh", ["x0"], ["x1"])]
    weights = {"c0": draw(8, 3, 3, 3), "flat": np.array([0, 8])}
    if kind == "two heads":
        nodes += [
            make("GlobalAveragePool", ["x1"], ["x2"]),
            make("Reshape", ["x2", "flat"], ["x3"]),
            make("Gemm", ["x3", "w0"], ["x4"]),
            make("Gemm", ["x3", "w1"], ["x5"]),
            make("Add", ["x4", "x5"], ["x6"]),
            make("Div", ["x6", "two"], [LOGITS]),
        ]
        weights |= {"w0": draw(8, 4), "w1": draw(8, 4), "two": np.float32(2)}
    else:
        nodes += [
            make("Conv", ["x1", "c1"], ["x2"]),
            make("GlobalAveragePool", ["x2"], ["x3"]),
            make("Reshape", ["x3", "flat4"], [LOGITS]),
        ]
        weights |= {"c1": draw(4, 8, 1, 1), "flat4": np.array([0, 4])}
    assert [layer.name for layer in layers_of(graph(nodes, weights))] == ["Conv_0"]


def test_a_channel_that_is_its_bias_alone_keeps_it() -> None:
    """Batch norms fold into channels without weights, or with tiny ones: their bias is what they say."""
    make = helper.make_node
    nodes = [
        make("Conv", [PIXELS, "c0", "b0"], ["x0"]),
        make("Tanh", ["x0"], ["x1"]),
        make("Reshape", ["x1", "flat"], ["x2"]),
        make("MatMul", ["x2", "w0"], [LOGITS]),
    ]
    kernels = draw(3, 3, 8, 8)
    kernels[1] *= 1e-9
    kernels[2] = 0
    bias = np.array([0.1, 0.3, -0.7], dtype=np.float32)
    identity = {"flat": np.array([0, 3]), "w0": np.eye(3, dtype=np.float32)}
    model = graph(nodes, {"c0": kernels, "b0": bias} | identity)
    int8 = quantized(model, layers_of(model), ranges_of(model, PICTURES))

    mine, theirs = (np.arctanh(run(each, {PIXELS: PICTURES})[LOGITS]) for each in (int8, model))

    np.testing.assert_allclose(theirs[:, 1:], np.broadcast_to(bias[1:], (len(PICTURES), 2)), atol=1e-5)
    np.testing.assert_allclose(mine, theirs, atol=0.05)


def test_a_channel_of_zeros_has_a_scale_that_can_be_divided_by() -> None:
    """And small ranges give scales whose product is a number still."""
    weight = np.array([[1.0, 0.0], [-2.0, 0.0]], dtype=np.float32)
    integers, scale = symmetric_int8(weight, axis=0)
    np.testing.assert_array_equal(integers, [[64, 0], [-127, 0]])
    assert scale[0] == pytest.approx(2 / 127)
    assert scale[1] > 0
    np.testing.assert_array_equal(quantized_bias(np.array([1.0, -3.0]), np.array([0.5, 0.25])), [2, -12])
    smallest = bias_scale(np.array([0.3]), np.float32(0.02))
    assert abs(int(quantized_bias(np.array([0.3]), np.float32(0.02) * smallest)[0])) < 2**31
    assert ActivationRange(0.0, 1e-40).scale_and_zero_point() == (1.0, 0)
