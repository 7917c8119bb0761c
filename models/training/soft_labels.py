"""What a teacher says of every training image, asked once and kept: class probabilities instead of a class.

A teacher that is larger than its student costs as much as it in every step. Here it sees a few augmented views of each image
before the training, and the mean of its answers is the image's label from then on (Bagherinezhad et al., Label Refinery, 2018).
The views themselves are not kept: trained on four views of each image, a network had them by heart after eight epochs (right on
88 % of them, on 84 % of the plain training images and on 82 % of others).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from models.training.augmentation import augment
from models.training.config import StudentConfig
from models.training.data import Split

BATCH_SIZE = 250
CONFIG = "config.json"


class Teacher(Protocol):
    """What is asked once."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def logits(self, x: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> logits (B, C) of every exit."""
        ...


@torch.no_grad()
def soft_labels(data: Split, teacher: Teacher, config: StudentConfig, directory: Path) -> NDArray[np.float32]:
    """Class probabilities, float32 (N, C): the mean over `config.stored_answers` augmented views of each image.

    What is asked is kept in the directory, a file a view; an interrupted run asks for the missing ones only.

    Raises:
        ValueError: the directory holds answers about views that were drawn otherwise, or about other images.
    """
    directory.mkdir(parents=True, exist_ok=True)
    told = {"images": len(data.labels), "taught_by": config.taught_by, "seed": config.seed, "augment": asdict(config.augment)}
    told = json.loads(json.dumps(told))
    claim = directory / CONFIG
    if claim.exists() and json.loads(claim.read_text()) != told:
        raise ValueError(f"{directory} holds answers about other images, or drawn otherwise; choose another --run-dir")
    claim.write_text(json.dumps(told, indent=2) + "\n")
    answers = []
    for view in range(config.stored_answers):
        path = directory / f"{view}.answers.npy"
        if not path.exists():
            partial = path.with_suffix(".partial.npy")
            np.save(partial, _answers(data, teacher, config, view))
            partial.replace(path)
        answers.append(np.load(path))
    mean: NDArray[np.float32] = np.mean(answers, axis=0, dtype=np.float32)
    return mean


def _answers(data: Split, teacher: Teacher, config: StudentConfig, view: int) -> NDArray[np.float32]:
    generator = torch.Generator().manual_seed(config.seed * 10_000 + 5_000 + view)  # not one of an epoch's
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (teacher.mean, teacher.std))
    answers = []
    for start in track(range(0, len(data.images), BATCH_SIZE), f"asking the teacher, {view + 1} of {config.stored_answers}"):
        x = torch.from_numpy(data.images[start : start + BATCH_SIZE]).permute(0, 3, 1, 2).float() / 255
        x = ((augment(x, config.augment, generator) - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bf16):
            logits = teacher.logits(x)[-1]
        answers.append(logits.float().softmax(dim=1).numpy())
    return np.concatenate(answers)
