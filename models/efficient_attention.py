"""Attention that does not compare every token with every other: cost grows with the tokens, not with their square.

| name | instead of all pairs | rank is | source |
| --- | --- | --- | --- |
| linformer | keys and values of learned mixtures of tokens | number of mixtures | Wang et al., Linformer, 2020 |
| performer | positive random features of the softmax kernel | number of features | Choromanski et al., ICLR 2021 |
| nystromformer | landmarks, means of runs of tokens | number of landmarks | Xiong et al., AAAI 2021 |

Each takes queries, keys and values, (B, heads, N, d), and gives what is gathered, (B, heads, N, d). They need training: a
network that was trained with softmax attention has other weights. Written from the papers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PERFORMER_FLOOR = 1e-6  # added to features, so that no token is gathered from nothing
PINV_ROUNDS = 6  # of the iterative pseudo-inverse, as in the paper


class LinformerGather(nn.Module):
    """softmax(q (E k)^T / sqrt(d)) (F v), with E and F learned, (rank, N), shared by the heads.

    Source: Wang et al., Linformer: Self-Attention with Linear Complexity, 2020, equation 7.
    """

    def __init__(self, num_tokens: int, head_width: int, rank: int) -> None:
        super().__init__()
        self.scale = head_width**-0.5
        self.mix_keys = nn.Parameter(torch.empty(rank, num_tokens))
        self.mix_values = nn.Parameter(torch.empty(rank, num_tokens))
        for mix in (self.mix_keys, self.mix_values):
            nn.init.normal_(mix, std=num_tokens**-0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = ((q * self.scale) @ (self.mix_keys @ k).transpose(-2, -1)).softmax(dim=-1)  # (B, heads, N, rank)
        gathered: Tensor = weights @ (self.mix_values @ v)
        return gathered


class PerformerGather(nn.Module):
    """phi(q) (phi(k)^T v), normalised, with phi(x) = exp(w x - |x|^2 / 2) for orthogonal random w (FAVOR+).

    Source: Choromanski et al., Rethinking Attention with Performers, ICLR 2021, lemma 1 and section 2.4.
    """

    directions: Tensor

    def __init__(self, num_tokens: int, head_width: int, rank: int) -> None:
        super().__init__()
        del num_tokens
        self.scale = head_width**-0.25  # of queries and of keys: together 1 / sqrt(d)
        self.register_buffer("directions", orthogonal_directions(rank, head_width))  # (rank, d)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # What is subtracted before exp cancels out: of a query in its own sum, of the keys in all.
        asked = self._features(q, over=(-1,))  # (B, heads, N, rank)
        offered = self._features(k, over=(-2, -1))
        total = asked @ offered.sum(dim=-2, keepdim=True).transpose(-2, -1)  # (B, heads, N, 1)
        return asked @ (offered.transpose(-2, -1) @ v) / total

    def _features(self, x: Tensor, over: tuple[int, ...]) -> Tensor:
        x = x * self.scale
        exponent = x @ self.directions.transpose(0, 1) - x.square().sum(dim=-1, keepdim=True) / 2
        return (exponent - exponent.amax(dim=over, keepdim=True)).exp() + PERFORMER_FLOOR


class NystromGather(nn.Module):
    """softmax(q m_k^T) pinv(softmax(m_q m_k^T)) softmax(m_q k^T) v, with m the means of runs of tokens.

    Runs are of equal length, or differ by one. Without the paper's convolution beside it.

    Source: Xiong et al., Nyströmformer, AAAI 2021, equations 11 to 14.
    """

    means: Tensor

    def __init__(self, num_tokens: int, head_width: int, rank: int) -> None:
        super().__init__()
        self.scale = head_width**-0.5
        self.register_buffer("means", run_means(num_tokens, rank), persistent=False)  # (rank, N)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * self.scale
        q_mean, k_mean = self.means @ q, self.means @ k  # (B, heads, rank, d)
        to_landmarks = (q @ k_mean.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, N, rank)
        between = (q_mean @ k_mean.transpose(-2, -1)).softmax(dim=-1)
        from_tokens = (q_mean @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, rank, N)
        return to_landmarks @ (iterative_pinv(between) @ (from_tokens @ v))


GATHERS = {"linformer": LinformerGather, "performer": PerformerGather, "nystromformer": NystromGather}


def orthogonal_directions(count: int, width: int, *, seed: int = 0) -> Tensor:
    """Random vectors (count, width), each as long as a normal one, orthogonal within every `width` of them."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, count, width):
        square, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
        parts.append(square[: min(width, count - start)])
    lengths = torch.linalg.vector_norm(torch.randn(count, width, generator=generator), dim=1, keepdim=True)
    directions: Tensor = torch.cat(parts) * lengths
    return directions


def run_means(num_tokens: int, count: int) -> Tensor:
    """A matrix (count, num_tokens) whose rows take the means of runs of tokens."""
    if not 1 <= count <= num_tokens:
        raise ValueError(f"{num_tokens} tokens cannot be cut into {count} runs")
    run = torch.arange(num_tokens) * count // num_tokens  # of each token
    members = torch.nn.functional.one_hot(run, count).T.float()
    means: Tensor = members / members.sum(dim=1, keepdim=True)
    return means


def iterative_pinv(matrix: Tensor) -> Tensor:
    """Nearly the Moore-Penrose inverse of each of (..., n, n), by products alone.

    Source: Razavi et al., 2014, as in equation 13 of Xiong et al.; started as there, for rows that sum to 1.
    """
    columns = matrix.abs().sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
    rows = matrix.abs().sum(dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    inverse = matrix.transpose(-2, -1) / (columns * rows)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(PINV_ROUNDS):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
    return inverse
