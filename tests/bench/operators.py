"""Where the time of a graph goes: by operator, and against what the CPU could do if there were only products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from app.types import Array
from exporters.receipt.operators import milliseconds_by_operator
from models.manifest import PIXELS
from tests.bench.graphs import session

PRODUCTS = {"MatMul", "FusedMatMul", "MatMulIntegerToFloat", "Gemm", "Conv", "QLinearConv"}
SIDE = 1024  # of the square matrices whose product is the limit


def gflops(*, integers: bool, seconds: float = 1.0) -> float:
    """What one thread reaches in a product of large square matrices: floats, or unsigned with signed bytes."""
    random = np.random.default_rng(0)
    nodes, weights = [], {}
    if integers:
        weights["w"] = random.integers(-127, 128, (SIDE, SIDE), dtype=np.int8)
        weights |= {"scale": np.float32(0.01), "zero": np.uint8(128)}
        nodes.append(
            helper.make_node("MatMulIntegerToFloat", ["x", "w", "scale", "scale", "zero"], ["y"], domain="com.microsoft")
        )
        x: Array = random.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    else:
        weights["w"] = random.random((SIDE, SIDE), dtype=np.float32)
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
        x = random.random((SIDE, SIDE), dtype=np.float32)
    kind = TensorProto.UINT8 if integers else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", kind, [SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [SIDE, SIDE])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    product = session(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        started = time.perf_counter()
        product.run(None, {"x": x})
        times.append(time.perf_counter() - started)
    return 2 * SIDE**3 / statistics.median(times) / 1e9


def profile_table(graphs: Mapping[str, onnx.ModelProto], gmacs: Mapping[str, float], pixels: Array) -> str:
    """Markdown: a column a graph, a row an operator; at the end what its products would take at the limit.

    Args:
        graphs: by name; those called fp32 are held to the limit of floats, the others to that of bytes.
        gmacs: of each, by the same names.
        pixels: one batch.
    """
    limits = {name: gflops(integers=not name.startswith("fp32")) for name in graphs}
    times = {name: milliseconds_by_operator(graph.SerializeToString(), {PIXELS: pixels}) for name, graph in graphs.items()}
    kinds = list(dict.fromkeys(kind for each in times.values() for kind in each))
    totals = {name: sum(each.values()) for name, each in times.items()}
    kinds = [kind for kind in kinds if any(times[name].get(kind, 0) > 0.005 * totals[name] for name in graphs)]
    rows: list[Sequence[str]] = [("operator, ms an image", *graphs), ["---"] * (1 + len(graphs))]
    for kind in kinds:
        cells = (times[name].get(kind, 0) for name in graphs)
        rows.append((kind, *(f"{ms:.2f}" if ms else "" for ms in cells)))
    rows.append(("all", *(f"{totals[name]:.2f}" for name in graphs)))
    rows.append(("products alone", *(f"{sum(times[n].get(kind, 0) for kind in PRODUCTS):.2f}" for n in graphs)))
    floor = {name: 2000 * gmacs[name] / limits[name] for name in graphs}
    rows.append(("products at the CPU's limit", *(f"{floor[name]:.2f}" for name in graphs)))
    rows.append(("limit, GFLOP/s", *(f"{limits[name]:.0f}" for name in graphs)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
