"""Networks of timm other than ViT. timm needs torchvision, which the tests do not: a stand-in builds a network."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from exporters.graphs_export import export_of
from exporters.sources.base import AS_IT_IS, Asked, SourceError, WholeModel
from exporters.sources.folder import from_folder
from exporters.sources.timm_whole import TimmWholeSource
from exporters.whole_graph import run
from models.manifest import LOGITS, PIXELS
from models.weights import WeightsError
from tests.checkpoints import LABELS, SIDE, TOLD


def build(name: str, *, pretrained: bool, num_classes: int, exportable: bool, width: int = 4) -> nn.Module:
    """As `timm.create_model`."""
    if name != "tiny_vit_4":
        raise RuntimeError(f"Unknown model ({name})")
    assert not pretrained
    assert exportable
    return nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.BatchNorm2d(width), nn.GELU(), nn.Flatten(), nn.LazyLinear(num_classes))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as timm's `save_for_hf` writes it, and a timm to read it."""
    stand_in: Any = types.ModuleType("timm")
    stand_in.create_model = build
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    torch.manual_seed(0)
    model = build("tiny_vit_4", pretrained=False, num_classes=5, exportable=True, width=6)
    model(torch.zeros(2, 3, SIDE, SIDE))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    told = TOLD | {"architecture": "tiny_vit_4", "model_args": {"width": 6}, "label_names": list(LABELS)}
    (tmp_path / "config.json").write_text(json.dumps(told))
    return tmp_path


def test_a_folder_of_timm_is_built_filled_and_traced(folder: Path) -> None:
    """With the arguments and the preprocessing of its configuration; batch norms go into the convolutions."""
    source, labels = from_folder(folder, (), AS_IT_IS)
    found = source.load()
    assert isinstance(found, WholeModel)
    assert isinstance(source, TimmWholeSource)
    export = export_of(found)
    pixels = np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)

    (graph,) = export.graphs()

    np.testing.assert_allclose(run(graph, {PIXELS: pixels})[LOGITS], export.answers(pixels)[0], atol=1e-4)
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
    assert (labels, found.origin, found.preprocess.resize) == (LABELS, "tiny_vit_4", 17)


def test_what_cannot_be_used_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture that timm does not know, weights of another, boundaries, too few labels, and no timm at all."""
    told = json.loads((folder / "config.json").read_text())
    with pytest.raises(SourceError, match="tiny_vit_4 is exported in one piece"):
        from_folder(folder, (), Asked((1, 2)))
    with pytest.raises(SourceError, match="tiny_vit_4 is exported as it is; --image-size and --patch-size are for ViT"):
        from_folder(folder, (), Asked(patch_size=8))
    with pytest.raises(SourceError, match="there are 1 labels, and tiny_vit_4 has 5 classes"):
        TimmWholeSource(folder / "model.safetensors", folder / "config.json", ("a",)).load()
    (folder / "other.json").write_text(json.dumps(told | {"architecture": "swindle"}))
    with pytest.raises(SourceError, match="timm does not build swindle: Unknown model"):
        TimmWholeSource(folder / "model.safetensors", folder / "other.json", LABELS).load()
    save_file({"0.weight": torch.zeros(6, 3, 4, 4)}, folder / "half.safetensors")
    with pytest.raises(WeightsError, match="it lacks"):
        TimmWholeSource(folder / "half.safetensors", folder / "config.json", LABELS).load()
    state = build("tiny_vit_4", pretrained=False, num_classes=5, exportable=True, width=9)
    state(torch.zeros(2, 3, SIDE, SIDE))
    save_file(state.state_dict(), folder / "wide.safetensors")
    with pytest.raises(WeightsError, match="size mismatch"):
        TimmWholeSource(folder / "wide.safetensors", folder / "config.json", LABELS).load()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SourceError, match="pip install timm"):
        TimmWholeSource(folder / "model.safetensors", folder / "config.json", LABELS).load()
