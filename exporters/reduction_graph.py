"""Token reduction (`models.token_reduction`) as ONNX nodes: shapes are static but for the batch, and no operator scatters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from exporters.graph_writer import GraphWriter, ReductionNote
from models.slow_fast import REMEMBERED
from models.token_reduction import CLUSTER_ROUNDS, INFORMATION, SIZE, TINY, TokenReduction


@dataclass(frozen=True, slots=True)
class Patches:
    """Names of what a reduction may want to know of a block.

    tokens: behind those in front, (B, M, D); sizes: theirs, (B, M, 1), or "" where every token stands for one patch;
    weights: of attention, of all tokens, (B, heads, N, N); keys: of all tokens, (B, N, heads * d).
    """

    tokens: str
    sizes: str
    weights: str
    keys: str
    num_heads: int
    num_prefix: int
    count: int  # M

    def class_attention(self, graph: GraphWriter) -> str:
        """How much the first token looks at each patch, (B, M)."""
        first = graph.slice(self.weights, 0, 1, axis=2)
        return self._of_patches(graph, first)

    def attention_received(self, graph: GraphWriter) -> str:
        """How much all tokens look at each patch, (B, M)."""
        return self._of_patches(graph, self.weights)

    def _of_patches(self, graph: GraphWriter, weights: str) -> str:
        looked_at = graph.slice(weights, self.num_prefix, self.num_prefix + self.count, axis=3)
        return graph.node("ReduceMean", looked_at, graph.constant([1, 2]), keepdims=0)

    def mean_keys(self, graph: GraphWriter) -> str:
        """Mean over the heads, (B, M, d)."""
        keys = graph.slice(self.keys, self.num_prefix, self.num_prefix + self.count, axis=1)
        keys = graph.node("Reshape", keys, graph.constant([0, 0, self.num_heads, -1]))
        return graph.node("ReduceMean", keys, graph.constant([2]), keepdims=0)


def reduce_patches(graph: GraphWriter, reduction: TokenReduction, patches: Patches) -> tuple[str, str]:
    """Tokens (B, keep, D), and their sizes (B, keep, 1) where the method tracks them, else "".

    Raises:
        NotImplementedError: the method has no graph.
    """
    method, keep, count = reduction.method, reduction.keep, patches.count
    match method:
        case "tome" | "mctf":
            likeness = _of_keys(graph, patches) if method == "tome" else _by_criteria(graph, patches)
            return _merge_likest(graph, method, patches, likeness, count - keep)
        case "evit":
            score, order = _sorted(graph, patches.class_attention(graph), count)
            graph.note(ReductionNote(method, count, keep, order))
            return _fuse(graph, patches, order, score, keep), ""
        case "tps":
            _, order = _sorted(graph, patches.class_attention(graph), count)
            return _squeeze(graph, patches, order, keep), ""
        case "token_pooling":
            return _pool_clusters(graph, patches, keep), ""
        case "top_k_attention":
            return _keep(graph, method, patches, patches.class_attention(graph), keep), ""
        case "top_k_norm":
            norm = graph.node("ReduceL2", patches.tokens, graph.constant([-1]), keepdims=0)
            return _keep(graph, method, patches, norm, keep), ""
    raise NotImplementedError(f"no graph is known for the token reduction {reduction.method!r}")


def top_k(graph: GraphWriter, score: str, keep: int) -> str:
    """Indices (B, keep) of the highest scores."""
    return _sorted(graph, score, keep)[1]


def _keep(graph: GraphWriter, method: str, patches: Patches, score: str, keep: int) -> str:
    """The patches of the highest scores, (B, keep, D)."""
    order = top_k(graph, score, keep)
    graph.note(ReductionNote(method, patches.count, keep, order))
    return take(graph, patches.tokens, order)


def _sorted(graph: GraphWriter, score: str, keep: int) -> tuple[str, str]:
    """The highest scores and their indices, each (B, keep), highest first."""
    names = [f"{score}.top_{keep}.values", f"{score}.top_{keep}.indices"]
    values, indices = graph.nodes("TopK", [score, graph.constant([keep])], names, axis=1)
    return values, indices


def take(graph: GraphWriter, x: str, index: str) -> str:
    """Rows of x (B, M, ...) at index (B, k)."""
    return graph.node("GatherND", x, graph.node("Unsqueeze", index, graph.constant([-1])), batch_dims=1)


@dataclass(frozen=True, slots=True)
class SplitPatches:
    """Names of what `models.slow_fast` computes and of what follows.

    slow: (B, computed + 1, D); rest: (B, M - computed, D); known, unseen: their importance, (B, computed), (B, M - computed).
    """

    slow: str
    rest: str
    known: str
    unseen: str


def split_patches(graph: GraphWriter, patches: str, importance: str, computed: int, count: int) -> SplitPatches:
    """Xu et al., AAAI 2022, section 3: the most important patches, one that stands for the others, and those.

    Args:
        graph: written to.
        patches: (B, M, D).
        importance: (B, M).
        computed: how many patches go through the block.
        count: M.
    """
    values, order = _sorted(graph, importance, count)
    kept, rest = (take(graph, patches, graph.slice(order, *ends, axis=1)) for ends in ((0, computed), (computed, count)))
    known, unseen = (graph.slice(values, *ends, axis=1) for ends in ((0, computed), (computed, count)))
    slow = graph.node("Concat", kept, _average(graph, rest, unseen), axis=1)
    return SplitPatches(slow, rest, known, unseen)


def remembered(graph: GraphWriter, importance: str, seen: str) -> str:
    """What a patch's importance is after a block that computed it, (B, k)."""
    before = graph.node("Mul", importance, graph.scalar("remembered", REMEMBERED))
    return graph.node("Add", before, graph.node("Mul", seen, graph.scalar("noticed", 1 - REMEMBERED)))


