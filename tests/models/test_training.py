"""The training recipe: its data, its augmentation, its schedule, and that an interrupted run goes on as if unbroken."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.training.__main__ import main
from models.training.data import Split, augment, hold_out, read_archive, to_tensor, write_held_out
from models.training.train import TrainConfig, learning_rate_factor, train
from models.zoo import CIFAR10_LABELS


def make_archive(path: Path, per_class: int, classes: tuple[str, ...] = CIFAR10_LABELS) -> None:
    """A zip of `<class>/<n>.jpg`, each class a colour of its own."""
    with zipfile.ZipFile(path, "w") as archive:
        for label, name in enumerate(classes):
            for number in range(per_class):
                buffer = io.BytesIO()
                Image.new("RGB", (32, 32), (25 * label, 255 - 25 * label, 40 * number % 256)).save(buffer, "JPEG")
                archive.writestr(f"{name}/{number:04}.jpg", buffer.getvalue())


def test_an_archive_gives_images_with_the_index_of_their_class(tmp_path: Path) -> None:
    """The folder's name is the label."""
    make_archive(tmp_path / "train.zip", per_class=2)
    split = read_archive(tmp_path / "train.zip", CIFAR10_LABELS)

    assert split.images.shape == (20, 32, 32, 3)
    assert [label for label in range(10) for _ in range(2)] == split.labels.tolist()


def test_an_unknown_class_in_the_archive_is_refused(tmp_path: Path) -> None:
    """Rather than given some number."""
    make_archive(tmp_path / "train.zip", per_class=1, classes=("zebra",))
    with pytest.raises(ValueError, match="zebra"):
        read_archive(tmp_path / "train.zip", CIFAR10_LABELS)


def test_held_out_images_are_the_last_of_each_class_and_the_written_archive_has_the_same(tmp_path: Path) -> None:
    """What exits are fitted on is never trained on; file and arrays agree on which images these are."""
    make_archive(tmp_path / "train.zip", per_class=5)
    split = read_archive(tmp_path / "train.zip", CIFAR10_LABELS)

    rest, held = hold_out(split, per_class=2)
    write_held_out(tmp_path / "train.zip", tmp_path / "held.zip", per_class=2)

    assert (len(rest.labels), len(held.labels)) == (30, 20)
    assert np.array_equal(held.images, read_archive(tmp_path / "held.zip", CIFAR10_LABELS).images)
    assert not {image.tobytes() for image in held.images} & {image.tobytes() for image in rest.images}


def test_normalisation_is_value_over_255_minus_mean_over_std() -> None:
    """Channels first, as the network takes them."""
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[..., 0] = 255

    x = to_tensor(images, (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))

    assert x[0, :, 0, 0].tolist() == [1.0, -0.5, 0.0]


def test_augmentation_keeps_the_form_is_seeded_and_changes_images() -> None:
    """The same seed gives the same pictures; no value comes from nowhere."""
    x = torch.randn(8, 3, 32, 32)

    first, again = (augment(x, torch.Generator().manual_seed(5)) for _ in range(2))
    other = augment(x, torch.Generator().manual_seed(6))

    assert first.shape == x.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for image, source in zip(first, x, strict=True):
        assert set(image.unique().tolist()) <= {0.0, *source.unique().tolist()}


def test_learning_rate_rises_then_falls_to_zero() -> None:
    """Linear warm-up, half a cosine."""
    factors = [learning_rate_factor(step, total=100, warmup=10) for step in range(100)]

    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[9] == pytest.approx(1)
    assert factors[-1] < 0.001


@pytest.fixture
def data() -> Split:
    """Two classes that any network tells apart."""
    labels = np.arange(64) % 2
    images = np.where(labels[:, None, None, None] == 1, 200, 50) + np.zeros((64, 32, 32, 3))
    return Split(images.astype(np.uint8), labels.astype(np.int64))


def test_training_learns_and_an_interrupted_run_goes_on_as_if_unbroken(data: Split, tmp_path: Path) -> None:
    """Two epochs at once and one plus one give the same weights."""
    config = TrainConfig(model="test_vit", epochs=2, batch_size=16, bf16=False)
    unbroken = train(config, data, data, tmp_path / "unbroken")

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    import models.training.train as module

    original = module.torch.save
    with pytest.MonkeyPatch.context() as patch:
        calls = []

        def save_once(*arguments: object) -> None:
            original(*arguments)
            calls.append(arguments)
            if len(calls) == 1:
                patch.setattr(module, "augment", interrupt)

        patch.setattr(module.torch, "save", save_once)
        with pytest.raises(Interrupted):
            train(config, data, data, tmp_path / "broken")
    resumed = train(config, data, data, tmp_path / "broken")

    assert len((tmp_path / "broken" / "log.jsonl").read_text().splitlines()) == 2
    for mine, theirs in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    x = to_tensor(data.images, (0.5,) * 3, (0.5,) * 3)
    assert (resumed(x)[-1].argmax(1).numpy() == data.labels).mean() > 0.9


def test_the_command_makes_its_directory_and_the_held_out_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From two archives to a checkpoint, an archive to fit exits on, and the test accuracy of each exit."""
    for name in ("train.zip", "test.zip"):
        make_archive(tmp_path / name, per_class=3)
    monkeypatch.setattr(hold_out, "__defaults__", (1,))
    monkeypatch.setattr(write_held_out, "__defaults__", (1,))
    run_dir = tmp_path / "new" / "run"

    main(["--data", str(tmp_path), "--run-dir", str(run_dir), "--model", "test_vit", "--epochs", "1", "--batch-size", "8"])

    assert (run_dir / "checkpoint.pt").exists()
    assert len(read_archive(run_dir / "held_out.zip", CIFAR10_LABELS).labels) == 10
    assert capsys.readouterr().out.count(" %") >= 3


def test_a_directory_with_another_run_is_refused(data: Split, tmp_path: Path) -> None:
    """Its checkpoint must not be mixed with other settings."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="another configuration"):
        train(TrainConfig(model="test_vit", epochs=1), data, data, tmp_path)
