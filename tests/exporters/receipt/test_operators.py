"""Time by operator."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from exporters.receipt.operators import milliseconds_by_operator


def test_each_kind_of_operator_is_told_once_the_largest_first() -> None:
    """Two products and a much cheaper sum."""
    square = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [256, 256]) for name in ("x", "y")]
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["a"]),
        helper.make_node("Sin", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "x"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", 20)]
    graph = helper.make_model(helper.make_graph(nodes, "g", square[:1], square[1:]), opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(graph)

    found = milliseconds_by_operator(graph.SerializeToString(), {"x": np.ones((256, 256), np.float32)}, runs=3)

    assert set(found) == {"MatMul", "Sin"}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert all(ms > 0 for ms in found.values())