def _average(graph: GraphWriter, tokens: str, score: str) -> str:
    """Of tokens (B, r, D), weighted by score (B, r): (B, 1, D)."""
    share = graph.node("Div", score, graph.node("ReduceSum", score, graph.constant([1]), keepdims=1))
    return graph.node("MatMul", graph.node("Unsqueeze", share, graph.constant([1])), tokens)


def _put(graph: GraphWriter, destinations: str, count: int) -> str:
    """One-hot rows as a product's left side, (B, count, r): a product exports everywhere, scattering does not."""
    values = graph.weight("zero_and_one", np.array([0, 1], dtype=np.float32))
    one_hot = graph.node("OneHot", destinations, graph.constant([count]), values, axis=-1)
    return graph.node("Transpose", one_hot, perm=[0, 2, 1])


def _normalised(graph: GraphWriter, x: str) -> str:
    return graph.node("LpNormalization", x, axis=-1, p=2)


def _of_keys(graph: GraphWriter, patches: Patches) -> str:
    """Bolya et al., ICLR 2023, section 3: cosine of the keys of every second patch and of the others, (B, M // 2, ·)."""
    return _products(graph, _normalised(graph, patches.mean_keys(graph)), patches.count)


def _by_criteria(graph: GraphWriter, patches: Patches) -> str:
    """Lee et al., CVPR 2024, section 3.1: the product of likeness and both patches' readiness, likewise.

    With readiness r it is (cosine + 1) r r', so patches are divided by their length as r is multiplied in, and no copy of them
    is made for the 1.
    """
    told = graph.node("Max", patches.class_attention(graph), graph.scalar("tiny", TINY))
    ready = graph.node("Pow", told, graph.scalar("information", -INFORMATION))
    ready = graph.node("Unsqueeze", ready, graph.constant([-1]))
    if patches.sizes:
        ready = graph.node("Mul", ready, graph.node("Pow", patches.sizes, graph.scalar("size", -SIZE)))
    length = graph.node("ReduceL2", patches.tokens, graph.constant([-1]), keepdims=1)
    factor = graph.node("Div", ready, graph.node("Max", length, graph.scalar("tiny", TINY)))
    cosines = _products(graph, graph.node("Mul", patches.tokens, factor), patches.count)
    return graph.node("Add", cosines, _products(graph, ready, patches.count))


def _products(graph: GraphWriter, features: str, count: int) -> str:
    """Of every second patch and the others, (B, count // 2, (count + 1) // 2)."""
    found, looking = _halves(graph, features, count)
    return graph.node("MatMul", looking, graph.node("Transpose", found, perm=[0, 2, 1]))


def _merge_likest(graph: GraphWriter, method: str, patches: Patches, similarity: str, num_merged: int) -> tuple[str, str]:
    """Bolya et al., ICLR 2023, section 3: the pairs that are most alike, by (B, M // 2, (M + 1) // 2)."""
    count = patches.count
    num_found, num_looking = (count + 1) // 2, count // 2
    best = graph.node("ReduceMax", similarity, graph.constant([-1]), keepdims=0)
    nearest = graph.node("ArgMax", similarity, axis=-1, keepdims=0)
    _, order = _sorted(graph, best, num_looking)
    sources = graph.slice(order, 0, num_merged, axis=1)
    unmatched = graph.slice(order, num_merged, num_looking, axis=1)
    graph.note(ReductionNote(method, count, count - num_merged, order, nearest))
    put = _put(graph, take(graph, nearest, sources), num_found)  # (B, found, r)

    found = graph.slice(patches.tokens, 0, count, axis=1, step=2)
    merged, left = (take(graph, patches.tokens, _odd(graph, each)) for each in (sources, unmatched))
    if patches.sizes:
        before = graph.slice(patches.sizes, 0, count, axis=1, step=2)
        brought, kept = (take(graph, patches.sizes, _odd(graph, each)) for each in (sources, unmatched))
        put = graph.node("Mul", put, graph.node("Transpose", brought, perm=[0, 2, 1]))
    else:
        before = graph.scalar("one", 1)
        is_one = graph.node("GreaterOrEqual", unmatched, graph.constant([0]))
        kept = graph.node("Unsqueeze", graph.node("Cast", is_one, to=TensorProto.FLOAT), graph.constant([-1]))
    # A mean weighted by size; the weights are divided by their sum, for they are fewer than the features.
    now = graph.node("Add", before, graph.node("ReduceSum", put, graph.constant([-1]), keepdims=1))
    of_found = graph.node("Mul", found, graph.node("Div", before, now))
    total = graph.node("Add", of_found, graph.node("MatMul", graph.node("Div", put, now), merged))
    return graph.node("Concat", left, total, axis=1), graph.node("Concat", kept, now, axis=1)


