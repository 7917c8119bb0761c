"""Recovering what token reduction lost, as a step of an export: photographs read, learned from, and told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from app.runtime.cpu import has_bf16
from exporters.images import ImageSetError, read_unlabelled
from exporters.progress import SILENT, Progress
from models.manifest import PreprocessSpec
from models.multi_exit import MultiExitViT
from models.training.recovery import Recovered, RecoveryConfig, recover

LARGER = 1.25  # than what the network sees: views are cut out
MAX_PHOTOS = 4000  # 235 kB each at 224 pixels


def recover_answers(
    model: MultiExitViT,
    former: MultiExitViT,
    photos: Path,
    spec: PreprocessSpec,
    *,
    has_exits: bool,
    progress: Progress = SILENT,
    config: RecoveryConfig | None = None,
) -> str:
    """Have a reduced network learn its former answers, in place; what came of it, in words.

    Args:
        model: whose tokens are reduced.
        former: the same before.
        photos: folder or zip of images of anything.
        has_exits: it came with heads, which learn too.

    Raises:
        ImageSetError: there are too few, or a file is no image.
    """
    size = round(LARGER * model.config.image_size)
    larger = spec.model_copy(update={"resize": size, "crop": (size, size), "layout": "uint8_nhwc"})
    found = read_unlabelled(photos, larger, progress, most=MAX_PHOTOS)
    settings = config or RecoveryConfig(bf16=has_bf16())
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))

    def normalise(x: Tensor) -> Tensor:
        return (x * spec.scale - mean) / std

    progress.step(f"learning the former answers from {len(found)} photographs, {settings.epochs} times each")
    try:
        recovered = recover(
            model,
            former,
            np.asarray(found.pixels),
            model.config.image_size,
            normalise,
            settings,
            progress.track,
            first_exit=0 if has_exits else len(model.stages) - 1,
        )
    except ValueError as error:
        raise ImageSetError(f"{photos.name}: {error}") from error
    said = in_words(recovered)
    progress.step(said)
    return f"with fewer tokens it learned its former answers from {len(found)} photographs (sha256 {found.sha256[:16]}): {said}"


def in_words(recovered: Recovered) -> str:
    """For the console and the card."""
    if not recovered.helped:
        return f"it did not help ({recovered.before:.4f} nats from its former answer on photographs held out): left as it was"
    return f"{recovered.after:.4f} nats from its former answer instead of {recovered.before:.4f}, on photographs held out"
