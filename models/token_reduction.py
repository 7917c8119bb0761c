"""Fewer tokens inside a block, as score x select x combine: the literature's methods are a few pieces in different orders.

| method | score | select | combine | source |
| --- | --- | --- | --- | --- |
| tome | similarity of keys | bipartite matching | average, weighted by size | Bolya et al., ICLR 2023 |
| mctf | that of features, class token's attention, size | bipartite matching | average, by size | Lee et al., CVPR 2024 |
| evit | attention of the class token | top-k | fuse the rest into one | Liang et al., ICLR 2022 |
| tps | attention of the class token | top-k | squeeze into the nearest kept token | Wei et al., CVPR 2023 |
| token_pooling | attention received, by all | weighted k-medoids | average, weighted by score | Marin et al., WACV 2023 |
| top_k_attention | attention of the class token | top-k | drop | as in Haurum et al., ICCV-W 2023 |
| top_k_norm | norm of the features | top-k | drop | as in Haurum et al., ICCV-W 2023 |

All happen between attention and MLP. How many tokens are left is a constant, so shapes are static but for the batch. Tokens
in front of the patches (class, distillation) are never touched and stay in front; the order of the others carries no meaning,
since positions were added before. Written from the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

# Anything known of each patch, float32 (B, M, E) -> the same of each token that is left, (B, keep, E), and their sizes,
# (B, keep, 1). It is linear in what it is given.
Combine = Callable[[Tensor], tuple[Tensor, Tensor]]

TINY = 1e-12  # so that a cluster of nothing is zero and not undefined
INFORMATION, SIZE = 1 / 20, 1 / 40  # temperatures of mctf's criteria; likeness has 1 (section 3.1 of the paper)
CLUSTER_ROUNDS = 3  # of k-medoids; the paper finds that a few are enough


@dataclass(frozen=True, slots=True)
class TokenMatch:
    """Which patch goes into which: indices into the patches.

    sources and unmatched are int64 (B, r) and (B, M - r): the M patches of one side; destinations, int64 (B, r), index the
    other side.
    """

    sources: Tensor
    unmatched: Tensor
    destinations: Tensor


@dataclass(frozen=True, slots=True)
class TokenReduction:
    """One block's reduction.

    Args:
        method: of `METHODS`.
        keep: patch tokens that are left; a token that others were fused into counts.
        num_prefix: tokens in front of the patches.
    """

    method: str
    keep: int
    num_prefix: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"no token reduction called {self.method!r}; there are {', '.join(METHODS)}")
        if self.num_prefix < 1 and self.method in NEEDS_CLASS_TOKEN:
            raise ValueError(f"{self.method} scores by the class token's attention, and the network has no class token")
        if self.keep < 1:
            raise ValueError(f"{self.keep} patch tokens cannot be left")

    @property
    def tracks_sizes(self) -> bool:
        """Later blocks weigh a token by how many patches it stands for."""
        return self.method in PROPORTIONAL_ATTENTION

    def __call__(self, x: Tensor, sizes: Tensor, weights: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce.

        Args:
            x: tokens, float32 (B, N, D).
            sizes: how many patches each token stands for, float32 (B, N, 1).
            weights: of this block's attention, float32 (B, heads, N, N).
            keys: of this block's attention, mean over the heads, float32 (B, N, d).

        Returns:
            Tokens (B, num_prefix + keep, D) and sizes (B, num_prefix + keep, 1).

        Raises:
            ValueError: the method cannot come from so many tokens to so few.
        """
        combine = self.combination(x, sizes, weights, keys)
        left, left_sizes = combine(x[:, self.num_prefix :])
        front, front_sizes = x[:, : self.num_prefix], sizes[:, : self.num_prefix]
        return torch.cat([front, left], dim=1), torch.cat([front_sizes, left_sizes], dim=1)

    def combination(self, x: Tensor, sizes: Tensor, weights: Tensor, keys: Tensor) -> Combine:
        """What becomes of the patches, for whatever goes along with them; arguments and errors as of a call."""
        return METHODS[self.method](
            x[:, self.num_prefix :],
            sizes[:, self.num_prefix :],
            weights[..., self.num_prefix :],
            keys[:, self.num_prefix :],
            self.keep,
        )


