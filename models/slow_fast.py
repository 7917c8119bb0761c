"""Slow and fast tokens: a block computes the patches that matter and one that stands for the others, which follow its step.

No patch is lost: one that does not matter in a block may be computed in a later one. Unlike merging and pruning
(`TokenReduction`), this works around a whole block and carries each patch's importance from block to block.

Source: Xu et al., Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer, AAAI 2022, section 3. Departure: a patch
that was not computed keeps its importance, since the class token did not look at it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.token_reduction import class_attention, fuse, take, top_k

EVO_VIT = "evo_vit"
REMEMBERED = 0.5  # of the importance before, in the new one


@dataclass(frozen=True, slots=True)
class SlowFast:
    """One block's.

    Args:
        computed: how many patches; None: all, and the block only notes how important each is.
        num_prefix: tokens in front of the patches, of which the first is the class token.
    """

    computed: int | None
    num_prefix: int

    def __post_init__(self) -> None:
        if self.num_prefix < 1:
            raise ValueError(f"{EVO_VIT} scores by the class token's attention, and the network has no class token")
        if self.computed is not None and self.computed < 1:
            raise ValueError(f"{self.computed} patch tokens cannot be computed")

    def split(self, x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the block computes, and what follows.

        Args:
            x: tokens, float32 (B, P + M, D).
            importance: of each patch, float32 (B, M); None before the first block that notes it.

        Returns:
            The tokens in front, the `computed` most important patches and one that stands for the others, weighted by
            importance, (B, P + computed + 1, D); those others, (B, M - computed, D); and the importance of all, (B, M), in
            this order. Where all are computed: x, nothing (B, 0, D), and `importance`.
        """
        if self.computed is None or importance is None:
            return x, x[:, :0], importance
        front, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        kept, rest = top_k(importance, self.computed)
        slow, _ = fuse(patches, torch.ones_like(patches[..., :1]), importance, kept, rest)
        order = torch.cat([kept, rest], dim=1)
        return torch.cat([front, slow], dim=1), take(patches, rest), importance.gather(1, order)

    def join(
        self, before: Tensor, after: Tensor, rest: Tensor, importance: Tensor | None, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Behind the block.

        Args:
            before, after: what the block took and gave, (B, P + computed + 1, D), or (B, P + M, D) where all are computed.
            rest: the others, (B, M - computed, D).
            importance: of all, (B, M), None before the first block that notes it.
            weights: of the block's attention, float32 (B, heads, N, N).

        Returns:
            Tokens (B, P + M, D), in another order, and the importance of their patches (B, M).
        """
        seen = class_attention(weights[..., self.num_prefix :])
        if self.computed is None or importance is None:
            return after, seen if importance is None else _remembered(importance, seen)
        step = after[:, -1:] - before[:, -1:]  # of the patch that stands for the others
        known = _remembered(importance[:, : self.computed], seen[:, :-1])
        joined = torch.cat([after[:, :-1], rest + step], dim=1)
        return joined, torch.cat([known, importance[:, self.computed :]], dim=1)


def _remembered(importance: Tensor, seen: Tensor) -> Tensor:
    return REMEMBERED * importance + (1 - REMEMBERED) * seen
