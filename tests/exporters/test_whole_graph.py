"""Graphs of others are brought into the form that is served, or refused with what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters.whole_graph import GraphError, classifier, height_and_width, logits_of, multiply_adds, run, simplified, stage_of
from models.manifest import LOGITS, PIXELS, PreprocessSpec

WEIGHT = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
SPEC = PreprocessSpec(
    resize=6, crop=(6, 6), interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), layout="uint8_nhwc"
)


def others(
    *,
    shape: tuple[Any, ...] = (1, 3, 6, 6),
    kind: int = TensorProto.FLOAT,
    softmax: bool = False,
    names: tuple[str, str] = ("in", "out"),
) -> onnx.ModelProto:
    """A convolution and a mean, as somebody wrote it; Constant nodes instead of weights, a dead end, no names of nodes."""
    make = helper.make_node
    first, last = names
    nodes = [
        make("Constant", [], ["axes"], value=numpy_helper.from_array(np.array([2, 3]))),
        make("Conv", [first, "weight"], ["features"]),
        make("Relu", ["features"], ["unused"]),
        make("ReduceMean", ["features", "axes"], ["mean" if softmax else last], keepdims=0),
    ]
    if softmax:
        nodes.append(make("Softmax", ["mean"], [last], axis=-1))
    return helper.make_model(
        helper.make_graph(
            nodes,
            "theirs",
            [helper.make_tensor_value_info(first, kind, shape)],
            [helper.make_tensor_value_info(last, TensorProto.FLOAT, (shape[0], 4))],
            [numpy_helper.from_array(WEIGHT, "weight")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


@pytest.mark.parametrize("names", [("in", "out"), (LOGITS, PIXELS)])
def test_a_stage_takes_bytes_and_gives_the_same_logits(names: tuple[str, str]) -> None:
    """Normalisation is in the graph; a fixed batch becomes a free one; our names may have been theirs for other things."""
    pixels = np.random.default_rng(1).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    normal = ((pixels / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)).transpose(0, 3, 1, 2).astype(np.float32)
    theirs = others(names=names)
    expected = np.concatenate([run(theirs, {names[0]: normal[i : i + 1]})[names[1]] for i in range(5)])

    graph = simplified(classifier(theirs))
    stage = stage_of(graph, SPEC, 4)

    np.testing.assert_allclose(run(stage, {PIXELS: pixels})[LOGITS], expected, atol=1e-5)
    np.testing.assert_allclose(logits_of(graph, normal), expected, atol=1e-5)
    np.testing.assert_allclose(logits_of(graph, normal, at_once=False), expected, atol=1e-5)
    assert height_and_width(graph) == (6, 6)
    assert "Relu" not in {node.op_type for node in stage.graph.node}
    assert len({node.name for node in stage.graph.node}) == len(stage.graph.node)
    floats = stage_of(graph, SPEC.model_copy(update={"layout": "float32_nchw"}), 4)
    np.testing.assert_allclose(run(floats, {PIXELS: normal})[LOGITS], expected, atol=1e-5)


@pytest.mark.parametrize("behind", [[], ["Identity"], ["Reshape"], ["Flatten", "Identity"]])
def test_probabilities_are_turned_back_into_logits(behind: list[str]) -> None:
    """A softmax at the end is taken off, also before what changes nothing: exits have their own temperature."""
    normal = np.random.default_rng(1).normal(size=(2, 3, 6, 6)).astype(np.float32)
    probable = others(softmax=True)
    name = "out"
    for number, kind in enumerate(behind):
        probable.graph.node[-1].output[0] = f"p{number}"
        inputs = [f"p{number}", "as_it_is"] if kind == "Reshape" else [f"p{number}"]
        probable.graph.node.append(helper.make_node(kind, inputs, [name]))
    if "Reshape" in behind:
        probable.graph.initializer.append(numpy_helper.from_array(np.array([0, 4]), "as_it_is"))
    np.testing.assert_allclose(logits_of(classifier(probable), normal), logits_of(classifier(others()), normal), atol=1e-6)


def test_a_sigmoid_at_the_end_is_refused() -> None:
    """It says yes or no to each class, which is another task."""
    graph = others(softmax=True)
    graph.graph.node[-1].CopyFrom(helper.make_node("Sigmoid", ["mean"], ["out"]))
    with pytest.raises(GraphError, match="ends with a sigmoid"):
        classifier(graph)


def test_weights_that_are_listed_as_inputs_are_none() -> None:
    """As old exporters wrote them, and in an opset that knew no INT8."""
    graph = others()
    graph.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, WEIGHT.shape))
    graph.graph.node[-1].CopyFrom(helper.make_node("ReduceMean", ["features"], ["out"], axes=[2, 3], keepdims=0))
    graph.opset_import[0].version, graph.ir_version = 9, 3
    normal = np.random.default_rng(1).normal(size=(2, 3, 6, 6)).astype(np.float32)

    stage = stage_of(simplified(classifier(graph)), SPEC, 4)

    assert [value.name for value in stage.graph.input] == [PIXELS]
    assert stage.ir_version >= 4
    assert next(opset.version for opset in stage.opset_import if opset.domain == "") >= 13
    np.testing.assert_allclose(logits_of(classifier(graph), normal), logits_of(classifier(others()), normal), atol=1e-6)


def test_branches_see_renamed_tensors() -> None:
    """A tensor called as one of ours is renamed where a branch takes it from outside, too."""
    graph = others(names=("in", LOGITS))
    graph.graph.node[-1].output[0] = PIXELS  # their name for the mean
    make = helper.make_node

    def branch(kind: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(f"{kind}_out", TensorProto.FLOAT, None)
        return helper.make_graph([make(kind, [PIXELS], [f"{kind}_out"])], kind, [], [value])

    graph.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    graph.graph.node.append(make("If", ["yes"], [LOGITS], then_branch=branch("Neg"), else_branch=branch("Abs")))
    normal = np.random.default_rng(1).normal(size=(2, 3, 6, 6)).astype(np.float32)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)

    stage = stage_of(classifier(graph), SPEC, 4)

    expected = run(stage_of(classifier(others()), SPEC, 4), {PIXELS: pixels})[LOGITS]
    np.testing.assert_allclose(run(stage, {PIXELS: pixels})[LOGITS], -expected, atol=1e-6)
    np.testing.assert_allclose(logits_of(classifier(graph), normal), -logits_of(classifier(others()), normal), atol=1e-6)


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (others(shape=(1, 6, 6, 3)), r"float32 \(batch, 3, height, width\)"),
        (others(kind=TensorProto.DOUBLE), "in is DOUBLE"),
        (others(shape=("B", 3, "H", "W")), "leaves height and width open"),
        (others(shape=(1, 3, 6)), "in is FLOAT"),
    ],
)
def test_what_is_no_classifier_of_pictures_is_refused(graph: onnx.ModelProto, words: str) -> None:
    """With what it takes."""
    with pytest.raises(GraphError, match=words):
        classifier(graph)


def test_several_outputs_are_named() -> None:
    """Which of them would be the answer?"""
    graph = others()
    graph.graph.output.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, None))
    with pytest.raises(GraphError, match="one input and one output, and this has in, out, features"):
        classifier(graph)


def test_a_graph_that_does_not_run_says_so() -> None:
    """With ONNX Runtime's words."""
    graph = others()
    graph.graph.node[1].op_type = "Convolve"
    with pytest.raises(GraphError, match="does not take the graph"):
        simplified(graph)
    with pytest.raises(GraphError, match="does not run"):
        run(others(), {"in": np.zeros((1, 3, 5), np.float32)})


def test_multiply_adds_are_those_of_the_shapes_that_come() -> None:
    """A convolution of 4 x 4 places; a product of two activations; a linear layer with its weights turned."""
    make = helper.make_node
    nodes = [
        make("Conv", ["in", "weight"], ["x0"]),  # (B, 4, 4, 4): 64 x 27
        make("Reshape", ["x0", "rows"], ["x1"]),  # (B, 4, 16)
        make("Transpose", ["x1"], ["x2"], perm=[0, 2, 1]),
        make("MatMul", ["x1", "x2"], ["x3"]),  # (B, 4, 4): 16 x 16
        make("Reshape", ["x3", "flat"], ["x4"]),
        make("Gemm", ["x4", "w"], ["out"], transB=1),  # 7 x 16
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("in", TensorProto.FLOAT, ("B", 3, 6, 6))],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, ("B", 7))],
            [
                numpy_helper.from_array(value, name)
                for name, value in {
                    "weight": WEIGHT,
                    "rows": np.array([0, 4, 16]),
                    "flat": np.array([0, 16]),
                    "w": np.ones((7, 16), np.float32),
                }.items()
            ],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    assert multiply_adds(stage_of(classifier(model), SPEC, 7)) == 64 * 27 + 16 * 16 + 7 * 16
