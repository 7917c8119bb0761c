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

    x: all tokens, (B, N, D), of which the first `num_prefix` are no patches; sizes: theirs, (B, N, 1), or "" where every token
    stands for one patch; weights: of attention, (B, heads, N, N); keys: (B, N, heads * d).
    """

    x: str
    sizes: str
    weights: str
    keys: str
    num_heads: int
    num_prefix: int
    count: int  # M

    def tokens(self, graph: GraphWriter) -> str:
        """Of the patches, (B, M, D)."""
        return graph.slice(self.x, self.num_prefix, self.num_prefix + self.count, axis=1)

    def halves(self, graph: GraphWriter, of_all: str) -> tuple[str, str]:
        """Of what there is of all tokens, (B, N, ...), that of the even and of the odd patches."""
        first, end = self.num_prefix, self.num_prefix + self.count
        even, odd = (graph.slice(of_all, first + each, end, axis=1, step=2) for each in (0, 1))
        return even, odd

    def behind_front(self, graph: GraphWriter, *parts: str) -> str:
        """The tokens in front, and these patches."""
        front = [graph.slice(self.x, 0, self.num_prefix, axis=1)] if self.num_prefix else []
        return graph.node("Concat", *front, *parts, axis=1)

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
        """Of all tokens, mean over the heads, (B, N, d)."""
        keys = graph.node("Reshape", self.keys, graph.constant([0, 0, self.num_heads, -1]))
        return graph.node("ReduceMean", keys, graph.constant([2]), keepdims=0)


def reduce_patches(graph: GraphWriter, reduction: TokenReduction, patches: Patches) -> tuple[str, str]:
    """All tokens (B, num_prefix + keep, D), and their sizes (B, num_prefix + keep, 1) where the method tracks them, else "".

    Raises:
        NotImplementedError: the method has no graph.
    """
    method, keep, count = reduction.method, reduction.keep, patches.count
    left: tuple[str, ...]
    match method:
        case "tome" | "mctf":
            likeness = _of_keys(graph, patches) if method == "tome" else _by_criteria(graph, patches)
            return _merge_likest(graph, method, patches, likeness, count - keep)
        case "evit":
            score, order = _sorted(graph, patches.class_attention(graph), count)
            graph.note(ReductionNote(method, count, keep, order))
            left = _fuse(graph, patches, order, score, keep)
        case "tps":
            _, order = _sorted(graph, patches.class_attention(graph), count)
            left = (_squeeze(graph, patches, order, keep),)
        case "token_pooling":
            left = (_pool_clusters(graph, patches, keep),)
        case "top_k_attention":
            left = (_keep(graph, method, patches, patches.class_attention(graph), keep),)
        case "top_k_norm":
            norm = graph.node("ReduceL2", patches.tokens(graph), graph.constant([-1]), keepdims=0)
            left = (_keep(graph, method, patches, norm, keep),)
        case _:
            raise NotImplementedError(f"no graph is known for the token reduction {reduction.method!r}")
    return patches.behind_front(graph, *left), ""


def top_k(graph: GraphWriter, score: str, keep: int) -> str:
    """Indices (B, keep) of the highest scores."""
    return _sorted(graph, score, keep)[1]


def _keep(graph: GraphWriter, method: str, patches: Patches, score: str, keep: int) -> str:
    """The patches of the highest scores, (B, keep, D)."""
    order = top_k(graph, score, keep)
    graph.note(ReductionNote(method, patches.count, keep, order))
    return take(graph, patches.tokens(graph), order)


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
    """One-hot rows, (B, r, count). Their product takes things where they go: it exports everywhere, scattering does not."""
    values = graph.weight("zero_and_one", np.array([0, 1], dtype=np.float32))
    return graph.node("OneHot", destinations, graph.constant([count]), values, axis=-1)


def _across(graph: GraphWriter, x: str) -> str:
    """(B, n, m) -> (B, m, n); ONNX Runtime makes it a part of the product that follows."""
    return graph.node("Transpose", x, perm=[0, 2, 1])


def _normalised(graph: GraphWriter, x: str) -> str:
    return graph.node("LpNormalization", x, axis=-1, p=2)


@dataclass(frozen=True, slots=True)
class _Likeness:
    """How much every odd patch is like the even ones, (B, M // 2, (M + 1) // 2).

    weight: what a row of it is to be multiplied by before rows are compared, (B, M // 2); "" for nothing.
    """

    of_pairs: str
    weight: str = ""


def _of_keys(graph: GraphWriter, patches: Patches) -> _Likeness:
    """Bolya et al., ICLR 2023, section 3: cosine of the keys."""
    found, looking = patches.halves(graph, _normalised(graph, patches.mean_keys(graph)))
    return _Likeness(graph.node("MatMul", looking, _across(graph, found)))


def _by_criteria(graph: GraphWriter, patches: Patches) -> _Likeness:
    """Lee et al., CVPR 2024, section 3.1: the product of likeness and both patches' readiness.

    With readiness r it is (cosine + 1) r r'. What multiplies a row is left for later, and lengths are divided by behind the
    product, of which there is less than of tokens.
    """
    tiny, every = graph.scalar("tiny", TINY), patches.count
    squares = graph.node("ReduceSum", graph.node("Mul", patches.x, patches.x), graph.constant([-1]), keepdims=0)
    inverse = graph.node("Reciprocal", graph.node("Sqrt", graph.node("Add", squares, tiny)))  # of the lengths, (B, N)
    of_found, of_looking = patches.halves(graph, inverse)
    ready = graph.node(
        "Pow", graph.node("Max", patches.class_attention(graph), tiny), graph.scalar("information", -INFORMATION)
    )
    if patches.sizes:
        sizes = graph.slice(patches.sizes, patches.num_prefix, patches.num_prefix + every, axis=1)
        by_size = graph.node("Pow", graph.node("Reshape", sizes, graph.constant([0, -1])), graph.scalar("size", -SIZE))
        ready = graph.node("Mul", ready, by_size)
    ready_found, ready_looking = (graph.slice(ready, each, every, axis=1, step=2) for each in (0, 1))
    factor = graph.node("Unsqueeze", graph.node("Mul", of_found, ready_found), graph.constant([1]))  # (B, 1, ·)
    found, looking = patches.halves(graph, patches.x)
    cosines = graph.node("MatMul", looking, _across(graph, found))
    cosines = graph.node("Mul", cosines, graph.node("Unsqueeze", of_looking, graph.constant([-1])))
    ready_found = graph.node("Unsqueeze", ready_found, graph.constant([1]))
    return _Likeness(graph.node("Add", graph.node("Mul", cosines, factor), ready_found), ready_looking)


def _merge_likest(graph: GraphWriter, method: str, patches: Patches, likeness: _Likeness, num_merged: int) -> tuple[str, str]:
    """Bolya et al., ICLR 2023, section 3: the pairs that are most alike. All tokens, and their sizes."""
    count = patches.count
    num_found, num_looking = (count + 1) // 2, count // 2
    best = graph.node("ReduceMax", likeness.of_pairs, graph.constant([-1]), keepdims=0)
    if likeness.weight:
        best = graph.node("Mul", best, likeness.weight)
    nearest = graph.node("ArgMax", likeness.of_pairs, axis=-1, keepdims=0)
    _, order = _sorted(graph, best, num_looking)
    graph.note(ReductionNote(method, count, count - num_merged, order, nearest))
    sources, unmatched = (graph.slice(order, *ends, axis=1) for ends in ((0, num_merged), (num_merged, num_looking)))
    found, looking = patches.halves(graph, patches.x)
    merged, left = (take(graph, looking, each) for each in (sources, unmatched))
    destinations = graph.node("Unsqueeze", take(graph, nearest, sources), graph.constant([1]))  # (B, 1, r)
    numbers = graph.weight(f"numbers_to_{num_found}", np.arange(num_found)[:, None])
    # As `_put`, with what it is multiplied by already across; (B, found, r).
    put = graph.node("Cast", graph.node("Equal", numbers, destinations), to=TensorProto.FLOAT)
    before = graph.scalar("one", 1)
    if patches.sizes:
        before, of_looking = patches.halves(graph, patches.sizes)
        brought, kept = (take(graph, of_looking, each) for each in (sources, unmatched))
        put = graph.node("Mul", put, graph.node("Reshape", brought, graph.constant([0, 1, -1])))
    # A mean weighted by size; the weights are divided by their sum, for they are fewer than the features.
    now = graph.node("Add", before, graph.node("ReduceSum", put, graph.constant([-1]), keepdims=1))  # (B, found, 1)
    of_found = graph.node("Mul", found, graph.node("Div", before, now))
    total = graph.node("Add", of_found, graph.node("MatMul", graph.node("Div", put, now), merged))
    if patches.sizes:
        front = [graph.slice(patches.sizes, 0, patches.num_prefix, axis=1)] if patches.num_prefix else []
        new_sizes = graph.node("Concat", *front, kept, now, axis=1)
    else:  # all others are still one patch
        ones = patches.num_prefix + num_looking - num_merged
        new_sizes = graph.node("Pad", now, graph.constant([0, ones, 0, 0, 0, 0]), graph.scalar("one", 1))
    return patches.behind_front(graph, left, total), new_sizes


def _fuse(graph: GraphWriter, patches: Patches, order: str, score: str, keep: int) -> tuple[str, str]:
    """Liang et al., ICLR 2022, section 3.2."""
    kept = graph.slice(order, 0, keep - 1, axis=1)
    rest = graph.slice(order, keep - 1, patches.count, axis=1)
    tokens = patches.tokens(graph)
    fused = _average(graph, take(graph, tokens, rest), graph.slice(score, keep - 1, patches.count, axis=1))
    return take(graph, tokens, kept), fused


def _squeeze(graph: GraphWriter, patches: Patches, order: str, keep: int) -> str:
    """Wei et al., CVPR 2023, equations 5 to 7."""
    tokens = patches.tokens(graph)
    kept = take(graph, tokens, graph.slice(order, 0, keep, axis=1))
    rest = take(graph, tokens, graph.slice(order, keep, patches.count, axis=1))
    cosine = graph.node("MatMul", _normalised(graph, rest), _across(graph, _normalised(graph, kept)))
    share = graph.node("Exp", graph.node("ReduceMax", cosine, graph.constant([-1]), keepdims=1))  # (B, r, 1)
    nearest = graph.node("ArgMax", cosine, axis=-1, keepdims=0)
    graph.note(ReductionNote("tps", patches.count, keep, order, nearest))
    put = _across(graph, _put(graph, nearest, keep))
    own = graph.scalar("e", np.e)
    mixed = graph.node("Add", graph.node("Mul", kept, own), graph.node("MatMul", put, graph.node("Mul", rest, share)))
    return graph.node("Div", mixed, graph.node("Add", graph.node("MatMul", put, share), own))


def _pool_clusters(graph: GraphWriter, patches: Patches, keep: int) -> str:
    """Marin et al., WACV 2023: k-medoids, its rounds written one after the other."""
    x, score = patches.tokens(graph), patches.attention_received(graph)
    distance = _distances(graph, x)
    share = graph.node("Unsqueeze", score, graph.constant([-1]))  # (B, M, 1)
    medoids = top_k(graph, score, keep)
    far = graph.scalar("far", float(np.finfo(np.float32).max) / 4)
    for _ in range(CLUSTER_ROUNDS):
        members = _put(graph, _nearest(graph, distance, medoids), keep)  # (B, M, keep)
        cost = graph.node("MatMul", distance, graph.node("Mul", members, share))
        foreign = graph.node("Mul", graph.node("Sub", graph.scalar("one", 1), members), far)
        medoids = graph.node("ArgMin", graph.node("Add", cost, foreign), axis=1, keepdims=0)
    nearest = _nearest(graph, distance, medoids)
    graph.note(ReductionNote("token_pooling", patches.count, keep, nearest=nearest))
    put = _across(graph, _put(graph, nearest, keep))
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
