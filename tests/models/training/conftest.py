"""What tests of training share."""

from __future__ import annotations

import pytest
import torch

from models.multi_exit import MultiExitViT
from models.zoo import ZOO


@pytest.fixture
def teacher() -> MultiExitViT:
    """Of random weights, larger than usual, so that blocks change their tokens and answers differ from image to image."""
    torch.manual_seed(0)
    model = MultiExitViT(ZOO["test_vit"].config, ZOO["test_vit"].boundaries)
    for value in model.parameters():
        value.data.mul_(3) if value.ndim > 1 else value.data.add_(0.1)
    return model.eval()
