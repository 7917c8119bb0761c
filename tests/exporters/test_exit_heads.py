"""Heads for a network that came without exits: fitted to say what its end says, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters.config import ExitHeadConfig
from exporters.exit_heads import fit_exit_heads
from models.multi_exit import MultiExitViT
from models.zoo import ZOO, create_model
from tests.exporters.listener import Listener

SPEC = ZOO["test_vit"].preprocess
CONFIG = ExitHeadConfig(max_steps=300, patience=200, min_held_out=8)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Sixty images of two kinds: dark below or bright below, with noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (60, 32, 32, 3))
    images[::2, 16:] += 150
    images[1::2, :16] += 150
    return images.astype(np.uint8)


def network() -> MultiExitViT:
    """Its last exit tells the kinds apart by a direction in which they differ."""
    torch.manual_seed(0)
    return create_model("test_vit").eval()


def test_heads_learn_to_say_what_the_last_exit_says(pixels: np.ndarray) -> None:
    """Without labels. The last head and every block stay as they are."""
    model = network()
    with torch.no_grad():
        model.stages[-1].head.fc.weight.mul_(40)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    results = fit_exit_heads(model, pixels, SPEC, CONFIG)

    assert len(results) == 2
    for result in results:
        assert result.agreement >= max(0.9, result.agreement_before)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith(("stages.0.head.", "stages.1.head.")) for name in changed)
    assert changed


def test_the_same_seed_fits_the_same_heads(pixels: np.ndarray) -> None:
    """An export can be repeated."""
    states = []
    for _ in range(2):
        model = network()
        fit_exit_heads(model, pixels, SPEC, CONFIG)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name])


def test_progress_is_told_and_too_few_images_are_refused(pixels: np.ndarray) -> None:
    """In words, before anything is computed."""
    said = Listener()
    fit_exit_heads(network(), pixels[:20], SPEC, CONFIG, said)
    assert said.tracked == ["features of the images"]
    assert said.steps[-1].startswith("exit 1 agrees with the last on ")

    with pytest.raises(ValueError, match="15 images are too few to fit exits on; 16 or more are needed"):
        fit_exit_heads(network(), pixels[:15], SPEC, CONFIG)
