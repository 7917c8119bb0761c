"""The commands: what they publish, and what they say of what cannot be."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from app.imaging.preprocess import preprocess
from app.runtime.cpu import has_exact_int8
from app.runtime.ort_backend import OrtBackend
from exporters import cli, commands, fitting, recipe
from exporters.cli import app as exporter
from exporters.config import ExportConfig, QuantizationConfig
from exporters.published import one_thread
from models.manifest import ModelManifest
from models.zoo import CIFAR10_LABELS
from tests.checkpoints import LABELS, checkpoint, write_checkpoint, write_transformers_folder
from tests.exporters.exporting import make_config
from tests.families import write_family
from tests.images import make_archive, make_jpeg, photo


def test_the_command_says_what_is_wrong_in_one_line(inputs: Path, tmp_path: Path) -> None:
    """No traceback for what its user can mend."""
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    arguments = ["export", "--model", "test_vit", "--weights", str(tmp_path / "bad.safetensors"), "--version", "1"]
    arguments += ["--calibration", str(inputs / "images"), "--test", str(inputs / "images"), "--repository", str(tmp_path)]

    result = CliRunner().invoke(exporter, [*arguments, "--no-int8"])

    assert result.exit_code == 1
    assert "bad.safetensors is not a file of weights" in result.output
    assert "Traceback" not in result.output


def test_the_command_publishes_and_names_no_folder_of_this_machine(inputs: Path, tmp_path: Path) -> None:
    """The card shows the command with file names only."""
    arguments = ["export", "--model", "test_vit", "--weights", str(inputs / "weights.safetensors"), "--version", "3"]
    arguments += ["--calibration", str(inputs / "images"), "--test", str(inputs / "images"), "--repository", str(tmp_path)]
    arguments += ["--no-int8", "--data", "twenty drawings"]
    (tmp_path / "classes.json").write_text('{"cat": "dog"}')
    arguments += ["--also", f"drawings again={inputs / 'images'}", "--also-classes", str(tmp_path / "classes.json")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["exporters", *arguments])
        patch.setattr(commands, "exits_cost_more", lambda variants, allowed: f"{', '.join(variants)} beyond {allowed}")
        result = CliRunner().invoke(exporter, arguments)

    assert result.exit_code == 0, result.output
    assert "fp32 beyond 0.005" in result.output
    card = (tmp_path / "test_vit" / "3" / "MODEL_CARD.md").read_text()
    assert "twenty drawings" in card
    assert "| drawings again | 2 | fp32 |" in card
    assert str(tmp_path) not in card
    assert [variant.name for variant in ModelManifest.load(tmp_path / "test_vit" / "3").variants] == ["fp32"]


def test_a_checkpoint_as_timm_keeps_it_becomes_a_version_that_serves(tmp_path: Path) -> None:
    """One stage without exits; images lie in folders with names of their own, in the order of the classes."""
    weights, told = write_checkpoint(tmp_path, checkpoint())
    folders = [f"n{number:04}" for number in range(len(LABELS))]
    make_archive(tmp_path / "images.zip", folders, per_class=4)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    (tmp_path / "folders.txt").write_text("\n".join(folders) + "\n")
    arguments = ["export", "--model", "nano", "--version", "1", "--weights", str(weights), "--timm-config", str(told)]
    arguments += ["--labels", str(tmp_path / "labels.txt"), "--folders", str(tmp_path / "folders.txt"), "--no-int8"]
    arguments += ["--calibration", str(tmp_path / "images.zip"), "--test", str(tmp_path / "images.zip")]

    result = CliRunner().invoke(exporter, [*arguments, "--repository", str(tmp_path / "repository")])

    assert result.exit_code == 0, result.output
    manifest = ModelManifest.load(tmp_path / "repository" / "nano" / "1")
    assert (len(manifest.stages), manifest.num_classes, manifest.provenance["origin"]) == (1, 5, "vit_nano_patch4_16")
    assert manifest.variant("fp32").exits[0].threshold is None
    arguments = ["evaluate", "--model", "nano", "--repository", str(tmp_path / "repository")]
    arguments += ["--images", str(tmp_path / "images.zip"), "--folders", str(tmp_path / "folders.txt")]
    again = CliRunner().invoke(exporter, arguments)
    assert again.exit_code == 0, again.output
    assert "on 20 images" in again.output


def test_without_labels_a_checkpoint_cannot_be_exported(inputs: Path, tmp_path: Path) -> None:
    """Said before anything is read."""
    weights, told = write_checkpoint(tmp_path, checkpoint())
    arguments = ["export", "--model", "nano", "--version", "1", "--weights", str(weights), "--timm-config", str(told)]
    result = CliRunner().invoke(exporter, [*arguments, "--calibration", str(inputs), "--test", str(inputs)])

    assert result.exit_code == 1
    assert "--labels FILE" in result.output


def test_a_schedule_that_cannot_be_followed_publishes_nothing(inputs: Path, tmp_path: Path) -> None:
    """And says why in a line."""
    arguments = ["export", "--model", "test_vit", "--weights", str(inputs / "weights.safetensors"), "--version", "1"]
    arguments += ["--calibration", str(inputs / "images"), "--test", str(inputs / "images"), "--repository", str(tmp_path)]

    result = CliRunner().invoke(exporter, [*arguments, "--no-int8", "--reduce", "tome:9,0,0,0,0,0"])

    assert result.exit_code == 1
    assert "at most 8 can be merged, not 9" in result.output
    assert list((tmp_path / "test_vit").iterdir()) == []


def test_a_checkpoint_can_be_cut_and_its_exits_are_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages out of two blocks; the early head learns from the last one."""
    weights, told = write_checkpoint(tmp_path, checkpoint())
    make_archive(tmp_path / "images.zip", LABELS, per_class=6)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    arguments = ["export", "--model", "nano", "--version", "1", "--weights", str(weights), "--timm-config", str(told)]
    arguments += ["--labels", str(tmp_path / "labels.txt"), "--no-int8", "--repository", str(tmp_path / "repository")]
    arguments += ["--calibration", str(tmp_path / "images.zip"), "--test", str(tmp_path / "images.zip")]

    seen, counts = [], []
    fit_heads, fit = recipe.fit_exit_heads, fitting.fit_exits

    def heads(model: Any, pixels: np.ndarray, *rest: Any) -> Any:
        seen.append(len(pixels))
        return fit_heads(model, pixels, *rest)

    def exits(logits: Any, labels: np.ndarray, *rest: Any) -> Any:
        counts.append(len(labels))
        return fit(logits, labels, *rest)

    monkeypatch.setattr(recipe, "fit_exit_heads", heads)
    monkeypatch.setattr(fitting, "fit_exits", exits)
    cut = CliRunner().invoke(exporter, [*arguments, "--boundaries", "1,2"])
    assert (seen, counts) == ([24], [6, 6])  # thresholds are fitted on what heads have not seen, for two operating points
    wrong = CliRunner().invoke(exporter, [*arguments, "--version", "2", "--boundaries", "1,3"])

    assert cut.exit_code == 0, cut.output
    assert "exit 0 agrees with the last on" in cut.output
    manifest = ModelManifest.load(tmp_path / "repository" / "nano" / "1")
    assert (len(manifest.stages), [exit_.threshold is None for exit_ in manifest.variant("fp32").exits]) == (2, [False, True])
    assert wrong.exit_code == 1
    assert "boundaries (1, 3) must rise and end at the depth, 2" in wrong.output


