"""Graphs run one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort


def with_outputs(
    graphs: Sequence[onnx.ModelProto], values: Mapping[str, np.ndarray], wanted: Sequence[str]
) -> list[np.ndarray]:
    """These outputs of the last."""
    for graph in graphs:
        session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_outputs()]
        taken = {node.name: values[node.name] for node in session.get_inputs()}
        values = dict(zip(names, session.run(names, taken), strict=True))
    return [values[name] for name in wanted]
