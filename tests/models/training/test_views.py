"""Stored views: the teacher sees each once, the network the same, and an interrupted run draws only what is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.training.config import StudentConfig
from models.training.data import Split
from models.training.learners import StudentLearner
from models.training.loop import fit
from models.training.views import Views, store_views
from models.zoo import ZOO

ENTRY = ZOO["test_vit"]
CONFIG = StudentConfig(model="test_vit", epochs=2, batch_size=8, bf16=False, stored_views=2)


class Counting:
    """Says of an image how bright it is, in two classes, and counts the images."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self) -> None:
        self.seen = 0

    def logits(self, x: Tensor) -> list[Tensor]:
        self.seen += len(x)
        brightness = x.mean(dim=(1, 2, 3))
        return [torch.stack([-brightness, brightness], dim=1)]


@pytest.fixture
def data() -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), (np.arange(20) % 2).astype(np.int64))


def test_the_answers_are_of_the_very_views_that_are_trained_on(data: Split, tmp_path: Path) -> None:
    """Each epoch has the next view, some mirrored, moved by two pixels at most; the answer is what was said of the view."""
    teacher = Counting()
    views = store_views(data, teacher, CONFIG, tmp_path)
    assert teacher.seen == 2 * 20
    chosen, generator = torch.tensor([3, 19, 0, 7]), torch.Generator().manual_seed(0)

    mirrored = []
    for epoch in range(3):
        x, answers = views.batch(epoch, chosen, generator)
        assert tuple(x.shape) == (4, 3, 32, 32)
        view = torch.from_numpy(views.images[epoch % 2][chosen.numpy()]).permute(0, 3, 1, 2).float() / 255
        torch.testing.assert_close(answers, Counting().logits((view - 0.5) / 0.25)[0].softmax(dim=1))
        for mine, stored in zip(x, view, strict=True):
            mirrored.append([any(_is_part(mine, each)) for each in (stored, stored.flip(-1))].index(True))

    assert 0 < sum(mirrored) < len(mirrored)
    assert not np.array_equal(views.images[0], views.images[1])


def _is_part(x: Tensor, image: Tensor) -> list[bool]:
    """Whether the middle of `image`, moved by each way up to two pixels, is that of x."""
    moves = range(-2, 3)
    middle = x[:, 8:24, 8:24]
    return [torch.equal(middle, image[:, 8 + a : 24 + a, 8 + b : 24 + b]) for a in moves for b in moves]


def test_views_that_are_there_are_not_drawn_again(data: Split, tmp_path: Path) -> None:
    """An interrupted run asks the teacher about the missing ones only, and finds the same; other settings are refused."""
    whole = store_views(data, Counting(), CONFIG, tmp_path / "whole")
    store_views(data, Counting(), replace(CONFIG, stored_views=1), tmp_path / "broken")
    teacher = Counting()

    resumed = store_views(data, teacher, CONFIG, tmp_path / "broken")

    assert teacher.seen == 20
    for mine, theirs in zip(resumed.answers, whole.answers, strict=True):
        assert np.array_equal(mine, theirs)
    with pytest.raises(ValueError, match="views of other images, or drawn otherwise"):
        store_views(data, Counting(), replace(CONFIG, seed=1), tmp_path / "broken")


def test_a_network_learns_from_stored_answers(tmp_path: Path) -> None:
    """With all of the loss from the teacher, what it said is learned, though nobody asks it again."""
    bright = (np.arange(32) % 2).astype(np.int64)
    images = np.where(bright[:, None, None, None] == 1, 200, 50) + np.zeros((32, 32, 32, 3))
    data = Split(images.astype(np.uint8), bright)
    answers = np.eye(10, dtype=np.float32)[bright]
    config = replace(CONFIG, epochs=6, distillation=1.0)
    student = StudentLearner(config, ENTRY, None)

    fit(student, config, data, data, tmp_path, "network", Views([data.images], [answers]))

    with torch.no_grad():
        x = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255
        said = student.logits((x - torch.tensor(ENTRY.preprocess.mean).view(1, 3, 1, 1)) / 0.25)[-1].argmax(dim=1)
    assert float((said == torch.from_numpy(bright)).float().mean()) == 1.0
