"""A Vision Transformer cut into stages, with a head after each.

The idea is BranchyNet's (Teerapittayanon et al., ICPR 2016) and MSDNet's (Huang et al., ICLR 2018): all heads are
trained together, and at run time an image leaves at the first head that is sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from models.learned_pruning import TokenPredictor
from models.vit import Block, Embedding, Head, ViTConfig, init_weights


class Stage(nn.Module):
    """Some blocks and the head behind them; the first stage also embeds the image."""

    def __init__(self, config: ViTConfig, num_blocks: int, *, first: bool) -> None:
        super().__init__()
        self.embedding = Embedding(config) if first else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(num_blocks))
        self.head = Head(config)

    def forward(self, x: Tensor, carried: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Image (B, 3, H, W), or tokens (B, N, D) and what goes along -> logits (B, C), tokens (B, M, D) and what goes along.

        That is their sizes (B, M, 1), or the importance of their patches (`Block`), or None.
        """
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks:
            x, carried = block(x, carried)
        return self.head(x, carried), x, carried


def first_stages(model: MultiExitViT, count: int) -> MultiExitViT:
    """A network of its first stages alone, which share their weights with it.

    Raises:
        ValueError: it has not so many.
    """
    if not 1 <= count <= len(model.stages):
        raise ValueError(f"the network has {len(model.stages)} stages, not {count}")
    boundaries = model.boundaries[:count]
    found = MultiExitViT(replace(model.config, depth=boundaries[-1]), boundaries)
    found.stages = model.stages[:count]
    found.predictors = model.predictors
    return found.train(model.training)


class MultiExitViT(nn.Module):
    """`boundaries` are the numbers of blocks after which there is an exit; the last is the depth."""

    def __init__(self, config: ViTConfig, boundaries: Sequence[int]) -> None:
        super().__init__()
        starts = (0, *boundaries[:-1])
        if list(boundaries) != sorted(set(boundaries)) or boundaries[0] < 1 or boundaries[-1] != config.depth:
            raise ValueError(f"boundaries {tuple(boundaries)} must rise and end at the depth, {config.depth}")
        self.config = config
        self.boundaries = tuple(boundaries)
        self.stages = nn.ModuleList(
            Stage(config, end - start, first=start == 0) for start, end in zip(starts, boundaries, strict=True)
        )
        self.predictors = nn.ModuleList(TokenPredictor(config.width) for _ in range(config.num_predictors))
        self.apply(init_weights)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised image, float32 (B, 3, H, W) -> logits (B, C) of every exit, first to last."""
        logits, carried = [], None
        for stage in self.stages:
            exit_logits, x, carried = stage(x, carried)
            logits.append(exit_logits)
        return logits
