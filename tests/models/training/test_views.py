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
from models.training.views import StoredViews, Views, store_views
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
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)


def test_the_answers_are_of_the_very_views_that_are_trained_on(images: np.ndarray, tmp_path: Path) -> None:
    """Each epoch has the next view, some mirrored; the answer is what was said of the view."""
    teacher = Counting()
    views = store_views(images, teacher, CONFIG, tmp_path, stored_views=2)
    assert teacher.seen == 2 * 20
    chosen, generator = torch.tensor([3, 19, 0, 7]), torch.Generator().manual_seed(0)

    mirrored = []
    for epoch in range(3):
        x, answers = views.batch(epoch, chosen, generator)
        view = torch.from_numpy(views.images[epoch % 2][chosen.numpy()]).permute(0, 3, 1, 2).float() / 255
        torch.testing.assert_close(answers, Counting().logits((view - 0.5) / 0.25)[0].softmax(dim=1))
        for mine, stored in zip(x, view, strict=True):
            mirrored.append([torch.equal(mine, each) for each in (stored, stored.flip(-1))].index(True))

    assert 0 < sum(mirrored) < len(mirrored)
    assert not np.array_equal(views.images[0], views.images[1])


def test_views_that_are_there_are_not_drawn_again(images: np.ndarray, tmp_path: Path) -> None:
    """An interrupted run asks the teacher about the missing ones only, and finds the same; other settings are refused."""
    whole = store_views(images, Counting(), CONFIG, tmp_path / "whole", stored_views=2)
    store_views(images, Counting(), CONFIG, tmp_path / "broken", stored_views=1)
    teacher = Counting()

    resumed = store_views(images, teacher, CONFIG, tmp_path / "broken", stored_views=2)

    assert teacher.seen == 20
    for mine, theirs in zip(resumed.answers, whole.answers, strict=True):
        assert np.array_equal(mine, theirs)
    with pytest.raises(ValueError, match="views of other images, or drawn otherwise"):
        store_views(images, Counting(), replace(CONFIG, seed=1), tmp_path / "broken", stored_views=2)


def test_unlabelled_photographs_come_with_what_the_teacher_said_of_them(images: np.ndarray) -> None:
    """Behind the chosen images, drawn at random, and what is wanted of them is the teacher's answer."""
    labelled = Views([images], [np.eye(10, dtype=np.float32)[np.arange(20) % 10]])
    said = np.linspace(0, 1, 60, dtype=np.float32).reshape(6, 10)
    dark = np.zeros((6, 32, 32, 3), dtype=np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None, None]
    stored = StoredViews(labelled, Views([dark], [said]), unlabelled_per_batch=5)
    targets = torch.full((3, 10), 0.1)

    x, wanted, taught = stored.batch(0, torch.tensor([1, 2, 3]), targets, torch.Generator().manual_seed(0))

    assert tuple(x.shape) == (8, 3, 32, 32)
    assert torch.equal(wanted[:3], targets)
    assert taught[:3].argmax(dim=1).tolist() == [1, 2, 3]
    which = (x[3:, 0, 0, 0] * 255).round().long()
    assert len(set(which.tolist())) > 1
    for theirs in (wanted[3:], taught[3:]):
        torch.testing.assert_close(theirs, torch.from_numpy(said)[which])


def test_a_network_learns_from_stored_answers(tmp_path: Path) -> None:
    """With all of the loss from the teacher, what it said is learned, though nobody asks it again."""
    bright = (np.arange(32) % 2).astype(np.int64)
    images = (np.where(bright[:, None, None, None] == 1, 200, 50) + np.zeros((32, 32, 32, 3))).astype(np.uint8)
    data = Split(images, bright)
    views = Views([images], [np.eye(10, dtype=np.float32)[bright]])
    config = replace(CONFIG, epochs=6, distillation=1.0)
    student = StudentLearner(config, ENTRY, None)

    fit(student, config, data, data, tmp_path, "network", StoredViews(views, views, unlabelled_per_batch=2))

    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        said = student.logits((x - torch.tensor(ENTRY.preprocess.mean).view(1, 3, 1, 1)) / 0.25)[-1].argmax(dim=1)
    assert float((said == torch.from_numpy(bright)).float().mean()) == 1.0
