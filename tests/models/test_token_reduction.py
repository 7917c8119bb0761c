"""Each published reduction against plain loops written from its paper, and what must hold for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.token_reduction import METHODS, NEEDS_CLASS_TOKEN, TokenReduction, bipartite_match, k_medoids

BATCH, PREFIX, PATCHES, WIDTH, HEADS = 2, 1, 11, 6, 2


class Block:
    """What a block hands to its reduction: tokens, sizes, attention and keys, drawn at random."""

    def __init__(self, *, prefix: int = PREFIX, patches: int = PATCHES, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = prefix + patches
        self.x = torch.randn(BATCH, tokens, WIDTH, generator=generator)
        self.sizes = torch.randint(1, 4, (BATCH, tokens, 1), generator=generator).float()
        self.sizes[:, :prefix] = 1
        self.weights = torch.randn(BATCH, HEADS, tokens, tokens, generator=generator).softmax(dim=-1)
        self.keys = torch.randn(BATCH, tokens, 4, generator=generator)
        self.prefix = prefix

    def reduce(self, method: str, keep: int) -> tuple[Tensor, Tensor]:
        return TokenReduction(method, keep, self.prefix)(self.x, self.sizes, self.weights, self.keys)

    def patches(self, image: int) -> tuple[list[Tensor], list[float], list[Tensor]]:
        """Of one image: tokens, sizes and keys without those in front."""
        x, keys = self.x[image, self.prefix :], self.keys[image, self.prefix :]
        return list(x), self.sizes[image, self.prefix :, 0].tolist(), list(keys)

    def class_attention(self, image: int) -> list[float]:
        return [
            sum(float(self.weights[image, head, 0, self.prefix + patch]) for head in range(HEADS)) / HEADS
            for patch in range(self.x.shape[1] - self.prefix)
        ]


def assert_same_tokens(found: tuple[Tensor, Tensor], image: int, prefix: int, expected: list[tuple[Tensor, float]]) -> None:
    """In any order."""
    tokens, sizes = found[0][image, prefix:], found[1][image, prefix:, 0]
    assert len(expected) == len(tokens)
    left = list(zip(tokens, sizes.tolist(), strict=True))
    for token, size in expected:
        match = [i for i, (mine, its) in enumerate(left) if torch.allclose(mine, token, atol=1e-5) and abs(its - size) < 1e-4]
        assert match, f"no token like {token} of size {size}"
        left.pop(match[0])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("keep", [6, 8, 10])
def test_what_is_left_is_what_was_asked_for(method: str, keep: int) -> None:
    """Shapes; the token in front is untouched; an image's answer does not depend on its neighbours."""
    block = Block()
    x, sizes = block.reduce(method, keep)

    assert x.shape == (BATCH, PREFIX + keep, WIDTH)
    assert sizes.shape == (BATCH, PREFIX + keep, 1)
    assert torch.equal(x[:, :PREFIX], block.x[:, :PREFIX])
    alone = Block()
    for name in ("x", "sizes", "weights", "keys"):
        setattr(alone, name, getattr(block, name)[1:])
    torch.testing.assert_close(alone.reduce(method, keep)[0], x[1:])


@pytest.mark.parametrize("method", ["tome", "mctf", "evit", "tps", "token_pooling"])
def test_methods_that_merge_keep_the_sum_of_sizes(method: str) -> None:
    """Every patch is in exactly one token."""
    block = Block()
    _, sizes = block.reduce(method, 7)
    torch.testing.assert_close(sizes.sum(dim=1), block.sizes.sum(dim=1))


def merged_by_hand(block: Block, image: int, merged: int, score: Callable[[int, int], float]) -> list[tuple[Tensor, float]]:
    """Odd patches look for the best of the even ones, and the best pairs of all are averaged by size."""
    x, sizes, _ = block.patches(image)
    sums = [token * size for token, size in zip(x, sizes, strict=True)]
    edges = []
    for looking in range(1, PATCHES, 2):
        scores = {target: score(looking, target) for target in range(0, PATCHES, 2)}
        target = max(scores, key=scores.__getitem__)
        edges.append((scores[target], looking, target))
    gone = set()
    for _, looking, target in sorted(edges, reverse=True)[:merged]:
        sums[target] = sums[target] + x[looking] * sizes[looking]
        sizes[target] += sizes[looking]
        gone.add(looking)
    return [(sums[i] / sizes[i], sizes[i]) for i in range(PATCHES) if i not in gone]


def test_tome_merges_the_likest_pairs_by_size() -> None:
    """Bolya et al., section 3: alternate sets, each of one looks for its likest in the other, the r likest edges are kept."""
    block, merged = Block(), 3
    found = block.reduce("tome", PATCHES - merged)

    for image in range(BATCH):
        _, _, keys = block.patches(image)
        expected = merged_by_hand(block, image, merged, lambda i, j, keys=keys: cosine(keys[i], keys[j]))
        assert_same_tokens(found, image, PREFIX, expected)


@pytest.mark.parametrize("seed", range(4))
def test_mctf_merges_what_is_alike_tells_little_and_stands_for_few(seed: int) -> None:
    """Lee et al., section 3.1: the product of the three criteria, each to the power of its temperature."""
    block, merged = Block(seed=seed), 3
    found = block.reduce("mctf", PATCHES - merged)

    for image in range(BATCH):
        x, sizes, _ = block.patches(image)
        told = block.class_attention(image)

        def weight(i: int, j: int, x: list[Tensor] = x, sizes: list[float] = sizes, told: list[float] = told) -> float:
            return (cosine(x[i], x[j]) + 1) / 2 * (told[i] * told[j]) ** -(1 / 20) * (sizes[i] * sizes[j]) ** -(1 / 40)

        assert_same_tokens(found, image, PREFIX, merged_by_hand(block, image, merged, weight))


