"""The products of attention as ONNX nodes, in fp32 or INT8, and efficient attention (`models.efficient_attention`).

INT8: what a query and a key have in common is hardly hurt by it (docs/adr/0015). Weights of attention have no scale that suits
a row of 0.9 and zeros as well as one of two hundred 0.005: how far the bytes reach is chosen per block, by what gathering with
them does to values of the calibration images, and values are centred first (`exporters.equalization`), so that what rounding
takes from the sum of a row costs little.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from exporters.graph_writer import IN_FP32, GraphWriter
from models.efficient_attention import PERFORMER_FLOOR, PINV_ROUNDS, LinformerGather, NystromGather, PerformerGather

INT8_FROM_TOKENS = 96  # below, little is saved: 0.02 ms a block at 64 tokens (docs/adr/0015)
QUERY, KEY, VALUE, WEIGHT = ":q", ":k", ":v", ":weight"  # behind a product's name: what has a range


def by_head(graph: GraphWriter, x: str, heads: int, head_width: int, *, across: bool = False) -> str:
    """(B, N, heads * d) -> (B, heads, N, d), or (B, heads, d, N)."""
    x = graph.node("Reshape", x, graph.constant([0, 0, heads, head_width]))
    return graph.node("Transpose", x, perm=[0, 2, 3, 1] if across else [0, 2, 1, 3])


def scores(graph: GraphWriter, name: str, q: str, k: str, heads: int, head_width: int, *, small: bool) -> str:
    """q k^T by head, (B, heads, N, N).

    Args:
        q, k: (B, N, heads * d); the query is divided by sqrt(d) already.
        small: too small to be worth INT8.
    """
    if not small:
        graph.expose(f"{name}{QUERY}", q)
        graph.expose(f"{name}{KEY}", k)
    if f"{name}{QUERY}" not in graph.ranges:
        q, k = by_head(graph, q, heads, head_width), by_head(graph, k, heads, head_width, across=True)
        return graph.node("MatMul", q, k)
    q_names = graph.quantization(f"{name}.q", graph.ranges[f"{name}{QUERY}"].scale_and_zero_point())
    k_names = graph.symmetric(f"{name}.k", graph.ranges[f"{name}{KEY}"])
    q = by_head(graph, graph.node("QuantizeLinear", q, *q_names), heads, head_width)
    k = by_head(graph, graph.node("QuantizeLinear", k, *k_names), heads, head_width, across=True)
    return graph.integer_product(q, q_names, k, k_names)


def mix(graph: GraphWriter, name: str, weights: str, v: str, heads: int, head_width: int, *, small: bool) -> str:
    """What each head gathers, (B, heads, N, d).

    Args:
        weights: of attention, (B, heads, N, N); v: (B, N, heads * d).
        small: too small to be worth INT8.
    """
    if f"{name}{VALUE}" not in graph.ranges:
        values = by_head(graph, v, heads, head_width)
        if not small:
            graph.expose(f"{name}{VALUE}", v, num_channels=heads * head_width, mean=True)
            graph.expose_errors(f"{name}{WEIGHT}", weights, values)
        return graph.node("MatMul", weights, values)
    weight_names = graph.quantization(f"{name}.weight", graph.ranges[f"{name}{WEIGHT}"].scale_and_zero_point())
    v_names = graph.symmetric(f"{name}.v", graph.ranges[f"{name}{VALUE}"])
    values = by_head(graph, graph.node("QuantizeLinear", v, *v_names), heads, head_width)
    return graph.integer_product(graph.node("QuantizeLinear", weights, *weight_names), weight_names, values, v_names)


def gather_tokens(graph: GraphWriter, name: str, module: nn.Module, q: str, k: str, v: str) -> str:
    """What a query gathers, (B, heads, N, d).

    Args:
        q, v: (B, heads, N, d); k: (B, heads, d, N). The query is divided by sqrt(d) already.

    Raises:
        TypeError: no graph is known for such a module.
    """
    match module:
        case LinformerGather():
            return _linformer(graph, name, module, q, k, v)
        case PerformerGather():
            return _performer(graph, name, module, q, k, v)
        case NystromGather():
            return _nystrom(graph, name, module, q, k, v)
    raise TypeError(f"no graph is known for attention of the kind {type(module).__name__}")


def _linformer(graph: GraphWriter, name: str, module: LinformerGather, q: str, k: str, v: str) -> str:
    keys = graph.node(
        "MatMul", k, graph.weight(f"{name}{IN_FP32}.mix_keys", module.mix_keys.detach().numpy().T)
    )  # (B, heads, d, rank)
    values = graph.node("MatMul", graph.weight(f"{name}{IN_FP32}.mix_values", module.mix_values), v)
    return graph.node("MatMul", _softmax(graph, graph.node("MatMul", q, keys)), values)


def _performer(graph: GraphWriter, name: str, module: PerformerGather, q: str, k: str, v: str) -> str:
    # The query has all of 1 / sqrt(d) in it; the paper gives each its root.
    q = graph.node("Mul", q, graph.scalar(f"{name}.query_scale", 1 / module.scale))
    k = graph.node("Mul", k, graph.scalar(f"{name}.key_scale", module.scale))
    k = graph.node("Transpose", k, perm=[0, 1, 3, 2])
    directions = graph.weight(f"{name}{IN_FP32}.directions", module.directions.numpy().T)

    def features(x: str, over: list[int]) -> str:
        square = graph.node("ReduceSumSquare", x, graph.constant([-1]), keepdims=1)
        half = graph.node("Mul", square, graph.scalar("half", 0.5))
        exponent = graph.node("Sub", graph.node("MatMul", x, directions), half)
        largest = graph.node("ReduceMax", exponent, graph.constant(over), keepdims=1)
        feature = graph.node("Exp", graph.node("Sub", exponent, largest))
        return graph.node("Add", feature, graph.scalar("performer.floor", PERFORMER_FLOOR))

    asked, offered = features(q, [-1]), features(k, [-2, -1])
    offered_across = graph.node("Transpose", offered, perm=[0, 1, 3, 2])  # (B, heads, rank, N)
    total = graph.node("MatMul", asked, graph.node("ReduceSum", offered_across, graph.constant([-1]), keepdims=1))
    return graph.node("Div", graph.node("MatMul", asked, graph.node("MatMul", offered_across, v)), total)


def _nystrom(graph: GraphWriter, name: str, module: NystromGather, q: str, k: str, v: str) -> str:
    means = module.means.numpy()
    q_mean = graph.node("MatMul", graph.weight(f"{name}{IN_FP32}.means", means), q)  # (B, heads, rank, d)
    k_mean = graph.node("MatMul", k, graph.weight(f"{name}{IN_FP32}.means_across", means.T))  # (B, heads, d, rank)
    to_landmarks = _softmax(graph, graph.node("MatMul", q, k_mean))
    between = _softmax(graph, graph.node("MatMul", q_mean, k_mean))
    from_tokens = _softmax(graph, graph.node("MatMul", q_mean, k))
    inverse = _pinv(graph, between, len(means))
    return graph.node("MatMul", to_landmarks, graph.node("MatMul", inverse, graph.node("MatMul", from_tokens, v)))


def _pinv(graph: GraphWriter, matrix: str, size: int) -> str:
    """`models.efficient_attention.iterative_pinv`; the matrix is positive."""
    columns = graph.node("ReduceMax", graph.node("ReduceSum", matrix, graph.constant([-2]), keepdims=1), graph.constant([-1]))
    rows = graph.node("ReduceMax", graph.node("ReduceSum", matrix, graph.constant([-1]), keepdims=1), graph.constant([-2]))
    inverse = graph.node("Div", graph.node("Transpose", matrix, perm=[0, 1, 3, 2]), graph.node("Mul", columns, rows))
    identity = np.eye(size, dtype=np.float32)
    seven, fifteen, thirteen = (graph.weight(f"identity_{n}_{size}", n * identity) for n in (7, 15, 13))
    quarter = graph.scalar("quarter", 0.25)
    for _ in range(PINV_ROUNDS):
        product = graph.node("MatMul", matrix, inverse)
        inner = graph.node("Sub", fifteen, graph.node("MatMul", product, graph.node("Sub", seven, product)))
        outer = graph.node("Sub", thirteen, graph.node("MatMul", product, inner))
        inverse = graph.node("MatMul", graph.node("Mul", inverse, quarter), outer)
    return inverse


def _softmax(graph: GraphWriter, x: str) -> str:
    return graph.node("Softmax", x, axis=-1)
