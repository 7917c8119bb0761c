"""Folders of either kind, and names on a hub, which no test can reach: a stand-in gives what it would."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from exporters.sources.base import AS_IT_IS, Asked, SourceError
from exporters.sources.folder import WANTED, find, from_folder
from exporters.sources.timm_vit import TimmSource
from exporters.sources.transformers_vit import TransformersSource
from tests.checkpoints import LABELS, TOLD, checkpoint, write_checkpoint, write_transformers_folder


def test_what_is_in_a_folder_is_told_by_its_configuration(tmp_path: Path) -> None:
    """Both kinds load; timm's names its classes where it can."""
    write_transformers_folder(tmp_path / "theirs", checkpoint())
    (tmp_path / "timm").mkdir()
    write_checkpoint(tmp_path / "timm", checkpoint(), {**TOLD, "label_names": list(LABELS)})

    theirs, their_labels = from_folder(tmp_path / "theirs", (), AS_IT_IS)
    timms, timm_labels = from_folder(tmp_path / "timm", (), Asked((1, 2)))

    assert isinstance(theirs, TransformersSource)
    assert isinstance(timms, TimmSource)
    assert their_labels == timm_labels == LABELS
    assert theirs.load().labels == timms.load().labels
    assert not timms.load().has_exits


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "holds no config.json"),
        ("{", "config.json is no JSON"),
        ('{"hidden_size": 3}', "neither timm's"),
        ('{"model_type": "hourglass"}', "transformers does not know"),
        (json.dumps(TOLD), "does not name its classes: say --labels FILE"),
    ],
)
def test_other_folders_are_refused_in_words(tmp_path: Path, config: str | None, words: str) -> None:
    """Whatever is in them."""
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(SourceError, match=words):
        from_folder(tmp_path, (), AS_IT_IS)


def test_a_name_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the files that are needed; a folder of that name comes first."""
    asked: list[tuple[str, list[str]]] = []
    hub = types.ModuleType("huggingface_hub")

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "nobody/nothing":
            raise OSError("404")
        return str(tmp_path)

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)

    assert find("someone/model") == tmp_path
    assert find(str(tmp_path)) == tmp_path
    assert asked == [("someone/model", WANTED)]
    with pytest.raises(SourceError, match="the hub did not give it: 404"):
        find("nobody/nothing")


def test_without_a_hub_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is no part of the extra for exporting; a path that is none is no name."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match="pip install huggingface_hub, or download it elsewhere"):
        find("someone/model")
    with pytest.raises(SourceError, match=r"there is no folder \./some/model"):
        find("./some/model")
