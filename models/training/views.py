"""A few augmented views of every image, kept with what the teacher says of each: it looks at them once, not every epoch.

Its forward pass is half of a training step where it is larger than the network it teaches, and two cores are all there is.
Teacher and network still see the very same crop, as they must (Beyer et al., Knowledge distillation: A good teacher is patient
and consistent, CVPR 2022), but for a mirror image and two pixels, which make more of few views; stored answers are as in Shen
and Xing, A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from models.training.augmentation import augment
from models.training.config import StudentConfig
from models.training.data import Split

BATCH_SIZE = 250
SHIFT = 2  # pixels at most
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

    images: Sequence[np.ndarray]  # K of uint8 (N, H, W, 3)
    answers: Sequence[np.ndarray]  # K of float32 (N, C): the teacher's class probabilities

    def batch(self, epoch: int, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The epoch's view of some images, half mirrored, all moved alike: float32 (B, 3, H, W) in [0, 1]; answers (B, C)."""
        view, indices = epoch % len(self.images), chosen.numpy()
        x = torch.from_numpy(self.images[view][indices]).permute(0, 3, 1, 2).float() / 255
        mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = F.pad(torch.where(mirrored, x.flip(-1), x), [SHIFT] * 4, mode="reflect")
        down, right = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
        height, width = (side - 2 * SHIFT for side in x.shape[-2:])
        x = x[:, :, down : down + height, right : right + width]
        return x, torch.from_numpy(self.answers[view][indices])


@torch.no_grad()
def store_views(data: Split, teacher: Teacher, config: StudentConfig, directory: Path) -> Views:
    """Draw `config.stored_views` views and ask the teacher; those that an interrupted run has stored are taken as they are.

    Raises:
        ValueError: the directory holds views that were drawn otherwise, or of other images.
    """
    directory.mkdir(parents=True, exist_ok=True)
    told = {"images": len(data.labels), "taught_by": config.taught_by, "seed": config.seed, "augment": asdict(config.augment)}
    told = json.loads(json.dumps(told))
    claim = directory / CONFIG
    if claim.exists() and json.loads(claim.read_text()) != told:
        raise ValueError(f"{directory} holds views of other images, or drawn otherwise; choose another --run-dir")
    claim.write_text(json.dumps(told, indent=2) + "\n")
    images, answers = [], []
    for view in range(config.stored_views):
        paths = directory / f"{view}.images.npy", directory / f"{view}.answers.npy"
        if not paths[1].exists():
            _draw(data, teacher, config, view, paths)
        images.append(np.load(paths[0], mmap_mode="r"))
        answers.append(np.load(paths[1], mmap_mode="r"))
    return Views(images, answers)


def _draw(data: Split, teacher: Teacher, config: StudentConfig, view: int, paths: tuple[Path, Path]) -> None:
    generator = torch.Generator().manual_seed(config.seed * 10_000 + 5_000 + view)  # not one of an epoch's
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (teacher.mean, teacher.std))
    drawn = np.lib.format.open_memmap(paths[0], mode="w+", dtype=np.uint8, shape=data.images.shape)
    answers = []
    for start in track(range(0, len(data.images), BATCH_SIZE), f"view {view + 1} of {config.stored_views}"):
        x = torch.from_numpy(data.images[start : start + BATCH_SIZE]).permute(0, 3, 1, 2).float() / 255
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
