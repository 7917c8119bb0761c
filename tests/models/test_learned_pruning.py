"""DynamicViT's predictor against a plain loop written from the paper, from its checkpoint to its graph."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from exporters.calibration import collect_ranges
from exporters.config import CalibrationConfig
from exporters.golden import golden_images
from exporters.reduction_schedule import ReductionSchedule, ScheduleError, apply_schedule, clear_schedule
from exporters.sensitivity import every_exit
from exporters.sources.base import Asked, Network
from exporters.sources.timm_vit import TimmSource
from exporters.staging import stage_specs
from exporters.validation import normalised
from exporters.vit_export import stage_graphs
from exporters.whole_graph import multiply_adds
from models.weights import WeightsError
from tests.checkpoints import DEPTH, LABELS, WIDTH, checkpoint, write_checkpoint

PATCHES = 16
SHAPES = {"in_conv.1": (32, 32), "out_conv.0": (16, 32), "out_conv.2": (8, 16), "out_conv.4": (2, 8)}


def dynamic_checkpoint(*, predictors: int = 1) -> dict[str, Tensor]:
    """A ViT and its predictors under DynamicViT's names."""
    generator = torch.Generator().manual_seed(1)
    state = checkpoint()
    for number in range(predictors):
        prefix = f"score_predictor.{number}"
        state |= {f"{prefix}.in_conv.0.weight": 1 + 0.1 * torch.randn(WIDTH, generator=generator)}
        state |= {f"{prefix}.in_conv.0.bias": 0.1 * torch.randn(WIDTH, generator=generator)}
        for name, shape in SHAPES.items():
            state |= {f"{prefix}.{name}.weight": torch.randn(*shape, generator=generator) * 0.5}
            state |= {f"{prefix}.{name}.bias": torch.randn(shape[0], generator=generator) * 0.5}
    return state


def load(folder: Path, *, predictors: int = 1, boundaries: tuple[int, ...] = ()) -> Network:
    """Written to disk and read."""
    return TimmSource(*write_checkpoint(folder, dynamic_checkpoint(predictors=predictors)), LABELS, Asked(boundaries)).load()


def gelu(value: float) -> float:
    return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))


def dense(state: dict[str, Tensor], name: str, x: list[float]) -> list[float]:
    weight, bias = state[f"score_predictor.0.{name}.weight"].tolist(), state[f"score_predictor.0.{name}.bias"].tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def scores_by_hand(state: dict[str, Tensor], patches: list[list[float]]) -> list[float]:
    """Equations 3 to 6 of the paper, patch by patch: the probability of being kept."""
    gain, offset = (state[f"score_predictor.0.in_conv.0.{kind}"].tolist() for kind in ("weight", "bias"))
    local = []
    for patch in patches:
        mean = sum(patch) / WIDTH
        deviation = math.sqrt(sum((value - mean) ** 2 for value in patch) / WIDTH + 1e-5)
        normed = [(value - mean) / deviation * g + o for value, g, o in zip(patch, gain, offset, strict=True)]
        local.append([gelu(value) for value in dense(state, "in_conv.1", normed)])
    half = WIDTH // 2
    shared = [sum(features[half + i] for features in local) / len(local) for i in range(half)]
    kept = []
    for features in local:
        x = [gelu(value) for value in dense(state, "out_conv.0", features[:half] + shared)]
        keep, drop = dense(state, "out_conv.4", [gelu(value) for value in dense(state, "out_conv.2", x)])
        kept.append(math.exp(keep) / (math.exp(keep) + math.exp(drop)))
    return kept


