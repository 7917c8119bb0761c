"""What fewer tokens cost is learned back from photographs without labels; where it is not, nothing is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from models.multi_exit import MultiExitViT
from models.token_reduction import TokenReduction
from models.training.recovery import RecoveryConfig, _view, recover
from models.zoo import ZOO
from tests.images import photo

CONFIG = ZOO["test_vit"].config
SIDE = CONFIG.image_size
PHOTOS = np.stack([photo(40, 40, seed=number) for number in range(80)])
SETTINGS = RecoveryConfig(epochs=12, batch_size=16, learning_rate=3e-4, bf16=False)


def normalise(x: Tensor) -> Tensor:
    return x / 128 - 1


def silent(steps: Sequence[int], _: str) -> Iterable[int]:
    return steps


@pytest.fixture
def student(teacher: MultiExitViT) -> MultiExitViT:
    """The same with two patches of sixteen behind the first block."""
    model = copy.deepcopy(teacher)
    block = next(block for stage in model.stages for block in stage.blocks)
    block.reduction = TokenReduction("top_k_norm", 2, CONFIG.num_prefix_tokens)
    return model


def test_the_former_answers_are_learned(teacher: MultiExitViT, student: MultiExitViT) -> None:
    """On photographs that were held out; the teacher stays what it is, and the same seed gives the same weights."""
    again, before = copy.deepcopy(student), copy.deepcopy(teacher.state_dict())
    found = recover(student, teacher, PHOTOS, SIDE, normalise, SETTINGS, silent)

    assert found.helped
    assert found.after < 0.8 * found.before
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert found == recover(again, teacher, PHOTOS, SIDE, normalise, SETTINGS, silent)


def test_what_does_not_help_changes_nothing(teacher: MultiExitViT, student: MultiExitViT) -> None:
    """Steps far too large."""
    before = copy.deepcopy(student.state_dict())
    found = recover(student, teacher, PHOTOS, SIDE, normalise, RecoveryConfig(epochs=2, learning_rate=1.0, bf16=False), silent)

    assert not found.helped
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_heads_that_are_still_to_be_fitted_are_left_alone(teacher: MultiExitViT, student: MultiExitViT) -> None:
    """Only exits from `first_exit` on are learned."""
    before = copy.deepcopy(student.stages[0].head.state_dict())
    recover(student, teacher, PHOTOS, SIDE, normalise, SETTINGS, silent, first_exit=len(student.stages) - 1)

    assert all(torch.equal(value, before[name]) for name, value in student.stages[0].head.state_dict().items())


def test_a_view_is_a_part_of_the_photograph() -> None:
    """Of its colours, at least the share of its area that is asked for, and as large as the network wants it."""
    generator = torch.Generator().manual_seed(0)
    red_left = np.zeros((50, 50, 3), np.uint8)
    red_left[:, :25, 0] = 255
    shares = []
    for _ in range(50):
        view = _view(red_left, 32, SETTINGS, generator)
        assert view.shape == (1, 3, 32, 32)
        assert 0 <= float(view.min()) <= float(view.max()) <= 255
        assert not view[:, 1:].any()
        shares.append(float(view[0, 0].mean()) / 255)
    assert 0.2 < min(shares) < 0.45
    assert 0.55 < max(shares) < 0.8


def test_few_photographs_teach_nothing(teacher: MultiExitViT, student: MultiExitViT) -> None:
    with pytest.raises(ValueError, match="63 photographs are too few"):
        recover(student, teacher, PHOTOS[:63], SIDE, normalise, SETTINGS, silent)