def test_a_folder_as_transformers_writes_it_becomes_a_version_too(tmp_path: Path) -> None:
    """Its labels are its own, and pictures are squashed as its preprocessor says."""
    write_transformers_folder(tmp_path / "model", checkpoint())
    make_archive(tmp_path / "images.zip", LABELS, per_class=4)
    arguments = ["export", "--model", "nano", "--version", "1", "--no-int8", "--repository", str(tmp_path / "repository")]
    arguments += ["--calibration", str(tmp_path / "images.zip"), "--test", str(tmp_path / "images.zip")]

    result = CliRunner().invoke(exporter, [*arguments, "--checkpoint", str(tmp_path / "model")])
    nothing = CliRunner().invoke(exporter, arguments)

    assert result.exit_code == 0, result.output
    manifest = ModelManifest.load(tmp_path / "repository" / "nano" / "1")
    assert manifest.preprocess.squash
    assert (tmp_path / "repository" / "nano" / "1" / "labels.txt").read_text().split() == list(LABELS)
    assert nothing.exit_code == 1
    assert "say --weights FILE, --checkpoint FOLDER or --onnx FILE" in nothing.output


def test_a_network_of_another_family_becomes_a_version_that_answers(tmp_path: Path) -> None:
    """One stage and no exits, fp32 and INT8; what needs stages of our own is refused in a line."""
    folder = write_family(tmp_path, "convnext")
    make_archive(tmp_path / "images.zip", [f"class {number}" for number in range(5)], per_class=6)
    arguments = ["export", "--model", "convnext", "--version", "1", "--checkpoint", str(folder)]
    arguments += ["--calibration", str(tmp_path / "images.zip"), "--test", str(tmp_path / "images.zip"), "--unlabelled"]
    arguments += ["--repository", str(tmp_path / "repository"), *([] if has_exact_int8() else ["--no-int8"])]

    result = CliRunner().invoke(exporter, arguments)
    refused = [
        CliRunner().invoke(exporter, [*arguments, "--version", "2", *more])
        for more in (["--reduce", "tome:2"], ["--boundaries", "1,2"])
    ]

    assert result.exit_code == 0, result.output
    directory = tmp_path / "repository" / "convnext" / "1"
    manifest = ModelManifest.load(directory)
    assert (len(manifest.stages), manifest.num_classes, manifest.preprocess.crop) == (1, 5, (64, 64))
    assert manifest.stages[0].gmacs > 0
    backend = OrtBackend(directory, manifest, manifest.variants[-1].name, one_thread())
    pixels = np.stack([preprocess(photo(90, 70, seed=seed), manifest.preprocess) for seed in range(3)])
    assert backend.run(0, {"pixels": pixels}).logits.shape == (3, 5)
    assert [each.exit_code for each in refused] == [1, 1]
    assert "token reduction is for ViT, DeiT and CaiT" in refused[0].output
    assert "convnext is exported in one piece" in refused[1].output