# --- score: float32 (B, M) of each patch; high is worth keeping ---


def class_attention(weights: Tensor) -> Tensor:
    """How much the first token looks at each patch, mean over the heads; weights (B, heads, N, M)."""
    return weights[:, :, 0].mean(dim=1)


def attention_received(weights: Tensor) -> Tensor:
    """How much all tokens look at each patch, mean over heads and tokens; weights (B, heads, N, M)."""
    return weights.mean(dim=(1, 2))


def feature_norm(patches: Tensor) -> Tensor:
    """Length of each patch's features; patches (B, M, D)."""
    length: Tensor = torch.linalg.vector_norm(patches, dim=-1)
    return length


def relative_importance(method: str, patches: Tensor, weights: Tensor) -> Tensor:
    """What a method that scores patches one by one sorts them by, over its mean in the image, (B, M).

    Args:
        patches: float32 (B, M, D).
        weights: of attention, all tokens to the patches, float32 (B, heads, N, M).
    """
    if method in NEEDS_CLASS_TOKEN:
        score = class_attention(weights)
    else:
        score = attention_received(weights) if method == "token_pooling" else feature_norm(patches)
    return score / score.mean(dim=1, keepdim=True)


def likeness(keys: Tensor) -> Tensor:
    """Cosine of each patch that looks with the one it finds, (B, M // 2); keys (B, M, d). See `bipartite_match`."""
    keys = torch.nn.functional.normalize(keys, dim=-1)
    return (keys[:, 1::2] @ keys[:, ::2].transpose(1, 2)).amax(dim=-1)


def readiness(weights: Tensor, sizes: Tensor) -> Tensor:
    """How gladly a patch is merged, (B, M, 1): the less it tells, and the fewer it stands for.

    What it tells is how much the class token looks at it. The paper takes the mean of all tokens; on trained networks this
    changes the answer less (docs/adr/0012).

    Args:
        weights: of attention, all tokens to the patches, float32 (B, heads, N, M).
        sizes: float32 (B, M, 1).

    Source: Lee et al., Multi-criteria Token Fusion, CVPR 2024, section 3.1.
    """
    told = class_attention(weights).clamp(min=TINY).unsqueeze(-1)
    return told**-INFORMATION * sizes**-SIZE


# --- select ---


