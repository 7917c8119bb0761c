"""How far the tokens of a network with fewer of them are from what their patches are in the network that keeps them all.

A token stands for certain patches, each with a share of it. What it should be behind a block is the mean, by these shares, of
what they are there without reduction. So each photograph teaches a vector for every token behind every block, not one answer
alone; with few photographs that is most of what can be learned (that features teach more than answers: Romero et al., FitNets,
ICLR 2015; above all where data are few: Bai et al., Few Shot Network Compression via Cross Distillation, AAAI 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from models.multi_exit import MultiExitViT
from models.token_reduction import Combine, TokenReduction
from models.vit import Block

Output = tuple[Tensor, Tensor | None]  # of a block


class Trail:
    """The share of each patch in each token of the images that are on their way, float32 (B, M, patches)."""

    shares: Tensor

    def start(self, batch: int, patches: int) -> None:
        """Each patch is a token."""
        self.shares = torch.eye(patches).expand(batch, patches, patches)


@dataclass(frozen=True)
class FollowedReduction(TokenReduction):
    """The same reduction, which also leaves a trail."""

    trail: Trail

    def combination(self, x: Tensor, sizes: Tensor, weights: Tensor, keys: Tensor) -> Combine:
        """As it was; the shares are combined as the patches are."""
        combine = super().combination(x, sizes, weights, keys)
        with torch.no_grad():
            self.trail.shares, _ = combine(self.trail.shares)
        return combine


class Followed:
    """While this context is open, both networks note the tokens behind each block, whenever they are called.

    Patches are compared where each can be followed into a token. Where the networks have patches of different sizes, or a
    block chooses its patches in another way than by a `TokenReduction`, only the tokens in front are.
    """

    def __init__(self, student: MultiExitViT, teacher: MultiExitViT) -> None:
        self._student, self._teacher = student, teacher
        self._blocks, self._teachers = _blocks(student), _blocks(teacher)
        if len(self._blocks) != len(self._teachers):
            raise ValueError(f"{len(self._blocks)} blocks cannot be compared with {len(self._teachers)}")
        elsewhere = any(block.pruning is not None or block.slow_fast is not None for block in self._blocks)
        self._follows = not elsewhere and student.config.num_patches == teacher.config.num_patches
        self._prefix = student.config.num_prefix_tokens
        self._reductions = [block.reduction for block in self._blocks]
        self._first = next((i for i, each in enumerate(self._reductions) if each is not None), 0)
        self._trail = Trail()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._seen: dict[tuple[bool, int], tuple[Tensor, Tensor | None]] = {}  # student's or not, block: tokens, shares

    def __enter__(self) -> Self:
        for block, reduction in zip(self._blocks, self._reductions, strict=True):
            if reduction is not None and self._follows:
                block.reduction = FollowedReduction(reduction.method, reduction.keep, reduction.num_prefix, self._trail)
        self._hooks.append(self._student.register_forward_pre_hook(self._start))
        for ours, blocks in ((True, self._blocks), (False, self._teachers)):
            self._hooks += [block.register_forward_hook(partial(self._note, ours, i)) for i, block in enumerate(blocks)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        for block, reduction in zip(self._blocks, self._reductions, strict=True):
            block.reduction = reduction
        self._seen.clear()

    def distance(self) -> Tensor:
        """Of the last images that both were given: the squared error over the squared length, mean of the blocks, scalar.

        From the first block that reduces on; tokens in front and patches count alike, a token of patches as often as it
        stands for some. Behind the last block, patches count only where a head looks at them.
        """
        total, last = torch.zeros(()), len(self._blocks) - 1
        for index in range(self._first, last + 1):
            (tokens, shares), (wanted, _) = self._seen[True, index], self._seen[False, index]
            tokens, wanted = tokens.float(), wanted.float()
            if self._prefix:
                front = wanted[:, : self._prefix]
                total = total + (tokens[:, : self._prefix] - front).square().mean() / front.square().mean()
            if shares is not None and not (self._prefix and index == last):
                patches, weight = wanted[:, self._prefix :], (shares > 0).sum(dim=-1).float()
                error = (tokens[:, self._prefix :] - shares.float() @ patches).square().mean(dim=-1)  # (B, M)
                total = total + (weight * error).sum() / weight.sum() / patches.square().mean()
        return total / (last + 1 - self._first)

    def _start(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        self._trail.start(len(inputs[0]), self._student.config.num_patches)

    def _note(self, ours: bool, index: int, _: nn.Module, __: object, output: Output) -> None:
        self._seen[ours, index] = output[0], self._trail.shares if ours and self._follows else None


def _blocks(network: MultiExitViT) -> list[Block]:
    return [module for module in network.modules() if isinstance(module, Block)]