class _Anything:
    """What a pickle may hold."""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_Anything(), "is not a file of weights"),
        ([1, 2], "holds no state dict"),
        ({"model": {"a": 1}}, "holds no state dict"),
        ({"a": torch.zeros(1)}, "does not fit the network"),
    ],
    ids=["an object", "a list", "no tensors", "other tensors"],
)
def test_a_file_that_holds_something_else_is_refused_in_a_line(
    inputs: Path, tmp_path: Path, content: object, words: str
) -> None:
    """Whatever was pickled; no code in it runs."""
    torch.save(content, tmp_path / "odd.pth")
    arguments = ["export", "--model", "test_vit", "--weights", str(tmp_path / "odd.pth"), "--version", "1"]
    arguments += ["--calibration", str(inputs / "images"), "--test", str(inputs / "images"), "--no-int8"]

    result = CliRunner().invoke(exporter, [*arguments, "--repository", str(tmp_path / "repository")])

    assert result.exit_code == 1
    assert words in result.output
    assert list((tmp_path / "repository" / "test_vit").iterdir()) == []


def test_a_full_disk_leaves_nothing_behind_and_is_told_in_a_line(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the second stage."""
    written: list[Path] = []

    def save(_model: object, path: Path) -> None:
        if len(written) == 1:
            raise OSError(28, "No space left on device", str(path.name))
        written.append(path)
        path.write_bytes(b"")

    monkeypatch.setattr("onnx.save", save)
    arguments = ["export", "--model", "test_vit", "--weights", str(inputs / "weights.safetensors"), "--version", "1"]
    arguments += ["--calibration", str(inputs / "images"), "--test", str(inputs / "images"), "--no-int8"]

    result = CliRunner().invoke(exporter, [*arguments, "--repository", str(tmp_path)])

    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert list((tmp_path / "test_vit").iterdir()) == []


@pytest.mark.parametrize("images", ["empty", "unlabelled"])
def test_images_that_cannot_be_used_are_told_in_a_line(inputs: Path, tmp_path: Path, images: str) -> None:
    """An empty folder, and one whose images have no class."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "unlabelled" / "whatever").mkdir(parents=True)
    (tmp_path / "unlabelled" / "whatever" / "1.jpg").write_bytes(make_jpeg())
    arguments = ["export", "--model", "test_vit", "--weights", str(inputs / "weights.safetensors"), "--version", "1"]
    arguments += ["--calibration", str(tmp_path / images), "--test", str(inputs / "images"), "--no-int8"]

    result = CliRunner().invoke(exporter, [*arguments, "--repository", str(tmp_path / "repository")])

    assert result.exit_code == 1
    assert ("holds no images" if images == "empty" else "none of the model's 10 classes") in result.output


def test_options_that_do_not_go_together_are_refused(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was asked for is passed over; what is to be installed is said in full."""
    weights = str(inputs / "weights.safetensors")
    arguments = ["export", "--model", "a", "--version", "1", "--repository", str(tmp_path)]
    arguments += ["--calibration", str(inputs / "images"), "--test", str(inputs / "images")]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "swin"}')
    for more, words in (
        (["--onnx", weights, "--weights", weights], "say one of --weights and --onnx"),
        (["--weights", weights, "--preprocessor", weights], "--preprocessor goes with --onnx"),
        (["--onnx", weights, "--boundaries", "1,2"], "an ONNX file is exported in one piece"),
        (["--onnx", weights, "--image-size", "64"], "do not go with --onnx"),
        (["--weights", weights, "--model", "test_vit", "--patch-size", "4"], "its stages and sizes are its own"),
        (["--weights", weights, "--model", "test_vit", "--boundaries", "2,6"], "its stages and sizes are its own"),
        (["--onnx", weights], "say --preprocessor FILE and --labels FILE"),
    ):
        result = CliRunner().invoke(exporter, [*arguments, *more])
        assert result.exit_code == 1
        assert words in result.output
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = CliRunner().invoke(exporter, [*arguments, "--checkpoint", str(tmp_path / "theirs")])
    assert "pip install 'fovea[transformers]'" in result.output


@pytest.mark.skipif(not has_exact_int8(), reason="INT8 is not exact on this CPU")
def test_a_published_version_is_made_int8_from_its_own_graphs(inputs: Path, tmp_path: Path) -> None:
    """Stages, labels and preprocessing are as they were; fp32 is the same file; what is known of the weights goes along."""
    others = inputs / "others"
    if not others.exists():
        make_archive(others.with_suffix(".zip"), CIFAR10_LABELS, per_class=3)
    config = replace(make_config(inputs, tmp_path), int8=False, data="ten drawings", reduction="tome:3")
    first = recipe.run(replace(config, calibration_images=others.with_suffix(".zip")))
    arguments = ["quantize", "--model", "test_vit", "--calibration", str(inputs / "images"), "--test", str(inputs / "images")]
    arguments += ["--repository", str(tmp_path), "--unlabelled"]

    result = CliRunner().invoke(exporter, [*arguments, "--version", "2"])
    lost = CliRunner().invoke(exporter, [*arguments, "--version", "3", "--from", "7"])
    seen = [str(others.with_suffix(".zip")) if each == arguments[6] else each for each in arguments]
    fitted = CliRunner().invoke(exporter, [*seen, "--version", "3", "--from", "1"])

    assert result.exit_code == 0, result.output
    before, after = ModelManifest.load(first), ModelManifest.load(tmp_path / "test_vit" / "2")
    assert [variant.name for variant in after.variants] == ["fp32", "int8"]
    assert (after.stages, after.preprocess) == (before.stages, before.preprocess)
    for index in range(3):
        assert after.files[f"fp32/stage_{index}.onnx"] == before.files[f"fp32/stage_{index}.onnx"]
        kinds = [node.op_type for node in onnx.load(tmp_path / "test_vit" / "2" / "int8" / f"stage_{index}.onnx").graph.node]
        assert kinds.count("MatMulIntegerToFloat") == 2 * 6  # query, key, value, projection and two of the MLP a block
    assert after.provenance["origin"] == "test_vit version 1, made from test_vit of the zoo"
    assert after.provenance["data"] == "ten drawings"
    assert "--from 1 " in after.provenance["command"]
    assert after.provenance["weights_sha256"] == before.provenance["weights_sha256"]
    assert "exporters quantize" in after.provenance["command"]
    assert lost.exit_code == 1
    assert "there is no model test_vit version 7" in lost.output
    assert fitted.exit_code == 1
    assert "were fitted on these test images" in fitted.output
    card = (tmp_path / "test_vit" / "2" / "MODEL_CARD.md").read_text()
    assert "`tome:3`, before this version was made" in card
    assert [tensor.name for tensor in after.stages[1].inputs] == ["tokens_0", "sizes_0"]


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(inputs: Path, tmp_path: Path) -> None:
    """And finds what can be found without computing: a version that exists, images in folders of no class."""
    arguments = ["export", "--model", "test_vit", "--weights", str(inputs / "weights.safetensors"), "--version", "1"]
    arguments += ["--calibration", str(inputs / "images"), "--repository", str(tmp_path), "--no-int8", "--dry-run"]
    (tmp_path / "else" / "nothing").mkdir(parents=True)
    (tmp_path / "else" / "nothing" / "1.jpg").write_bytes(make_jpeg(photo(9, 9)))

    result = CliRunner().invoke(exporter, [*arguments, "--test", str(inputs / "images"), "--reduce", "tome:2"])
    lost = CliRunner().invoke(exporter, [*arguments, "--test", str(tmp_path / "else")])

    assert result.exit_code == 0, result.output
    for words in (
        "test_vit of the zoo, 10 classes (airplane",
        "3, of ",
        "13, 9",
        "20 to fit on, 20 to measure on",
        "--dry-run",
    ):
        assert words in result.output
    mirrored = CliRunner().invoke(exporter, [*arguments, "--test", str(inputs / "images"), "--stages", "2", "--mirror"])
    assert "3, of " in mirrored.output  # two and the mirror
    assert not (tmp_path / "test_vit").exists()
    assert lost.exit_code == 1
    assert "which is none of the model's 10 classes" in lost.output
    recipe.run(replace(make_config(inputs, tmp_path), int8=False))
    again = CliRunner().invoke(exporter, [*arguments, "--test", str(inputs / "images")])
    assert again.exit_code == 1
    assert "version 1 is already published" in again.output


def test_what_int8_is_asked_for_reaches_the_export_and_the_card(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said only where it is not what is asked for anyway."""
    seen: list[ExportConfig] = []
    monkeypatch.setattr(cli, "publish", lambda _, config: seen.append(config))
    arguments = ["export", "--model", "test_vit", "--weights", str(inputs / "weights.safetensors"), "--version", "1"]
    arguments += ["--calibration", str(inputs / "images"), "--test", str(inputs / "images")]
    for further in ([], ["--target-agreement", "99.5", "--max-fp32-share", "30"]):
        assert CliRunner().invoke(exporter, [*arguments, *further]).exit_code == 0

    usual, asked = seen
    assert usual.quantization == QuantizationConfig()
    assert "agreement" not in usual.command
    assert (asked.quantization.target_agreement, asked.quantization.max_fp32_share) == (0.995, 0.3)
    assert "--target-agreement 99.5 --max-fp32-share 30" in asked.command
