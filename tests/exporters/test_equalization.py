"""Channels are evened out: the same network in fp32, a better one in INT8."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters import vit_graph
from exporters.calibration import Extremes, collect_extremes, ranges_of
from exporters.config import CalibrationConfig
from exporters.equalization import LARGEST_FACTOR, equalize
from exporters.golden import golden_images
from exporters.sensitivity import last_logits
from exporters.validation import normalised
from exporters.vit_export import stage_graphs
from models.multi_exit import MultiExitViT
from models.zoo import ZOO, create_model

SPEC = ZOO["test_vit"].preprocess
PIXELS = golden_images(SPEC)
CONFIG = CalibrationConfig(outliers=())


@pytest.fixture(autouse=True)
def small_attention_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of larger networks is, so that its values are centred."""
    monkeypatch.setattr(vit_graph, "INT8_FROM_TOKENS", 1)


@pytest.fixture
def uneven() -> MultiExitViT:
    """Some channels in front of linear layers are ten times as large as others."""
    torch.manual_seed(0)
    model = create_model("test_vit").eval()
    for stage in model.stages:
        for block in stage.blocks:
            with torch.no_grad():
                for norm in (block.norm1, block.norm2):
                    norm.weight[::3] *= 10
                block.attn.qkv.weight[128::4] *= 10  # some of the values
                torch.nn.init.normal_(block.mlp.fc1.weight, std=0.1)
                block.mlp.fc1.weight[:, ::3] /= 10
                block.attn.qkv.weight[:, ::3] /= 10
                block.attn.qkv.bias[128:] = 2.0  # all values far from zero
    return model


def seen_in(model: MultiExitViT) -> list[dict[str, Extremes]]:
    return collect_extremes(stage_graphs(model, SPEC, expose=True), PIXELS, CONFIG)


def test_in_fp32_it_is_the_same_network(uneven: MultiExitViT) -> None:
    """To rounding; and the one given is not touched."""
    before = {name: value.clone() for name, value in uneven.state_dict().items()}
    evened, _ = equalize(uneven, seen_in(uneven))

    x = normalised(PIXELS, SPEC)
    with torch.no_grad():
        for mine, theirs in zip(evened(x), uneven(x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in uneven.state_dict().items())
    assert not torch.equal(evened.stages[0].blocks[0].attn.qkv.weight, uneven.stages[0].blocks[0].attn.qkv.weight)


def test_what_it_says_the_layers_range_over_is_what_they_do(uneven: MultiExitViT) -> None:
    """No second calibration is needed."""
    evened, said = equalize(uneven, seen_in(uneven))

    for mine, theirs in zip(said, seen_in(evened), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_allclose(mine[name].low, theirs[name].low, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(mine[name].high, theirs[name].high, rtol=1e-3, atol=1e-3)
            if (mean := mine[name].mean) is not None:
                np.testing.assert_allclose(mean, 0, atol=1e-3)
                np.testing.assert_allclose(theirs[name].mean, 0, atol=1e-3)
    assert sum(each.mean is not None for stage in said for each in stage.values()) == 5  # all but the class token's block


def test_int8_is_nearer_to_fp32(uneven: MultiExitViT) -> None:
    """Where channels were uneven."""
    reference = last_logits(stage_graphs(uneven, SPEC), PIXELS)
    evened, said = equalize(uneven, seen_in(uneven))

    errors = [
        np.abs(last_logits(stage_graphs(model, SPEC, ranges=ranges_of(seen, CONFIG)), PIXELS) - reference).mean()
        for model, seen in ((evened, said), (uneven, seen_in(uneven)))
    ]

    assert errors[0] < 0.7 * errors[1]


def test_channels_without_a_value_or_a_weight_are_left_alone() -> None:
    """No division by zero, and no factor beyond the limit."""
    model = create_model("test_vit").eval()
    block = model.stages[0].blocks[0]
    with torch.no_grad():
        block.norm1.weight[3] = block.norm1.bias[3] = 0
        block.mlp.fc1.weight[:, 4] = 0
        block.norm2.weight[5] = 1e6

    evened, said = equalize(model, seen_in(model))

    for parameter in evened.parameters():
        assert torch.isfinite(parameter).all()
    ratio = block.norm2.weight / evened.stages[0].blocks[0].norm2.weight
    assert ratio.max() <= LARGEST_FACTOR * 1.001
    assert all(np.isfinite(each.low).all() for stage in said for each in stage.values())
