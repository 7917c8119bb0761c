"""Checkpoints as timm keeps them, made here by hand: the same answers as the formulas of the papers, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from exporters.sources.base import Asked, SourceError
from exporters.sources.timm_vit import TimmSource
from models.vit_state import Told, network_of, resized_patches
from models.weights import WeightsError
from tests.checkpoints import LABELS, SIDE, TOLD, WIDTH, answer, cait_answer, cait_checkpoint, checkpoint, write_checkpoint


def source(folder: Path, state: dict[str, Tensor], told: dict[str, Any] | None = None) -> TimmSource:
    """Written to disk, and what reads it."""
    return TimmSource(*write_checkpoint(folder, state, told), LABELS)


@pytest.mark.parametrize(
    "kind",
    [{}, {"distilled": True}, {"layer_scale": True}, {"class_position": False, "layer_scale": True}],
    ids=["ViT", "distilled DeiT", "LayerScale", "DeiT III"],
)
def test_the_network_answers_as_the_paper_says(tmp_path: Path, kind: dict[str, bool]) -> None:
    """Whatever was folded into the weights."""
    state = checkpoint(**kind)
    network = source(tmp_path, state).load()
    image = torch.randn(3, 3, SIDE, SIDE)

    with torch.no_grad():
        (logits,) = network.model(image)

    torch.testing.assert_close(logits, answer(state, image), rtol=1e-4, atol=1e-4)


def test_cait_answers_as_the_paper_says(tmp_path: Path) -> None:
    """Heads that talk, class attention in the head; how many heads there are is told by what they say to each other."""
    told = {**TOLD, "architecture": "cait_nano_16", "model_args": {}}
    state = cait_checkpoint()
    network = source(tmp_path, state, told).load()
    image = torch.randn(3, 3, SIDE, SIDE)

    with torch.no_grad():
        (logits,) = network.model(image)

    torch.testing.assert_close(logits, cait_answer(state, image), rtol=1e-4, atol=1e-4)
    assert network.model.config.num_heads == 4
    for name, words in (("cls_token", "lacks cls_token"), ("blocks_token_only.0.mlp.fc1.weight", "mlp.fc1.weight has shape")):
        broken = {key: value for key, value in state.items() if key != name}
        if name != "cls_token":
            broken[name] = torch.zeros(3, 3)
        with pytest.raises(WeightsError, match=words):
            source(tmp_path, broken, told).load()
    before = {name: value.clone() for name, value in state.items()}
    network_of(state, Told(SIDE, 4, len(LABELS)), ())
    assert all(torch.equal(value, state[name]) for name, value in before.items())  # LayerScale is folded into copies
    with pytest.raises(WeightsError, match=r"lacks blocks_token_only.1.attn.q.weight"):
        source(tmp_path, {k: v for k, v in state.items() if k != "blocks_token_only.1.attn.q.weight"}, told).load()


def test_patches_of_another_size_give_what_the_trained_ones_give() -> None:
    """Exactly, of a patch that was enlarged as the weights were (FlexiViT, section 3.4); nearly, of a smooth one reduced."""
    torch.manual_seed(0)
    weight, patch = torch.randn(5, 3, 8, 8), torch.randn(4, 3, 8, 8)
    expected = F.conv2d(patch, weight).flatten(1)

    larger = F.interpolate(patch, size=(12, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(F.conv2d(larger, resized_patches(weight, 12)).flatten(1), expected, rtol=1e-4, atol=1e-3)

    assert resized_patches(weight, 8) is weight
    smooth = F.interpolate(torch.randn(64, 3, 2, 2), size=(8, 8), mode="bicubic")
    smaller = F.interpolate(smooth, size=(6, 6), mode="bicubic", antialias=True)
    off = F.conv2d(smaller, resized_patches(weight, 6)) - F.conv2d(smooth, weight)
    naive = F.interpolate(weight, size=(6, 6), mode="bicubic", antialias=True)
    assert off.std() < 0.6 * (F.conv2d(smaller, naive) - F.conv2d(smooth, weight)).std()


def test_a_network_at_another_size_has_other_tokens(tmp_path: Path) -> None:
    """Pictures are prepared for it, with the same part of them in sight; what does not fit is refused."""
    paths = write_checkpoint(tmp_path, checkpoint())
    patch = source(tmp_path, checkpoint()).load().model.config.patch_size
    network = TimmSource(*paths, LABELS, Asked(image_size=2 * SIDE)).load()
    assert network.model.config.num_patches == (2 * SIDE // patch) ** 2
    assert (network.preprocess.crop, network.preprocess.resize) == ((2 * SIDE, 2 * SIDE), 2 * 17)
    with torch.no_grad():
        assert network.model(torch.randn(2, 3, 2 * SIDE, 2 * SIDE))[-1].shape == (2, len(LABELS))

    larger = TimmSource(*paths, LABELS, Asked(patch_size=2 * patch)).load()
    assert larger.model.config.num_patches == (SIDE // (2 * patch)) ** 2
    with torch.no_grad():
        assert larger.model(torch.randn(2, 3, SIDE, SIDE))[-1].shape == (2, len(LABELS))
    with pytest.raises(SourceError, match=r"patches of 6 pixels leave 4 of a picture's 16 unseen"):
        TimmSource(*paths, LABELS, Asked(patch_size=6)).load()


def test_preprocessing_is_the_checkpoints_own(tmp_path: Path) -> None:
    """16 / 0.9 is 17.8: timm rounds it down."""
    spec = source(tmp_path, checkpoint()).load().preprocess

    assert (spec.resize, spec.crop, spec.interpolation) == (17, (SIDE, SIDE), "bicubic")
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.5), (0.5, 0.4, 0.3))


def test_positions_are_resampled_for_another_image_size(tmp_path: Path) -> None:
    """A constant stays constant, and a ramp a ramp; the class token keeps its own."""
    state = checkpoint()
    state["pos_embed"][:, 1:] = torch.arange(4.0).repeat(4).view(1, 16, 1)  # rises from left to right
    told = json.loads(json.dumps(TOLD))
    told["pretrained_cfg"]["input_size"] = [3, 2 * SIDE, 2 * SIDE]

    positions = source(tmp_path, state, told).load().model.stages[0].embedding.pos_embed

    assert positions.shape == (1, 1 + 64, WIDTH)
    torch.testing.assert_close(positions[:, 0], state["pos_embed"][:, 0])
    grid = positions[0, 1:, 0].view(8, 8)
    torch.testing.assert_close(grid, grid[:1].expand(8, 8))
    torch.testing.assert_close(grid[0, 2:6], torch.tensor([0.75, 1.25, 1.75, 2.25]), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.1.attn.proj.bias": None}, "lacks blocks.1.attn.proj.bias"),
        ({"head.weight": torch.zeros(7, WIDTH)}, r"head.weight has shape \(7, 32\), not \(5, 32\)"),
        ({"norm_pre.weight": torch.zeros(WIDTH)}, "no use is known for norm_pre.weight"),
        ({"patch_embed.proj.weight": None}, "no Vision Transformer that is known: patch_embed.proj.weight missing"),
        ({"pos_embed": torch.zeros(1, 12, WIDTH)}, "11 positions, which is no square"),
    ],
    ids=["missing", "shape", "left over", "other network", "positions"],
)
def test_a_checkpoint_that_is_something_else_is_refused(tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    """Nothing is guessed, and nothing is passed over."""
    state = {name: value for name, value in {**checkpoint(), **change}.items() if value is not None}
    with pytest.raises(WeightsError, match=words):
        source(tmp_path, state).load()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": None}, r"config.json is not a configuration .* pretrained_cfg.mean: Field required"),
        ({"crop_mode": "squash"}, "crop mode 'squash'"),
        ({"interpolation": "random"}, "pretrained_cfg.interpolation"),
    ],
)
def test_a_configuration_that_does_not_say_how_to_preprocess_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    """A default would cost accuracy and nobody would know."""
    told = json.loads(json.dumps(TOLD))
    told["pretrained_cfg"] = {k: v for k, v in {**told["pretrained_cfg"], **change}.items() if v is not None}
    with pytest.raises(SourceError, match=words):
        source(tmp_path, checkpoint(), told).load()


def test_heads_and_labels_must_be_told(tmp_path: Path) -> None:
    """They cannot be read off the weights."""
    with pytest.raises(SourceError, match="say how many heads a network of width 32 has"):
        source(tmp_path, checkpoint(), {**TOLD, "model_args": {}}).load()
    with pytest.raises(SourceError, match="5 labels, and vit_nano_patch4_16 has 6 classes"):
        source(tmp_path, checkpoint(), {**TOLD, "num_classes": 6}).load()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"config.json is not a configuration"):
        TimmSource(tmp_path / "model.safetensors", tmp_path / "config.json", LABELS).load()
