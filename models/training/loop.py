"""The loop that trains any `Learner`: one cosine cycle, resumable after every epoch, with a progress bar, a log and curves."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.training.augmentation import augment, cutmix
from models.training.config import RunConfig
from models.training.curves import draw_curves
from models.training.data import Split, to_tensor
from models.training.views import StoredViews

CHECKPOINT, LOG, CONFIG, CURVES = "checkpoint.pt", "log.jsonl", "config.json", "curves.png"
MAX_GRADIENT_NORM = 1.0
# What runs did before it could be said.
SINCE: dict[str, object] = {
    "muon": True,
    "taught_by": "a convolutional network",
    "started_from": "",
    "stem_from": "",
    "stored_views": 0,
    "unlabelled_per_batch": 0,
}
RUNNING_MEAN = 0.98  # of what the progress bar shows


class Learner(Protocol):
    """A network with what is needed to train it."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: int

    def logits(self, x: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> logits (B, C) of every exit, first to last."""
        ...

    def prepare_step(self) -> None:
        """Called when the gradients are there, before the optimizers' steps."""
        ...

    def loss(self, logits: list[Tensor], x: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        """What to minimise, given the class probabilities wanted and those of a teacher, if it was asked before: (B, C)."""
        ...


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@torch.no_grad()
def predict(learner: Learner, images: np.ndarray, *, bf16: bool, batch_size: int = 250) -> list[Tensor]:
    """Logits, float32 (N, C), of each exit, every image taken through all of them."""
    learner.model.eval()
    collected = []
    for start in range(0, len(images), batch_size):
        x = to_tensor(images[start : start + batch_size], learner.mean, learner.std)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            collected.append(learner.logits(x))
    return [torch.cat(parts).float() for parts in zip(*collected, strict=True)]


def accuracy_per_exit(learner: Learner, split: Split, *, bf16: bool) -> list[float]:
    """Top-1 of each exit, in [0, 1]."""
    labels = torch.from_numpy(split.labels)
    return [float((logits.argmax(1) == labels).float().mean()) for logits in predict(learner, split.images, bf16=bf16)]


def fit(
    learner: Learner,
    config: RunConfig,
    data: Split,
    held_out: Split,
    run_dir: Path,
    name: str,
    stored: StoredViews | None = None,
) -> None:
    """Train, or go on where an interrupted run in the same directory stopped.

    Where a teacher was asked before, the `stored` views of the training images are seen instead of new ones.

    Writes `checkpoint.pt` after every epoch, `log.jsonl` (a line an epoch), `curves.png` and `config.json`.

    Raises:
        ValueError: when the directory holds a run of another configuration.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    _claim(run_dir / CONFIG, config)
    learner.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2)  # uint8 (N, 3, H, W), channels last in memory
    labels = torch.from_numpy(data.labels)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (learner.mean, learner.std))
    steps_per_epoch = len(images) // config.batch_size
    total = steps_per_epoch * config.epochs
    warmup = max(1, int(total * config.warmup_fraction))
    first_epoch = _resume(run_dir / CHECKPOINT, learner)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=total, completed=first_epoch * steps_per_epoch)
        shown = _Running()
        for epoch in range(first_epoch, config.epochs):
            # Seeded by the epoch, so that a resumed run sees the same batches as an unbroken one.
            generator = torch.Generator().manual_seed(config.seed * 10_000 + epoch)
            order = torch.randperm(len(images), generator=generator)
            started, summed = time.perf_counter(), 0.0
            learner.model.train()
            for step in range(steps_per_epoch):
                chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
                targets, taught = F.one_hot(labels[chosen], learner.num_classes).float(), None
                if stored is None:
                    x = augment(images[chosen].float() / 255, config.augment, generator)
                    x, targets = cutmix(x, targets, config.augment.cutmix_probability, generator)
                else:
                    x, targets, taught = stored.batch(epoch, chosen, targets, generator)
                x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
                _set_learning_rate(learner, learning_rate_factor(epoch * steps_per_epoch + step, total, warmup))
                loss, accuracy = _step(learner, x, targets, taught, config)
                summed += loss
                shown.add(loss, accuracy)
                progress.update(task, advance=1, description=f"{name}, epoch {epoch + 1}/{config.epochs}, {shown}")
            accuracies = accuracy_per_exit(learner, held_out, bf16=config.bf16)
            seconds = time.perf_counter() - started
            line = {"epoch": epoch + 1, "loss": summed / steps_per_epoch, "held_out_top1_by_exit": accuracies}
            with (run_dir / LOG).open("a") as log:
                log.write(json.dumps({**line, "seconds": round(seconds, 1)}) + "\n")
            percent = " ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
            progress.console.print(f"{name}, epoch {epoch + 1}: held-out top-1 by exit {percent} %, {seconds:.0f} s")
            _save(run_dir / CHECKPOINT, learner, epoch)
            draw_curves(run_dir / LOG, run_dir / CURVES, name)
    learner.model.eval()


class _Running:
    """Running means of loss and accuracy, for people to look at."""

    def __init__(self) -> None:
        self._loss: float | None = None
        self._accuracy = 0.0

    def add(self, loss: float, accuracy: float) -> None:
        keep = 0.0 if self._loss is None else RUNNING_MEAN
        self._loss = keep * (self._loss or 0.0) + (1 - keep) * loss
        self._accuracy = keep * self._accuracy + (1 - keep) * accuracy

    def __str__(self) -> str:
        return f"loss {self._loss:.3f}, top-1 {100 * self._accuracy:.1f} %"


def _step(learner: Learner, x: Tensor, targets: Tensor, taught: Tensor | None, config: RunConfig) -> tuple[float, float]:
    """One update; (loss, accuracy of the last exit on these augmented images)."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bf16):
        logits = learner.logits(x)
    loss = learner.loss([exit_logits.float() for exit_logits in logits], x, targets, taught)
    for optimizer in learner.optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    torch.nn.utils.clip_grad_norm_(learner.model.parameters(), MAX_GRADIENT_NORM)
    learner.prepare_step()
    for optimizer in learner.optimizers:
        optimizer.step()
    return float(loss.detach()), float((logits[-1].argmax(1) == targets.argmax(1)).float().mean())


def _set_learning_rate(learner: Learner, factor: float) -> None:
    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["highest_lr"] * factor


def _claim(path: Path, config: RunConfig) -> None:
    wanted = json.loads(json.dumps(asdict(config)))
    if path.exists():
        stored = json.loads(path.read_text())
        stored |= {name: value for name, value in SINCE.items() if stored and name in wanted and name not in stored}
        if changed := [name for name in wanted | stored if wanted.get(name) != stored.get(name)]:
            raise ValueError(f"{path.parent} holds a run with another {', '.join(changed)}; choose another --run-dir")
    path.write_text(json.dumps(wanted, indent=2) + "\n")


def _save(path: Path, learner: Learner, epoch: int) -> None:
    partial = path.with_suffix(".partial")
    optimizers = [optimizer.state_dict() for optimizer in learner.optimizers]
    torch.save({"model": learner.model.state_dict(), "optimizers": optimizers, "epoch": epoch}, partial)
    partial.replace(path)


def _resume(path: Path, learner: Learner) -> int:
    """The first epoch that is still to be trained."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    learner.model.load_state_dict(saved["model"])
    for optimizer, state in zip(learner.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return int(saved["epoch"]) + 1