def top_k(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Indices of the `keep` patches of the highest score, int64 (B, keep), and of the others, (B, M - keep)."""
    order = score.argsort(dim=1, descending=True, stable=True)
    return order[:, :keep], order[:, keep:]


def bipartite_match(keys: Tensor, num_merged: int) -> TokenMatch:
    """Every second patch looks for the one most like it among the others; the `num_merged` likest pairs are matched.

    Args:
        keys: float32 (B, M, d). Odd patches look, even ones are found.

    Raises:
        ValueError: more than half of the patches would be merged.

    Source: Bolya et al., ICLR 2023, section 3.
    """
    return _likest_pairs(torch.nn.functional.normalize(keys, dim=-1), num_merged)


def bipartite_match_by_criteria(patches: Tensor, ready: Tensor, num_merged: int) -> TokenMatch:
    """As `bipartite_match`, by the product of likeness, from 0 to 1, and of both patches' readiness.

    Args:
        patches: float32 (B, M, D).
        ready: float32 (B, M, 1), from `readiness`.

    Raises:
        ValueError: as there.

    Source: Lee et al., CVPR 2024, section 3.1, with one matching, one way.
    """
    unit = torch.nn.functional.normalize(patches, dim=-1)
    # One feature more, and the product is the cosine and one: twice the likeness.
    return _likest_pairs(torch.cat([unit, torch.ones_like(ready)], dim=-1) * ready, num_merged)


def _likest_pairs(features: Tensor, num_merged: int) -> TokenMatch:
    """By their products."""
    found, looking = features[:, ::2], features[:, 1::2]
    if num_merged > looking.shape[1]:
        raise ValueError(f"at most {looking.shape[1]} of {features.shape[1]} patches can be merged at once, not {num_merged}")
    similarity, nearest = (looking @ found.transpose(1, 2)).max(dim=-1)
    sources, unmatched = top_k(similarity, num_merged)
    return TokenMatch(sources, unmatched, nearest.gather(1, sources))


def k_medoids(patches: Tensor, score: Tensor, keep: int) -> Tensor:
    """The cluster of each patch, int64 (B, M), each cluster around one of its patches; starts from the highest scores.

    Source: Marin et al., WACV 2023, algorithm 2: distances weighted by the score.
    """
    distance = torch.cdist(patches, patches)  # (B, M, M)
    medoids, _ = top_k(score, keep)
    clusters = torch.zeros_like(score, dtype=torch.int64)
    for _ in range(CLUSTER_ROUNDS):
        clusters = _nearest(distance, medoids)
        member = torch.nn.functional.one_hot(clusters, keep).to(distance.dtype)  # (B, M, keep)
        # What each patch would cost as the medoid of each cluster; only its own members may be.
        cost = distance @ (member * score.unsqueeze(-1))
        medoids = cost.masked_fill(member == 0, float("inf")).argmin(dim=1)
    return _nearest(distance, medoids)


def _nearest(distance: Tensor, medoids: Tensor) -> Tensor:
    to_medoids: Tensor = distance.gather(2, medoids.unsqueeze(1).expand(-1, distance.shape[1], -1))
    return to_medoids.argmin(dim=-1)


def likest_of(patches: Tensor, kept: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Which kept patch each of the others is most like: the cosine, float32 (B, r), and its number, int64 (B, r)."""
    normal = torch.nn.functional.normalize
    found = (normal(take(patches, rest), dim=-1) @ normal(take(patches, kept), dim=-1).transpose(1, 2)).max(dim=-1)
    return found.values, found.indices


# --- combine ---


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, k, D) of x (B, M, D) at index (B, k)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def add_to(x: Tensor, destinations: Tensor, values: Tensor) -> Tensor:
    """x (B, M, D) with values (B, r, D) added at destinations (B, r); as a product, which exports everywhere."""
    put = torch.nn.functional.one_hot(destinations, x.shape[1]).to(x.dtype)  # (B, r, M)
    return x + put.transpose(1, 2) @ values


def merge_matched(patches: Tensor, sizes: Tensor, match: TokenMatch) -> tuple[Tensor, Tensor]:
    """Each matched patch goes into its destination, weighted by size. The sizes of an image keep their sum.

    Source: Bolya et al., ICLR 2023, section 3.
    """
    found, looking = patches[:, ::2], patches[:, 1::2]
    found_sizes, looking_sizes = sizes[:, ::2], sizes[:, 1::2]
    source_sizes = take(looking_sizes, match.sources)
    total = add_to(found_sizes, match.destinations, source_sizes)
    mean = add_to(found * found_sizes, match.destinations, take(looking, match.sources) * source_sizes) / total
    return (
        torch.cat([take(looking, match.unmatched), mean], dim=1),
        torch.cat([take(looking_sizes, match.unmatched), total], dim=1),
    )


