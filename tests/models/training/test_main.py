"""`python -m models.training`."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from models.training.__main__ import IMAGENET_CLASSES, main
from models.training.augmentation import AugmentConfig
from models.training.data import hold_out, read_archive, write_held_out
from models.weights import sha256_of
from models.zoo import CIFAR10_LABELS
from tests.checkpoints import checkpoint, write_checkpoint
from tests.images import make_archive, make_jpeg, photo

PATCH = 16  # of the teacher, in pixels


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two archives; one image of each class is held out."""
    for name in ("train.zip", "test.zip"):
        make_archive(tmp_path / name, CIFAR10_LABELS, per_class=14)
    monkeypatch.setattr(hold_out, "__defaults__", (1,))
    monkeypatch.setattr(write_held_out, "__defaults__", (1,))
    return tmp_path


def test_the_command_makes_its_directory_and_the_held_out_archive(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From two archives to a checkpoint, an archive to fit exits on, and the test accuracy of each exit."""
    run_dir = data / "new" / "run"
    main(
        [
            "--data",
            str(data),
            "--run-dir",
            str(run_dir),
            "--model",
            "test_vit",
            "--epochs",
            "1",
            "--first-stage-epochs",
            "1",
            "--teacher-epochs",
            "0",
        ]
    )

    assert {"checkpoint.pt", "log.jsonl", "curves.png", "config.json"} == {
        path.name for path in (run_dir / "network").iterdir()
    }
    assert not (run_dir / "teacher").exists()
    assert len(read_archive(run_dir / "held_out.zip", CIFAR10_LABELS).labels) == 10
    assert capsys.readouterr().out.count(" %") >= 3


def test_further_photographs_are_trained_on(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders named by WordNet's ids, as ImageNet has them, need no mapping of one's own."""
    with zipfile.ZipFile(data / "photos.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"n02123045/{number}.jpg", make_jpeg(photo(40, 40, seed=number)))
    arguments = ["--data", str(data), "--run-dir", str(data / "run"), "--photos", str(data / "photos.zip")]
    main([*arguments, "--model", "test_vit", "--epochs", "1", "--first-stage-epochs", "1", "--teacher-epochs", "0"])

    assert "3 further photographs" in capsys.readouterr().out


def test_a_network_that_was_trained_elsewhere_can_teach(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It sees the images as it is used to, and its classifier is new; its configuration must say how it is used to see."""
    # It sees images of 128 pixels, which are 1024 patches of 4 pixels, and 64 of these.
    weights, told = write_checkpoint(data, checkpoint(patch=PATCH))
    arguments = ["--data", str(data), "--run-dir", str(data / "run"), "--model", "test_vit", "--epochs", "1"]
    arguments += ["--first-stage-epochs", "0", "--teacher-epochs", "1", "--teacher-weights", str(weights)]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "go together" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--teacher-config", str(told), "--teacher-epochs", "0"])
    assert "leaves no teacher" in capsys.readouterr().err

    with zipfile.ZipFile(data / "photos.zip", "w") as archive:
        for folder in ("n02123045", "n07747607", "n07747607x"):  # a cat, and two that are no class of the model's
            archive.writestr(f"{folder}/0.jpg", make_jpeg(photo(40, 50)))
    further = ["--stored-views", "1", "--unlabelled", str(data / "photos.zip"), "--distillation", "0.9"]
    main([*arguments, "--teacher-config", str(told), *further])

    config = json.loads((data / "run" / "teacher" / "config.json").read_text())
    assert (config["muon"], config["num_heads"], config["mean"]) == (False, 4, [0.5, 0.5, 0.5])
    assert config["weights_sha256"] == sha256_of(weights)
    network = json.loads((data / "run" / "network" / "config.json").read_text())
    assert network["taught_by"] == f"a Vision Transformer, {sha256_of(weights)[:16]}"
    assert (network["stored_views"], network["unlabelled_per_batch"], network["distillation"]) == (1, 48, 0.9)
    printed = capsys.readouterr().out
    assert "teacher, test top-1" in printed
    assert "2 photographs without a label" in printed
    assert len(np.load(data / "run" / "views" / "0.answers.npy")) == 130  # 14 of each class but one, held out
    assert len(np.load(data / "run" / "unlabelled" / "0.answers.npy")) == 2
    for wrong, reason in (
        (["--stored-views", "1", "--teacher-epochs", "0"], "leaves no teacher"),
        (["--stored-views", "-1"], "a number of views"),
        (["--unlabelled", str(data / "photos.zip")], "goes with --stored-views"),
        (["--distillation", "1.5"], "between 0 and 1"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments[:-2], *wrong])
        assert reason in capsys.readouterr().err
    other, _ = write_checkpoint(data, checkpoint(layer_scale=True, patch=PATCH))
    with pytest.raises(ValueError, match="teacher holds a run with another weights_sha256"):
        main([*arguments, "--teacher-config", str(told), "--teacher-weights", str(other)])


def test_a_network_can_learn_on_from_another_run(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step of no length leaves the weights of the run it started from, and its configuration names them."""
    arguments = ["--data", str(data), "--model", "test_vit", "--epochs", "1", "--teacher-epochs", "0"]
    main([*arguments, "--run-dir", str(data / "first"), "--first-stage-epochs", "0"])
    first = data / "first" / "network" / "checkpoint.pt"
    with pytest.raises(SystemExit):
        main([*arguments, "--run-dir", str(data / "second"), "--start-from", str(first.with_name("lost.pt"))])
    assert "there is no" in capsys.readouterr().err
    for further, reason in (
        (["--stem-from", str(first.with_name("lost.pt"))], "--stem-from: there is no"),
        (["--stem-from", str(first), "--start-from", str(first)], "--stem-from starts the first stage"),
        (["--stem-from", str(first), "--first-stage-epochs", "0"], "--stem-from starts the first stage"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--run-dir", str(data / "second"), *further])
        assert reason in capsys.readouterr().err

    main(
        [
            *arguments,
            "--run-dir",
            str(data / "second"),
            "--start-from",
            str(first),
            "--learning-rate",
            "0",
            "--augmentation",
            "0.3",
        ]
    )

    second = torch.load(data / "second" / "network" / "checkpoint.pt", weights_only=True)["model"]
    before = torch.load(first, weights_only=True)["model"]
    assert all(
        torch.equal(second[name], value)
        for name, value in before.items()
        if value.is_floating_point() and "running" not in name
    )
    config = json.loads((data / "second" / "network" / "config.json").read_text())
    assert (config["started_from"], config["first_stage_epochs"]) == (sha256_of(first), 0)
    assert config["augment"]["erase_probability"] == pytest.approx(0.3 * AugmentConfig().erase_probability)
    assert config["augment"]["shift"] == AugmentConfig().shift
    with pytest.raises(SystemExit):
        main([*arguments, "--run-dir", str(data / "third"), "--augmentation", "2"])
    assert "between 0 and 1" in capsys.readouterr().err
    assert not (data / "second" / "first_stage").exists()


def test_the_mapping_of_imagenet_names_only_classes_of_the_model() -> None:
    """None of its folders is lost to a misspelling; every class but deer, which ImageNet lacks, has one."""
    classes = json.loads(IMAGENET_CLASSES.read_text())
    assert set(classes.values()) == {*CIFAR10_LABELS} - {"deer"}
    assert all(len(name) == 9 and name[0] == "n" and name[1:].isdecimal() for name in classes)
