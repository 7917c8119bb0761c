"""DynamicViT's predictor: a small network that scores each patch before a block, and the block sees the best of them.

Source: Rao et al., DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification, NeurIPS 2021, section 3.2.
It is trained with the network, so it is there only where a checkpoint brings it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.token_reduction import take, top_k

PREDICTOR_NORM_EPS = 1e-5


class TokenPredictor(nn.Module):
    """Patches (B, M, D) -> how much each is worth keeping, (B, M): the log-odds of the paper's two probabilities.

    Half of a patch's features are its own, the other half the mean of all patches'.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=PREDICTOR_NORM_EPS)
        self.fc = nn.Linear(width, width)
        self.out1 = nn.Linear(width, width // 2)
        self.out2 = nn.Linear(width // 2, width // 4)
        self.out3 = nn.Linear(width // 4, 2)

    def multiply_adds(self) -> int:
        """For one patch."""
        return sum(part.weight.numel() for part in (self.fc, self.out1, self.out2, self.out3))

    def forward(self, patches: Tensor) -> Tensor:
        gelu = nn.functional.gelu
        own, shared = gelu(self.fc(self.norm(patches))).chunk(2, dim=-1)
        x = torch.cat([own, shared.mean(dim=1, keepdim=True).expand_as(own)], dim=-1)
        keep, drop = self.out3(gelu(self.out2(gelu(self.out1(x))))).unbind(dim=-1)
        return keep - drop  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class LearnedPruning:
    """Before a block: the `keep` patches that the predictor prefers, and the tokens in front."""

    predictor: TokenPredictor
    keep: int
    num_prefix: int

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens (B, P + M, D) -> (B, P + keep, D)."""
        front, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        kept, _ = top_k(self.predictor(patches), self.keep)
        return torch.cat([front, take(patches, kept)], dim=1)