def fuse(patches: Tensor, sizes: Tensor, score: Tensor, kept: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The kept patches, and one more: the others' average, weighted by score (Liang et al., ICLR 2022, section 3.2)."""
    share = take(score.unsqueeze(-1), rest)
    fused = (take(patches, rest) * share).sum(dim=1, keepdim=True) / share.sum(dim=1, keepdim=True)
    fused_size = take(sizes, rest).sum(dim=1, keepdim=True)
    return torch.cat([take(patches, kept), fused], dim=1), torch.cat([take(sizes, kept), fused_size], dim=1)


def squeeze(patches: Tensor, sizes: Tensor, kept: Tensor, rest: Tensor, likest: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Each of the others goes into the kept patch most like it; weights are e to the cosine, and e for the kept one itself.

    `likest`: of each of the others, from `likest_of`.

    Source: Wei et al., Joint Token Pruning and Squeezing, CVPR 2023, equations 5 to 7.
    """
    kept_patches, rest_patches = take(patches, kept), take(patches, rest)
    cosine, nearest = likest
    share = cosine.exp().unsqueeze(-1)  # (B, r, 1)
    own = torch.full_like(kept_patches[..., :1], torch.e)
    mixed = add_to(own * kept_patches, nearest, share * rest_patches) / add_to(own, nearest, share)
    return mixed, add_to(take(sizes, kept), nearest, take(sizes, rest))


def pool(patches: Tensor, sizes: Tensor, score: Tensor, clusters: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The average of each cluster, weighted by score (Marin et al., WACV 2023); clusters int64 (B, M)."""
    nothing = patches.new_zeros(len(patches), keep, patches.shape[-1])
    share = score.unsqueeze(-1)
    mean = add_to(nothing, clusters, patches * share) / add_to(nothing[..., :1], clusters, share).clamp(min=TINY)
    return mean, add_to(nothing[..., :1], clusters, sizes)


def pick(patches: Tensor, sizes: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The kept patches as they are; the others are gone."""
    return take(patches, kept), take(sizes, kept)


# --- the published combinations ---


def _tome(patches: Tensor, sizes: Tensor, weights: Tensor, keys: Tensor, keep: int) -> Combine:
    return partial(merge_matched, sizes=sizes, match=bipartite_match(keys, patches.shape[1] - keep))


def _mctf(patches: Tensor, sizes: Tensor, weights: Tensor, keys: Tensor, keep: int) -> Combine:
    match = bipartite_match_by_criteria(patches, readiness(weights, sizes), patches.shape[1] - keep)
    return partial(merge_matched, sizes=sizes, match=match)


def _evit(patches: Tensor, sizes: Tensor, weights: Tensor, keys: Tensor, keep: int) -> Combine:
    score = class_attention(weights)
    kept, rest = top_k(score, keep - 1)
    return partial(fuse, sizes=sizes, score=score, kept=kept, rest=rest)


def _tps(patches: Tensor, sizes: Tensor, weights: Tensor, keys: Tensor, keep: int) -> Combine:
    kept, rest = top_k(class_attention(weights), keep)
    return partial(squeeze, sizes=sizes, kept=kept, rest=rest, likest=likest_of(patches, kept, rest))


def _token_pooling(patches: Tensor, sizes: Tensor, weights: Tensor, keys: Tensor, keep: int) -> Combine:
    score = attention_received(weights)
    return partial(pool, sizes=sizes, score=score, clusters=k_medoids(patches, score, keep), keep=keep)


def _top_k_attention(patches: Tensor, sizes: Tensor, weights: Tensor, keys: Tensor, keep: int) -> Combine:
    return partial(pick, sizes=sizes, kept=top_k(class_attention(weights), keep)[0])


def _top_k_norm(patches: Tensor, sizes: Tensor, weights: Tensor, keys: Tensor, keep: int) -> Combine:
    return partial(pick, sizes=sizes, kept=top_k(feature_norm(patches), keep)[0])


METHODS = {
    "tome": _tome,
    "mctf": _mctf,
    "evit": _evit,
    "tps": _tps,
    "token_pooling": _token_pooling,
    "top_k_attention": _top_k_attention,
    "top_k_norm": _top_k_norm,
}
NEEDS_CLASS_TOKEN = {"mctf", "evit", "tps", "top_k_attention"}
MERGES_PAIRS = {"tome", "mctf"}  # so at most half of the patches at once
PROPORTIONAL_ATTENTION = {"tome", "mctf"}  # methods whose later blocks weigh a token's keys by its size