def test_evit_fuses_what_the_class_token_looks_at_least() -> None:
    """Liang et al., section 3.2: the rest's average, weighted by attention."""
    block, keep = Block(), 6
    found = block.reduce("evit", keep)

    for image in range(BATCH):
        x, sizes, _ = block.patches(image)
        score = block.class_attention(image)
        order = sorted(range(PATCHES), key=lambda patch: -score[patch])
        kept, rest = order[: keep - 1], order[keep - 1 :]
        fused = sum(x[i] * score[i] for i in rest) / sum(score[i] for i in rest)
        expected = [(x[i], sizes[i]) for i in kept] + [(fused, sum(sizes[i] for i in rest))]
        assert_same_tokens(found, image, PREFIX, expected)


def test_tps_squeezes_what_is_pruned_into_the_likest_kept_token() -> None:
    """Wei et al., equations 5 to 7."""
    block, keep = Block(), 4
    found = block.reduce("tps", keep)

    for image in range(BATCH):
        x, sizes, _ = block.patches(image)
        score = block.class_attention(image)
        order = sorted(range(PATCHES), key=lambda patch: -score[patch])
        kept, rest = order[:keep], order[keep:]
        guests: dict[int, list[int]] = {i: [] for i in kept}
        for i in rest:
            guests[max(kept, key=lambda j, i=i: cosine(x[i], x[j]))].append(i)
        expected = []
        for j, those in guests.items():
            weight = {i: math.exp(cosine(x[i], x[j])) for i in those}
            total = sum(weight.values()) + math.e
            token = x[j] * math.e / total + sum((x[i] * w / total for i, w in weight.items()), torch.zeros(WIDTH))
            expected.append((token, sizes[j] + sum(sizes[i] for i in those)))
        assert_same_tokens(found, image, PREFIX, expected)


def test_token_pooling_averages_each_cluster_by_score() -> None:
    """Marin et al.: clusters around medoids, tokens weighted by the attention they receive."""
    block, keep = Block(), 5
    found = block.reduce("token_pooling", keep)
    score = block.weights[..., PREFIX:].mean(dim=(1, 2))
    clusters = k_medoids(block.x[:, PREFIX:], score, keep)

    for image in range(BATCH):
        x, sizes, _ = block.patches(image)
        expected = []
        for cluster in range(keep):
            members = [i for i in range(PATCHES) if clusters[image, i] == cluster]
            weight = [float(score[image, i]) for i in members]
            mean = sum(x[i] * w for i, w in zip(members, weight, strict=True)) / sum(weight)
            expected.append((mean, sum(sizes[i] for i in members)))
        assert_same_tokens(found, image, PREFIX, expected)


def test_k_medoids_is_the_plain_loop() -> None:
    """Assign to the nearest medoid, then move each medoid to the member with the least weighted distance; three times."""
    generator = torch.Generator().manual_seed(3)
    x, score = torch.randn(1, 12, 3, generator=generator), torch.rand(1, 12, generator=generator)

    found = k_medoids(x, score, 4)[0].tolist()

    points, weight = list(x[0]), score[0].tolist()
    medoids = sorted(range(12), key=lambda i: -weight[i])[:4]

    def nearest() -> list[int]:
        return [min(range(4), key=lambda c, p=p: float((p - points[medoids[c]]).norm())) for p in points]

    for _ in range(3):
        clusters = nearest()
        for c in range(4):
            members = [i for i in range(12) if clusters[i] == c]
            medoids[c] = min(
                members, key=lambda i, members=members: sum(weight[j] * float((points[i] - points[j]).norm()) for j in members)
            )
    assert nearest() == found


@pytest.mark.parametrize("method", ["top_k_attention", "top_k_norm"])
def test_pruning_keeps_the_highest_scores_as_they_are(method: str) -> None:
    """Nothing is mixed."""
    block, keep = Block(), 4
    found = block.reduce(method, keep)

    for image in range(BATCH):
        x, sizes, _ = block.patches(image)
        score = block.class_attention(image) if method == "top_k_attention" else [float(token.norm()) for token in x]
        kept = sorted(range(PATCHES), key=lambda patch: -score[patch])[:keep]
        assert_same_tokens(found, image, PREFIX, [(x[i], sizes[i]) for i in kept])


def test_without_tokens_in_front_similarity_still_works() -> None:
    """Networks that pool by the mean can merge, but not ask a class token."""
    block = Block(prefix=0, patches=8)
    assert block.reduce("tome", 5)[0].shape == (BATCH, 5, WIDTH)
    for method in NEEDS_CLASS_TOKEN:
        with pytest.raises(ValueError, match="has no class token"):
            block.reduce(method, 5)


def test_what_cannot_be_done_is_refused() -> None:
    """An unknown name, nothing left, more pairs than there are."""
    with pytest.raises(ValueError, match="no token reduction called 'magic'"):
        TokenReduction("magic", 5, 1)
    with pytest.raises(ValueError, match="0 patch tokens"):
        TokenReduction("tome", 0, 1)
    with pytest.raises(ValueError, match="at most 5 of 11 patches can be merged at once, not 6"):
        bipartite_match(torch.randn(1, 11, 4), 6)
