"""A teacher is asked once about each view; its mean answer is the label, and an interrupted run asks only what is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.training.augmentation import AugmentConfig
from models.training.config import StudentConfig
from models.training.data import Split
from models.training.learners import StudentLearner
from models.training.loop import fit
from models.training.soft_labels import soft_labels
from models.zoo import ZOO

ENTRY = ZOO["test_vit"]
CONFIG = StudentConfig(model="test_vit", epochs=2, batch_size=8, bf16=False, stored_answers=2)


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
    """Dark and bright images."""
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 2
    images = rng.integers(0, 90, (20, 32, 32, 3)) + 140 * labels[:, None, None, None]
    return Split(images.astype(np.uint8), labels.astype(np.int64))


def test_a_label_is_the_mean_of_what_is_said_of_views(data: Split, tmp_path: Path) -> None:
    """Of images that are not changed it is what is said of them; two views of one are not the same."""
    still = AugmentConfig(zoom_probability=0, shift=0, colour_probability=0, erase_probability=0)
    x = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255
    said = Counting().logits((x - 0.5) / 0.25)[0].softmax(dim=1)
    teacher = Counting()

    found = soft_labels(data, teacher, replace(CONFIG, augment=still), tmp_path / "still")
    soft_labels(data, teacher, CONFIG, tmp_path / "changed")

    np.testing.assert_allclose(found, said.numpy(), atol=1e-5)
    assert teacher.seen == 2 * 2 * 20
    one, other = (np.load(tmp_path / "changed" / f"{view}.answers.npy") for view in range(2))
    assert not np.array_equal(one, other)


def test_answers_that_are_there_are_not_asked_for_again(data: Split, tmp_path: Path) -> None:
    """And are the same; about other views they are refused."""
    whole = soft_labels(data, Counting(), CONFIG, tmp_path / "whole")
    soft_labels(data, Counting(), replace(CONFIG, stored_answers=1), tmp_path / "broken")
    teacher = Counting()

    assert np.array_equal(soft_labels(data, teacher, CONFIG, tmp_path / "broken"), whole)
    assert teacher.seen == 20
    with pytest.raises(ValueError, match="about other images, or drawn otherwise"):
        soft_labels(data, Counting(), replace(CONFIG, seed=1), tmp_path / "broken")


def test_a_network_learns_from_stored_answers(tmp_path: Path) -> None:
    """What the teacher says of an image is learned, not what it says of another; labels mixed by CutMix take it along."""
    labels = (np.arange(64) % 2).astype(np.int64)
    images = np.where(labels[:, None, None, None] == 1, 200, 50) + np.zeros((64, 32, 32, 3))
    data = Split(images.astype(np.uint8), labels)
    unsure = np.zeros((64, 10), dtype=np.float32)
    unsure[np.arange(64), labels], unsure[:, 9] = 0.6, 0.4
    mild = AugmentConfig(colour_probability=0, erase_probability=0, cutmix_probability=0.1)
    config = replace(CONFIG, epochs=10, batch_size=16, distillation=1.0, augment=mild)
    student = StudentLearner(config, ENTRY, None)

    fit(student, config, data, data, tmp_path, "network", unsure)

    with torch.no_grad():
        x = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255
        said = student.logits((x - torch.tensor(ENTRY.preprocess.mean).view(1, 3, 1, 1)) / 0.25)[-1].softmax(dim=1)
    assert (said.argmax(dim=1) == torch.from_numpy(labels)).float().mean() > 0.9
    assert 0.25 < float(said[:, 9].mean()) < 0.5