def test_the_block_sees_the_patches_that_the_paper_would_keep(tmp_path: Path) -> None:
    """And the class token; the schedule keeps the share of all patches, rounded down."""
    model = load(tmp_path).model
    apply_schedule(model, ReductionSchedule.parse("dynamicvit:0.7@2", DEPTH, PATCHES))
    pruning = model.stages[0].blocks[1].pruning
    tokens = torch.randn(3, 1 + PATCHES, WIDTH)

    with torch.no_grad():
        left = pruning(tokens)
        odds = pruning.predictor(tokens[:, 1:])

    assert left.shape == (3, 1 + 11, WIDTH)  # 0.7 of 16 is 11.2
    assert torch.equal(left[:, 0], tokens[:, 0])
    for image in range(3):
        kept = scores_by_hand(dynamic_checkpoint(), tokens[image, 1:].tolist())
        np.testing.assert_allclose(torch.sigmoid(odds[image]), kept, atol=1e-5)
        best = sorted(range(PATCHES), key=lambda patch, kept=kept: -kept[patch])[:11]  # type: ignore[misc]
        torch.testing.assert_close(left[image, 1:], tokens[image, 1:][best])


@pytest.mark.parametrize("boundaries", [(), (1, 2)])
def test_its_graph_equals_pytorch(tmp_path: Path, boundaries: tuple[int, ...]) -> None:
    """In fp32 at several batch sizes, near it in INT8, with the multiply-adds that are told."""
    network = load(tmp_path, boundaries=boundaries)
    model, spec = network.model, network.preprocess
    apply_schedule(model, ReductionSchedule.parse("dynamicvit:0.5@2", DEPTH, PATCHES))
    pixels = np.resize(golden_images(spec), (5, 16, 16, 3))
    with torch.no_grad():
        expected = [logits.numpy() for logits in model(normalised(pixels, spec))]

    stages = stage_graphs(model, spec)

    for size in (1, 5):
        for mine, theirs in zip(every_exit(stages, pixels[:size]), expected, strict=True):
            np.testing.assert_allclose(mine, theirs[:size], atol=1e-4)
    told = sum(stage.gmacs for stage in stage_specs(model, spec))
    assert told == pytest.approx(sum(map(multiply_adds, stages)) / 1e9, rel=0.01)  # the two logits are one column there
    ranges = collect_ranges(stage_graphs(model, spec, expose=True), pixels, CalibrationConfig())
    int8 = every_exit(stage_graphs(model, spec, ranges=ranges), pixels)[-1]
    assert np.abs(int8 - expected[-1]).max() < 0.5 * np.ptp(expected[-1])


def test_it_needs_as_many_predictors_as_it_asks_for(tmp_path: Path) -> None:
    """And their tensors; a network that is not asked to prune has all its tokens."""
    model = load(tmp_path).model
    with pytest.raises(ScheduleError, match=r"asks for 2 trained predictors, and the checkpoint has 1"):
        apply_schedule(model, ReductionSchedule.parse("dynamicvit:0.7@1,2", DEPTH, PATCHES))
    with pytest.raises(ScheduleError, match="0 patch tokens cannot be left"):
        apply_schedule(model, ReductionSchedule.parse("dynamicvit:0.01@1", DEPTH, PATCHES))
    clear_schedule(model)
    assert model.stages[0].blocks[0].pruning is None
    assert ReductionSchedule.parse("dynamicvit:0.7@1,2", DEPTH, PATCHES).removed == (5, 4)  # 11 left, then 7
    plain = TimmSource(*write_checkpoint(tmp_path, checkpoint()), LABELS).load().model
    with torch.no_grad():
        torch.testing.assert_close(plain(torch.ones(1, 3, 16, 16)), model(torch.ones(1, 3, 16, 16)))
    with pytest.raises(ScheduleError, match="the checkpoint has 0"):
        apply_schedule(plain, ReductionSchedule.parse("dynamicvit:0.7@1", DEPTH, PATCHES))
    broken = {name: value for name, value in dynamic_checkpoint().items() if name != "score_predictor.0.out_conv.2.bias"}
    with pytest.raises(WeightsError, match=r"lacks score_predictor.0.out_conv.2.bias"):
        TimmSource(*write_checkpoint(tmp_path, broken), LABELS).load()
