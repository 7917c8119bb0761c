"""Exits for a network that came without: heads on frozen features, taught by the network's own answer.

The features behind each boundary are computed once and kept; a head is then fitted in seconds. No labels are needed: the last
exit's probabilities are the target (Hinton et al., Distilling the Knowledge in a Neural Network, 2015). A head starts as a copy
of the network's own, which is a better guess than none: features turn into the last ones' space block by block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from app.types import Array
from exporters.config import ExitHeadConfig
from exporters.images import ImageSetError
from exporters.progress import SILENT, Progress
from exporters.staging import stages_of
from exporters.validation import normalised
from models.manifest import PreprocessSpec
from models.multi_exit import MultiExitViT
from models.vit import Head

BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class FittedHead:
    """How one early exit came out, on images that it was not fitted on."""

    agreement_before: float  # with the last exit, as the copy it began as
    agreement: float
    steps: int


def fit_exit_heads(
    model: MultiExitViT, pixels: Array, spec: PreprocessSpec, config: ExitHeadConfig, progress: Progress = SILENT
) -> list[FittedHead]:
    """Fit the head of every stage but the last, in place; the rest of the network stays as it is.

    Args:
        pixels: (N, ...), what stage 0 takes; images like those to come, labels are not needed.

    Raises:
        ImageSetError: there are too few images to fit on some and look at others.
    """
    if len(pixels) < 2 * config.min_held_out:
        raise ImageSetError(f"{len(pixels)} images are too few to fit exits on; {2 * config.min_held_out} or more are needed")
    stages = stages_of(model)
    features, target = _features(model, pixels, spec, progress)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(pixels), generator=generator)
    num_held = max(config.min_held_out, round(config.held_out * len(pixels)))
    held, fitted_on = order[:num_held], order[num_held:]
    results = []
    for index, stage in enumerate(stages[:-1]):
        stage.head.load_state_dict(stages[-1].head.state_dict())
        result = _fit(stage.head, features[index], target, held, fitted_on, config, generator, progress)
        percent = f"{100 * result.agreement:.1f} % ({100 * result.agreement_before:.1f} before it was fitted)"
        progress.step(f"exit {index} agrees with the last on {percent}")
        results.append(result)
    return results


@torch.no_grad()
def _features(model: MultiExitViT, pixels: Array, spec: PreprocessSpec, progress: Progress) -> tuple[list[Tensor], Tensor]:
    """What each early head sees, (N, P or all tokens, D), and the last exit's probabilities (N, C)."""
    stages, num_prefix = stages_of(model), model.config.num_prefix_tokens
    collected: list[list[Tensor]] = [[] for _ in stages[:-1]]
    target = []
    for start in progress.track(range(0, len(pixels), BATCH_SIZE), "features of the images"):
        x, sizes = normalised(pixels[start : start + BATCH_SIZE], spec), None
        for index, stage in enumerate(stages):
            logits, x, sizes = stage(x, sizes)
            if index < len(collected):
                collected[index].append(x[:, :num_prefix].clone() if num_prefix else x)
        target.append(logits.softmax(dim=1))
    return [torch.cat(parts) for parts in collected], torch.cat(target)


def _fit(
    head: Head,
    features: Tensor,
    target: Tensor,
    held: Tensor,
    fitted_on: Tensor,
    config: ExitHeadConfig,
    generator: torch.Generator,
    progress: Progress,
) -> FittedHead:
    """Until the held-out images agree no better; the best state is kept."""

    @torch.no_grad()
    def agreement() -> float:
        found = [head(features[part]).argmax(1) == target[part].argmax(1) for part in torch.split(held, BATCH_SIZE)]
        return float(torch.cat(found).float().mean())

    before = best = agreement()
    best_state = {name: value.clone() for name, value in head.state_dict().items()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    best_step = 0
    for step in progress.track(range(1, config.max_steps + 1), "steps of an exit's head, at most"):
        chosen = fitted_on[torch.randint(len(fitted_on), (min(config.batch_size, len(fitted_on)),), generator=generator)]
        noisy = features[chosen] * (1 + config.noise * torch.randn(features[chosen].shape, generator=generator))
        loss = F.kl_div(F.log_softmax(head(noisy), dim=1), target[chosen], reduction="batchmean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        if step - best_step >= config.patience:
            break
        if step % config.look_every == 0 and (now := agreement()) > best:
            best, best_step = now, step
            best_state = {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(best_state)
    return FittedHead(before, best, best_step)


def as_text(results: list[FittedHead]) -> str:
    """For the card."""
    return ", ".join(f"exit {index} {100 * result.agreement:.1f} %" for index, result in enumerate(results))
