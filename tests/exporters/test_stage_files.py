"""Weights that several stages have are stored once, and read as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from exporters.stage_files import SHARED_FILE, write_stages


def stage(**weights: np.ndarray) -> onnx.ModelProto:
    """x + all of them."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 64]) for name in ("x", "y")]
    nodes = [helper.make_node("Sum", ["x", *weights], ["y"])]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_equal_weights_are_stored_once(tmp_path: Path) -> None:
    """Whatever they are called; small ones stay where they are, and what only one stage has does too."""
    random = np.random.default_rng(0)
    common, own = (random.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    small = np.float32(1)
    stages = [stage(a=common, s=small), stage(b=common, own=own, s=small)]

    write_stages(tmp_path / "fp32", stages)

    assert (tmp_path / "fp32" / SHARED_FILE).stat().st_size == common.nbytes
    x = random.standard_normal((64, 64)).astype(np.float32)
    for index, expected in enumerate((x + common + small, x + common + own + small)):
        path = tmp_path / "fp32" / f"stage_{index}.onnx"
        (y,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        np.testing.assert_allclose(y, expected, atol=1e-6)
        assert onnx.load(path).graph.initializer[0].raw_data == common.tobytes()
    assert stages[0].graph.initializer[0].raw_data  # what was given is as it was


def test_without_equal_weights_there_are_only_stages(tmp_path: Path) -> None:
    """No empty file beside them."""
    write_stages(tmp_path / "fp32", [stage(a=np.ones((64, 64), np.float32)), stage(b=np.zeros((64, 64), np.float32))])
    assert sorted(path.name for path in (tmp_path / "fp32").iterdir()) == ["stage_0.onnx", "stage_1.onnx"]
