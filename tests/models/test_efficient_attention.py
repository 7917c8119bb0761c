"""Efficient attention against loops written from the papers' formulas, and that a network with it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from models.efficient_attention import (
    GATHERS,
    PERFORMER_FLOOR,
    LinformerGather,
    NystromGather,
    PerformerGather,
    iterative_pinv,
    orthogonal_directions,
    run_means,
)
from models.multi_exit import MultiExitViT
from models.vit import ViTConfig

B, HEADS, N, D = 2, 3, 10, 8


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, (B, heads, N, d)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, HEADS, N, D, generator=generator) for _ in range(3))
    return q, k, v


def test_linformer_looks_at_mixtures_of_tokens(qkv: tuple[torch.Tensor, ...]) -> None:
    """Equation 7, head by head."""
    torch.manual_seed(1)
    gather = LinformerGather(N, D, 4)
    found = gather(*qkv)
    for b in range(B):
        for h in range(HEADS):
            q, k, v = (x[b, h] for x in qkv)
            keys, values = gather.mix_keys @ k, gather.mix_values @ v
            weights = torch.stack([torch.exp(keys @ row / math.sqrt(D)) for row in q])
            expected = weights / weights.sum(dim=1, keepdim=True) @ values
            torch.testing.assert_close(found[b, h], expected)


def test_linformer_of_full_rank_can_be_softmax_attention(qkv: tuple[torch.Tensor, ...]) -> None:
    """Where every mixture is one token."""
    gather = LinformerGather(N, D, N)
    with torch.no_grad():
        gather.mix_keys.copy_(torch.eye(N))
        gather.mix_values.copy_(torch.eye(N))
    torch.testing.assert_close(gather(*qkv), F.scaled_dot_product_attention(*qkv))


def test_performer_is_a_ratio_of_sums_of_features(qkv: tuple[torch.Tensor, ...]) -> None:
    """Lemma 1, feature by feature; what is subtracted for safety has cancelled out."""
    gather = PerformerGather(N, D, 32)
    found = gather(*qkv)
    for b in range(B):
        for h in range(HEADS):
            q, k, v = (x[b, h] for x in qkv)

            def phi(x: torch.Tensor) -> torch.Tensor:
                return torch.stack([torch.exp(w @ x - x @ x / 2) for w in gather.directions])

            offered = torch.stack([phi(row / D**0.25) for row in k])
            expected = []
            for row in q:
                weights = offered @ phi(row / D**0.25)
                expected.append(weights @ v / weights.sum())
            torch.testing.assert_close(found[b, h], torch.stack(expected), atol=1e-3, rtol=1e-3)
    assert PERFORMER_FLOOR < 1e-5


def test_performer_comes_near_softmax_attention_with_many_features(qkv: tuple[torch.Tensor, ...]) -> None:
    """Its estimate is unbiased: more features, less error."""
    q, k, v = (x * 0.5 for x in qkv)
    exact = F.scaled_dot_product_attention(q, k, v)
    errors = [float((PerformerGather(N, D, rank)(q, k, v) - exact).abs().mean()) for rank in (8, 64, 1024)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_directions_are_orthogonal_and_as_long_as_normal_ones() -> None:
    """Within every group as large as their dimension."""
    directions = orthogonal_directions(20, D)
    for start in (0, 8, 16):
        group = F.normalize(directions[start : start + D], dim=1)
        torch.testing.assert_close(group @ group.T, torch.eye(len(group)), atol=1e-5, rtol=0)
    assert 0.7 < float(directions.norm(dim=1).square().mean()) / D < 1.3
    torch.testing.assert_close(directions, orthogonal_directions(20, D))


def test_nystromformer_goes_through_landmarks(qkv: tuple[torch.Tensor, ...]) -> None:
    """Equations 11 to 14; the inverse has a test of its own."""
    gather = NystromGather(N, D, 4)
    found = gather(*qkv)
    runs = [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]
    for b in range(B):
        for h in range(HEADS):
            q, k, v = (x[b, h] for x in qkv)
            q_mean, k_mean = (torch.stack([x[run].mean(dim=0) for run in runs]) for x in (q, k))

            def softmax(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return torch.softmax(x @ y.T / math.sqrt(D), dim=1)

            inverse = iterative_pinv(softmax(q_mean, k_mean))
            expected = softmax(q, k_mean) @ inverse @ softmax(q_mean, k) @ v
            torch.testing.assert_close(found[b, h], expected, atol=1e-4, rtol=1e-4)


def test_nystromformer_with_a_landmark_a_token_is_softmax_attention(qkv: tuple[torch.Tensor, ...]) -> None:
    """A pinv(A) A = A, as well as some products invert it: here tokens look at themselves most."""
    q, v = qkv[0] * 2, qkv[2]
    torch.testing.assert_close(NystromGather(N, D, N)(q, q, v), F.scaled_dot_product_attention(q, q, v), atol=0.02, rtol=0.02)


def test_products_alone_invert_a_matrix() -> None:
    """Against torch's own inverse; equation 13 written out for one matrix gives the same steps."""
    noise = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    matrix = torch.softmax(3 * torch.eye(6) + 0.5 * noise, dim=-1)
    torch.testing.assert_close(iterative_pinv(matrix), torch.linalg.pinv(matrix), atol=1e-3, rtol=1e-3)
    z = matrix.T / (matrix.sum(dim=0).max() * matrix.sum(dim=1).max())
    for _ in range(6):
        a = matrix @ z
        z = 0.25 * z @ (13 * torch.eye(6) - a @ (15 * torch.eye(6) - a @ (7 * torch.eye(6) - a)))
    torch.testing.assert_close(iterative_pinv(matrix), z)


def test_runs_cover_all_tokens() -> None:
    """Once each; more runs than tokens are refused."""
    means = run_means(65, 8)
    assert (means > 0).sum(dim=0).tolist() == [1] * 65
    torch.testing.assert_close(means.sum(dim=1), torch.ones(8))
    with pytest.raises(ValueError, match="3 tokens cannot be cut into 4 runs"):
        run_means(3, 4)


@pytest.mark.parametrize("kind", sorted(GATHERS))
def test_a_network_with_it_learns(kind: str) -> None:
    """Every weight gets a gradient, and some steps on a few images tell them apart."""
    torch.manual_seed(0)
    config = ViTConfig(32, 8, 32, 2, 2, 4, mlp_ratio=2.0, attention=kind, attention_rank=4)  # type: ignore[arg-type]
    model = MultiExitViT(config, (1, 2))
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = sum(F.cross_entropy(logits, y) for logits in model(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters())
    assert losses[-1] < losses[0] / 3


def test_a_rank_without_its_attention_is_refused() -> None:
    """And the other way round."""
    with pytest.raises(ValueError, match="attention_rank 4 does not go with softmax"):
        ViTConfig(32, 8, 32, 2, 2, 4, attention_rank=4)
    with pytest.raises(ValueError, match="attention_rank 0 does not go with performer"):
        ViTConfig(32, 8, 32, 2, 2, 4, attention="performer")
