"""Folders as transformers writes them: the same network as under timm's names, with its own labels and preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.sources.base import SourceError
from exporters.sources.transformers_vit import TransformersSource
from models.weights import WeightsError
from tests.checkpoints import LABELS, SIDE, answer, checkpoint, write_transformers_folder


def change(folder: Path, file: str, **changed: Any) -> None:
    """Some keys of one of the folder's JSON files; None removes one."""
    told = json.loads((folder / file).read_text()) | changed
    (folder / file).write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


@pytest.mark.parametrize("kind", ["vit", "deit with two classifiers", "deit with one classifier"])
def test_the_network_answers_as_the_paper_says(tmp_path: Path, kind: str) -> None:
    """Queries, keys and values are three tensors there; the norms' epsilon is another one."""
    state = checkpoint(distilled=kind != "vit")
    written = dict(state)
    if kind == "deit with one classifier":
        written = {name: value for name, value in state.items() if not name.startswith("head_dist")}
    write_transformers_folder(tmp_path / "model", written, "vit" if kind == "vit" else "deit")
    image = torch.randn(3, 3, SIDE, SIDE)

    network = TransformersSource(tmp_path / "model").load()

    with torch.no_grad():
        (logits,) = network.model(image)
    torch.testing.assert_close(logits, answer(written, image, eps=1e-12), rtol=1e-4, atol=1e-4)
    assert network.labels == LABELS


def test_a_picture_is_squashed_where_the_preprocessor_says_so(tmp_path: Path) -> None:
    """Old files give sizes as numbers; a crop comes out of a square that is larger."""
    write_transformers_folder(tmp_path / "model", checkpoint())
    plain = TransformersSource(tmp_path / "model").load().preprocess
    change(tmp_path / "model", "preprocessor_config.json", size=20, do_center_crop=True, crop_size=SIDE, resample=3)
    cropped = TransformersSource(tmp_path / "model").load().preprocess

    assert (plain.resize, plain.crop, plain.squash, plain.interpolation) == (SIDE, (SIDE, SIDE), True, "bilinear")
    assert (cropped.resize, cropped.crop, cropped.squash, cropped.interpolation) == (20, (SIDE, SIDE), True, "bicubic")


@pytest.mark.parametrize(
    ("file", "changed", "words"),
    [
        ("config.json", {"model_type": "swin"}, "config.json is not supported: model_type"),
        ("config.json", {"hidden_act": "relu"}, "hidden_act"),
        ("config.json", {"layer_norm_eps": None}, "layer_norm_eps: Field required"),
        ("config.json", {"image_size": 32}, r"gives \(16, 16\) pixels and the network takes 32 x 32"),
        ("preprocessor_config.json", {"image_mean": None}, "image_mean: Field required"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 16}}, "size"),
        ("preprocessor_config.json", {"do_rescale": False}, "do_rescale"),
        ("preprocessor_config.json", {"do_center_crop": True}, "does not say to what size"),
        ("preprocessor_config.json", {"resample": 5}, "resample 5"),
        ("preprocessor_config.json", {"size": {"height": 16, "width": 18}}, "only squares"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, file: str, changed: dict[str, Any], words: str) -> None:
    """Nothing is assumed where the files say nothing."""
    write_transformers_folder(tmp_path / "model", checkpoint())
    change(tmp_path / "model", file, **changed)
    with pytest.raises(SourceError, match=words):
        TransformersSource(tmp_path / "model").load()


def test_a_folder_that_lacks_a_file_or_a_tensor_is_refused(tmp_path: Path) -> None:
    """With its name."""
    state = checkpoint()
    del state["blocks.1.norm2.bias"]
    write_transformers_folder(tmp_path / "model", state)
    with pytest.raises(WeightsError, match=r"lacks blocks.1.norm2.bias"):
        TransformersSource(tmp_path / "model").load()
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"holds neither model.safetensors nor pytorch_model.bin"):
        TransformersSource(tmp_path / "model").load()
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match=r"model holds no preprocessor_config.json"):
        TransformersSource(tmp_path / "model").load()