def _odd(graph: GraphWriter, index: str) -> str:
    """Which patch the one is of every second, int64."""
    return graph.node("Add", graph.node("Mul", index, graph.constant([2])), graph.constant([1]))


def _halves(graph: GraphWriter, x: str, count: int) -> tuple[str, str]:
    """Even and odd patches."""
    return graph.slice(x, 0, count, axis=1, step=2), graph.slice(x, 1, count, axis=1, step=2)


def _fuse(graph: GraphWriter, patches: Patches, order: str, score: str, keep: int) -> str:
    """Liang et al., ICLR 2022, section 3.2."""
    kept = graph.slice(order, 0, keep - 1, axis=1)
    rest = graph.slice(order, keep - 1, patches.count, axis=1)
    fused = _average(graph, take(graph, patches.tokens, rest), graph.slice(score, keep - 1, patches.count, axis=1))
    return graph.node("Concat", take(graph, patches.tokens, kept), fused, axis=1)


def _squeeze(graph: GraphWriter, patches: Patches, order: str, keep: int) -> str:
    """Wei et al., CVPR 2023, equations 5 to 7."""
    kept = take(graph, patches.tokens, graph.slice(order, 0, keep, axis=1))
    rest = take(graph, patches.tokens, graph.slice(order, keep, patches.count, axis=1))
    transposed = graph.node("Transpose", _normalised(graph, kept), perm=[0, 2, 1])
    cosine = graph.node("MatMul", _normalised(graph, rest), transposed)
    share = graph.node("Exp", graph.node("ReduceMax", cosine, graph.constant([-1]), keepdims=1))  # (B, r, 1)
    nearest = graph.node("ArgMax", cosine, axis=-1, keepdims=0)
    graph.note(ReductionNote("tps", patches.count, keep, order, nearest))
    put = _put(graph, nearest, keep)
    own = graph.scalar("e", np.e)
    mixed = graph.node("Add", graph.node("Mul", kept, own), graph.node("MatMul", put, graph.node("Mul", rest, share)))
    return graph.node("Div", mixed, graph.node("Add", graph.node("MatMul", put, share), own))


def _pool_clusters(graph: GraphWriter, patches: Patches, keep: int) -> str:
    """Marin et al., WACV 2023: k-medoids, its rounds written one after the other."""
    x, score = patches.tokens, patches.attention_received(graph)
    distance = _distances(graph, x)
    share = graph.node("Unsqueeze", score, graph.constant([-1]))  # (B, M, 1)
    medoids = top_k(graph, score, keep)
    far = graph.scalar("far", float(np.finfo(np.float32).max) / 4)
    for _ in range(CLUSTER_ROUNDS):
        put = _put(graph, _nearest(graph, distance, medoids), keep)
        members = graph.node("Transpose", put, perm=[0, 2, 1])  # (B, M, keep)
        cost = graph.node("MatMul", distance, graph.node("Mul", members, share))
        foreign = graph.node("Mul", graph.node("Sub", graph.scalar("one", 1), members), far)
        medoids = graph.node("ArgMin", graph.node("Add", cost, foreign), axis=1, keepdims=0)
    nearest = _nearest(graph, distance, medoids)
    graph.note(ReductionNote("token_pooling", patches.count, keep, nearest=nearest))
    put = _put(graph, nearest, keep)
    total = graph.node("Max", graph.node("MatMul", put, share), graph.scalar("tiny", TINY))
    return graph.node("Div", graph.node("MatMul", put, graph.node("Mul", x, share)), total)


def _distances(graph: GraphWriter, x: str) -> str:
    """Euclidean, between all patches, (B, M, M)."""
    square = graph.node("ReduceSumSquare", x, graph.constant([-1]), keepdims=1)  # (B, M, 1)
    across = graph.node("Transpose", square, perm=[0, 2, 1])
    product = graph.node("MatMul", x, graph.node("Transpose", x, perm=[0, 2, 1]))
    squared = graph.node("Sub", graph.node("Add", square, across), graph.node("Mul", product, graph.scalar("two", 2)))
    return graph.node("Sqrt", graph.node("Max", squared, graph.scalar("zero", 0)))


def _nearest(graph: GraphWriter, distance: str, medoids: str) -> str:
    """Which of the medoids each patch belongs to, (B, M)."""
    return graph.node("ArgMin", take(graph, distance, medoids), axis=1, keepdims=0)  # distances are symmetric
