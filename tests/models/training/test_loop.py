"""The loop: it learns, its schedule is as told, and an interrupted run goes on as if unbroken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.training import loop
from models.training.augmentation import AugmentConfig
from models.training.config import StudentConfig, TeacherConfig
from models.training.data import Split
from models.training.learners import StudentLearner, TeacherLearner
from models.training.loop import accuracy_per_exit, fit, learning_rate_factor
from models.training.teacher import ConvTeacher
from models.zoo import ZOO

ENTRY = ZOO["test_vit"]
MILD = AugmentConfig(brightness=0.05, contrast=0.0, saturation=0.0, cutmix_probability=0.2)
CONFIG = StudentConfig(model="test_vit", epochs=2, batch_size=16, distillation=0.0, bf16=False, augment=MILD)


@pytest.fixture
def data() -> Split:
    """Two classes that any network tells apart."""
    labels = np.arange(64) % 2
    images = np.where(labels[:, None, None, None] == 1, 200, 50) + np.zeros((64, 32, 32, 3))
    return Split(images.astype(np.uint8), labels.astype(np.int64))


def small_teacher() -> ConvTeacher:
    """Of few channels: Muon's steps on kernels of the usual size take seconds each on a CPU without bfloat16."""
    torch.manual_seed(0)
    return ConvTeacher(len(ENTRY.labels), channels=(16, 16, 16))


def test_learning_rate_rises_then_falls_to_zero() -> None:
    """Linear warm-up, half a cosine."""
    factors = [learning_rate_factor(step, total=100, warmup=10) for step in range(100)]

    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[9] == pytest.approx(1)
    assert factors[-1] < 0.001


def test_training_learns_and_an_interrupted_run_goes_on_as_if_unbroken(
    data: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs at once and one plus one give the same weights; log and curves have both epochs."""
    unbroken = StudentLearner(CONFIG, ENTRY, None)
    fit(unbroken, CONFIG, data, data, tmp_path / "unbroken", "network")

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(loop, "draw_curves", interrupt)  # right after the first epoch was saved
        with pytest.raises(Interrupted):
            fit(StudentLearner(CONFIG, ENTRY, None), CONFIG, data, data, tmp_path / "broken", "network")
    resumed = StudentLearner(CONFIG, ENTRY, None)
    fit(resumed, CONFIG, data, data, tmp_path / "broken", "network")

    lines = [json.loads(line) for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for mine, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert accuracy_per_exit(resumed, data, bf16=False)[-1] > 0.9
    with Image.open(tmp_path / "broken" / "curves.png") as picture:
        assert picture.width > 300


def test_the_teacher_learns_by_the_same_loop(data: Split, tmp_path: Path) -> None:
    """One exit; its checkpoint is loaded by who distils from it."""
    config = TeacherConfig(epochs=6, batch_size=8, learning_rate=3e-3, bf16=False, augment=MILD)
    teacher = TeacherLearner(config, ENTRY, small_teacher())
    fit(teacher, config, data, data, tmp_path, "teacher")
    assert isinstance(TeacherLearner(config, ENTRY).model, ConvTeacher)  # of its usual size where none is given

    again = TeacherLearner(config, ENTRY, small_teacher())
    again.load(tmp_path / "checkpoint.pt")

    assert accuracy_per_exit(again, data, bf16=False) == accuracy_per_exit(teacher, data, bf16=False)
    assert accuracy_per_exit(again, data, bf16=False)[0] > 0.9


def test_a_directory_with_another_run_is_refused(data: Split, tmp_path: Path) -> None:
    """Its checkpoint must not be mixed with other settings."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run with another epochs, batch_size"):
        fit(StudentLearner(CONFIG, ENTRY, None), CONFIG, data, data, tmp_path, "network")


def test_a_run_from_before_a_setting_existed_goes_on(data: Split, tmp_path: Path) -> None:
    """It did then what is said by the setting now; a run that would do something else is refused by its name."""
    fit(StudentLearner(CONFIG, ENTRY, None), CONFIG, data, data, tmp_path, "network")
    told = json.loads((tmp_path / "config.json").read_text())
    del told["muon"], told["taught_by"], told["started_from"]
    (tmp_path / "config.json").write_text(json.dumps(told))
    fit(StudentLearner(CONFIG, ENTRY, None), CONFIG, data, data, tmp_path, "network")
    (tmp_path / "config.json").write_text(json.dumps(told))
    other = replace(CONFIG, muon=False)
    with pytest.raises(ValueError, match="another muon; choose another"):
        fit(StudentLearner(other, ENTRY, None), other, data, data, tmp_path, "network")
