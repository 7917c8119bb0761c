"""Augmented views of every image, kept with what the teacher says of each: it looks at them before the training, not in it.

A teacher that is larger than its student costs as much as it in every step. Teacher and student still see the very same crop,
as they must (Beyer et al., Knowledge distillation: A good teacher is patient and consistent, CVPR 2022), but for its mirror
image; stored answers are as in Shen and Xing, A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022.

Photographs of anything may be mixed in, for which nobody has a label: what the teacher says of them is more of what it knows
(Beyer et al., section 4.2).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from models.training.augmentation import augment
from models.training.config import StudentConfig

BATCH_SIZE = 250
CONFIG = "config.json"


class Teacher(Protocol):
    """What is asked once about every view."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def logits(self, x: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> logits (B, C) of every exit."""
        ...


@dataclass(frozen=True, slots=True)
class Views:
    """K views of N images, mapped from files."""

    images: Sequence[NDArray[np.uint8]]  # K of (N, H, W, 3)
    answers: Sequence[NDArray[np.float32]]  # K of (N, C): the teacher's class probabilities

    def batch(self, epoch: int, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The epoch's view of some images, half of them mirrored: float32 (B, 3, H, W) in [0, 1]; answers (B, C)."""
        view, indices = epoch % len(self.images), chosen.numpy()
        x = torch.from_numpy(self.images[view][indices]).permute(0, 3, 1, 2).float() / 255
        mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        return torch.where(mirrored, x.flip(-1), x), torch.from_numpy(self.answers[view][indices])


@dataclass(frozen=True, slots=True)
class StoredViews:
    """Of the training images, and of further photographs that nobody has labelled."""

    labelled: Views
    unlabelled: Views | None = None
    unlabelled_per_batch: int = 0

    def batch(self, epoch: int, chosen: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen training images, and further ones drawn at random.

        Args:
            epoch: whose view of each image is the next one.
            chosen: indices of training images, (B,).
            targets: their class probabilities, (B, C).
            generator: of the draws.

        Returns:
            float32 (B + M, 3, H, W) in [0, 1]; class probabilities wanted (B + M, C), which for unlabelled images are the
            teacher's; the teacher's (B + M, C).
        """
        x, taught = self.labelled.batch(epoch, chosen, generator)
        if self.unlabelled is None:
            return x, targets, taught
        drawn = torch.randint(len(self.unlabelled.images[0]), (self.unlabelled_per_batch,), generator=generator)
        more, said = self.unlabelled.batch(epoch, drawn, generator)
        return torch.cat([x, more]), torch.cat([targets, said]), torch.cat([taught, said])


@torch.no_grad()
def store_views(
    images: NDArray[np.uint8], teacher: Teacher, config: StudentConfig, directory: Path, *, stored_views: int
) -> Views:
    """Draw views and ask the teacher; those that an interrupted run has stored are taken as they are.

    Args:
        images: (N, H, W, 3).
        teacher: who is asked.
        config: how views are drawn, and who the teacher is.
        directory: for two files a view: its images, and the teacher's class probabilities.
        stored_views: how many.

    Raises:
        ValueError: the directory holds views that were drawn otherwise, or of other images.
    """
    directory.mkdir(parents=True, exist_ok=True)
    told = {"images": len(images), "taught_by": config.taught_by, "seed": config.seed, "augment": asdict(config.augment)}
    told = json.loads(json.dumps(told))
    claim = directory / CONFIG
    if claim.exists() and json.loads(claim.read_text()) != told:
        raise ValueError(f"{directory} holds views of other images, or drawn otherwise; choose another --run-dir")
    claim.write_text(json.dumps(told, indent=2) + "\n")
    drawn, answers = [], []
    for view in range(stored_views):
        paths = directory / f"{view}.images.npy", directory / f"{view}.answers.npy"
        if not paths[1].exists():
            _draw(images, teacher, config, view, paths, f"{directory.name}, {view + 1} of {stored_views}")
        drawn.append(np.load(paths[0], mmap_mode="r"))
        answers.append(np.load(paths[1], mmap_mode="r"))
    return Views(drawn, answers)


def _draw(
    images: NDArray[np.uint8], teacher: Teacher, config: StudentConfig, view: int, paths: tuple[Path, Path], shown: str
) -> None:
    generator = torch.Generator().manual_seed(config.seed * 10_000 + 5_000 + view)  # not one of an epoch's
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (teacher.mean, teacher.std))
    drawn = np.lib.format.open_memmap(paths[0], mode="w+", dtype=np.uint8, shape=images.shape)
    answers = []
    for start in track(range(0, len(images), BATCH_SIZE), shown):
        x = torch.from_numpy(images[start : start + BATCH_SIZE]).permute(0, 3, 1, 2).float() / 255
        pixels = (augment(x, config.augment, generator).clamp(0, 1) * 255).round()
        drawn[start : start + len(x)] = pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
        x = ((pixels / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bf16):
            logits = teacher.logits(x)[-1]
        answers.append(logits.float().softmax(dim=1).numpy())
    drawn.flush()
    partial = paths[1].with_suffix(".partial.npy")
    np.save(partial, np.concatenate(answers))
    partial.replace(paths[1])  # the last of the two: a view is there when its answers are
