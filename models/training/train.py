"""Train a multi-exit network: all exits at once, one cosine cycle with warm-up, resumable after every epoch.

The optimiser and the smoothing of labels are those of the DeiT line (Touvron et al., ICML 2021), shortened.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from models.multi_exit import MultiExitViT
from models.training.data import Split, augment, to_tensor
from models.zoo import ZOO, create_model


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run. The learning rate is for the batch size given; weight decay spares biases, norms and embeddings."""

    model: str = "vit_cifar10"
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_fraction: float = 0.1
    label_smoothing: float = 0.1
    exit_weights: tuple[float, ...] = (0.5, 0.75, 1.0)  # of each exit's cross-entropy, first to last
    seed: int = 0
    bf16: bool = True


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and kernels decay; vectors and position embeddings do not."""
    decay = [p for name, p in model.named_parameters() if p.ndim >= 2 and "pos_embed" not in name and "token" not in name]
    kept = {id(p) for p in decay}
    rest = [p for p in model.parameters() if id(p) not in kept]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def joint_loss(logits: list[Tensor], labels: Tensor, config: TrainConfig) -> Tensor:
    """Weighted sum of every exit's cross-entropy."""
    losses = [
        weight * F.cross_entropy(exit_logits.float(), labels, label_smoothing=config.label_smoothing)
        for weight, exit_logits in zip(config.exit_weights, logits, strict=True)
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def accuracy_per_exit(model: MultiExitViT, images: Tensor, labels: np.ndarray, batch_size: int = 500) -> list[float]:
    """Top-1 of each exit on normalised images (N, 3, H, W), every image taken through all of them."""
    model.eval()
    correct = np.zeros(len(model.stages))
    for start in range(0, len(images), batch_size):
        target = torch.from_numpy(labels[start : start + batch_size])
        for index, logits in enumerate(model(images[start : start + batch_size])):
            correct[index] += (logits.argmax(1) == target).sum().item()
    return [float(value) for value in correct / len(images)]


def train(config: TrainConfig, data: Split, held_out: Split, run_dir: Path) -> MultiExitViT:
    """Train, or go on where an interrupted run in the same directory stopped.

    Writes `checkpoint.pt` after every epoch, `log.jsonl` (a line an epoch) and `config.json`.

    Raises:
        ValueError: when the directory holds a run of another configuration.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    _claim(run_dir, config)
    entry = ZOO[config.model]
    model = create_model(config.model, seed=config.seed)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate)
    images = to_tensor(data.images, entry.preprocess.mean, entry.preprocess.std)
    labels = torch.from_numpy(data.labels)
    held_images = to_tensor(held_out.images, entry.preprocess.mean, entry.preprocess.std)
    steps_per_epoch = len(images) // config.batch_size
    total = steps_per_epoch * config.epochs
    warmup = max(1, int(total * config.warmup_fraction))

    first_epoch = 0
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first_epoch = saved["epoch"] + 1

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=total, completed=first_epoch * steps_per_epoch)
        for epoch in range(first_epoch, config.epochs):
            # Seeded by the epoch, so that a resumed run sees the same batches as an unbroken one.
            generator = torch.Generator().manual_seed(config.seed * 10_000 + epoch)
            order = torch.randperm(len(images), generator=generator)
            started, running = time.perf_counter(), 0.0
            model.train()
            for step in range(steps_per_epoch):
                factor = learning_rate_factor(epoch * steps_per_epoch + step, total, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * factor
                chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bf16):
                    logits = model(augment(images[chosen], generator))
                loss = joint_loss(logits, labels[chosen], config)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                running += loss.item()
                progress.update(
                    task, advance=1, description=f"epoch {epoch + 1}/{config.epochs} loss {running / (step + 1):.3f}"
                )
            accuracies = accuracy_per_exit(model, held_images, held_out.labels)
            seconds = time.perf_counter() - started
            _append(run_dir / "log.jsonl", epoch, running / steps_per_epoch, accuracies, seconds)
            shown = " ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
            progress.console.print(f"epoch {epoch + 1}: held-out top-1 by exit {shown}, {seconds:.0f} s")
            partial = checkpoint.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, partial)
            partial.replace(checkpoint)
    model.eval()
    return model


def _claim(run_dir: Path, config: TrainConfig) -> None:
    path, wanted = run_dir / "config.json", json.loads(json.dumps(asdict(config)))
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise ValueError(f"{run_dir} holds a run of another configuration; choose another --run-dir or remove it")
    path.write_text(json.dumps(wanted, indent=2) + "\n")


def _append(path: Path, epoch: int, loss: float, accuracies: list[float], seconds: float) -> None:
    line = {"epoch": epoch + 1, "loss": loss, "held_out_top1_by_exit": accuracies, "seconds": seconds}
    with path.open("a") as log:
        log.write(json.dumps(line) + "\n")
