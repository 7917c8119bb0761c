"""A network with fewer tokens learns to answer as it did with all of them, from photographs of anything, without labels.

Both see the same view of a photograph, and the reduced one learns the probabilities of the other (Hinton et al., Distilling the
Knowledge in a Neural Network, 2015; that both see the same: Beyer et al., A good teacher is patient and consistent, CVPR 2022),
and what its tokens are behind each block (`models.training.followed`).
A part of the photographs is held out and tells whether it helped; where it did not, the weights stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.multi_exit import MultiExitViT
from models.training.followed import Followed
from models.training.loop import MAX_GRADIENT_NORM, learning_rate_factor

Track = Callable[[Sequence[int], str], Iterable[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryConfig:
    """Small steps: the network knows nearly everything already."""

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 2e-5  # the highest, of AdamW without decay
    warmup_fraction: float = 0.05
    smallest_view: float = 0.5  # share of a photograph's area
    aspect: float = math.log(4 / 3)  # largest natural logarithm of a view's width over its height
    held_out: float = 0.1  # of the photographs
    min_photos: int = 64
    tokens: float = 45.0  # nats that a token is worth which is as far from what it should be as that is long
    seed: int = 0
    bf16: bool = True


@dataclass(frozen=True, slots=True)
class Recovered:
    """How far its answer was from what it was, in nats an image, on photographs that were held out."""

    before: float
    after: float

    @property
    def helped(self) -> bool:
        return self.after < self.before


def recover(
    student: MultiExitViT,
    teacher: MultiExitViT,
    photos: NDArray[np.uint8],
    side: int,
    normalise: Callable[[Tensor], Tensor],
    config: RecoveryConfig,
    track: Track,
    *,
    first_exit: int = 0,
) -> Recovered:
    """Train in place; batch norms stay as they are.

    Args:
        student, teacher: of as many blocks; images (B, 3, side, side), normalised, to the logits of each exit.
        photos: (N, S, S, 3), S no less than `side`: views are cut out of them.
        normalise: of float32 (B, 3, side, side) from 0 to 255.
        track: shows how far a sequence of steps is.
        first_exit: that is learned; those before have heads that are still to be fitted.

    Raises:
        ValueError: there are fewer photographs than `min_photos`.
    """
    if len(photos) < config.min_photos:
        raise ValueError(f"{len(photos)} photographs are too few to learn from; {config.min_photos} or more are needed")
    student.eval()
    teacher.eval()
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(photos), generator=generator)
    num_held = max(config.batch_size, round(config.held_out * len(photos)))
    held, seen = order[:num_held], order[num_held:]

    def answers(network: nn.Module, x: Tensor, *, bf16: bool = config.bf16) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return [F.log_softmax(logits.float(), dim=1) for logits in network(x)[first_exit:]]

    @torch.no_grad()
    def distance() -> float:
        """Of the last exit."""
        total = 0.0
        for part in torch.split(held, config.batch_size):
            x = normalise(_whole(photos[part.numpy()], side))
            wanted, found = (answers(network, x, bf16=False)[-1] for network in (teacher, student))
            total += float(F.kl_div(found, wanted, log_target=True, reduction="sum"))
        return total / len(held)

    before, original = distance(), {name: value.clone() for name, value in student.state_dict().items()}
    parameters = [value for value in student.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    per_epoch = max(1, len(seen) // config.batch_size)
    total = per_epoch * config.epochs
    with Followed(student, teacher) as followed:
        for step in track(range(total), "steps of learning the former answers"):
            if step % per_epoch == 0:
                order = seen[torch.randperm(len(seen), generator=generator)]
            start = step % per_epoch * config.batch_size
            chosen = order[start : start + config.batch_size].tolist()
            x = normalise(torch.cat([_view(photos[index], side, config, generator) for index in chosen]))
            with torch.no_grad():
                wanted = answers(teacher, x)
            found = answers(student, x)
            losses = [F.kl_div(f, w, log_target=True, reduction="batchmean") for f, w in zip(found, wanted, strict=True)]
            loss = torch.stack(losses).sum() + config.tokens * followed.distance()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            factor = learning_rate_factor(step, total, max(1, int(total * config.warmup_fraction)))
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            optimizer.step()
    recovered = Recovered(before, distance())
    if not recovered.helped:
        student.load_state_dict(original)
    return recovered


def _whole(photos: NDArray[np.uint8], side: int) -> Tensor:
    """(N, S, S, 3) -> float32 (N, 3, side, side), from 0 to 255."""
    return _resized(torch.from_numpy(photos).permute(0, 3, 1, 2).float(), side)


def _view(photo: NDArray[np.uint8], side: int, config: RecoveryConfig, generator: torch.Generator) -> Tensor:
    """A random part, every second time mirrored: (S, S, 3) -> float32 (1, 3, side, side), from 0 to 255."""
    size = len(photo)
    area, aspect, left, top, mirrored = torch.rand(5, generator=generator).tolist()
    area = config.smallest_view + (1 - config.smallest_view) * area
    stretch = math.exp(config.aspect * (aspect - 0.5))
    width = min(size, max(1, round(size * math.sqrt(area) * stretch)))
    height = min(size, max(1, round(size * math.sqrt(area) / stretch)))
    x, y = int(left * (size - width + 1)), int(top * (size - height + 1))
    part = torch.from_numpy(photo[y : y + height, x : x + width]).permute(2, 0, 1)[None].float()
    view = _resized(part, side)
    return view.flip(3) if mirrored < 0.5 else view


def _resized(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
