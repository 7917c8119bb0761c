"""A version on disk is believed only when every file is the one that was published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from app.errors import ModelInvalid, ModelNotFound
from app.repository.store import ModelStore
from models.manifest import MANIFEST_FILE

NAME = "test_vit"


@pytest.fixture
def root(tiny_repository: Path, tmp_path: Path) -> Path:
    """A repository of our own, with version 1."""
    shutil.copytree(tiny_repository, tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def version(root: Path) -> Path:
    return root / NAME / "1"


def edit(version: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON by hand."""
    path = version / MANIFEST_FILE
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def renumber(version: Path, number: int) -> None:
    """Publish the version under another number beside it."""
    copy = version.parent / str(number)
    shutil.copytree(version, copy)
    edit(copy, lambda body: body.update(version=number))


def test_a_published_version_opens(root: Path) -> None:
    """With its manifest, its directory and its labels."""
    stored = ModelStore(root).open(NAME)

    assert stored.directory == root / NAME / "1"
    assert (stored.manifest.name, stored.manifest.version) == (NAME, 1)
    assert (len(stored.labels), stored.labels[0], stored.labels[-1]) == (10, "airplane", "truck")


def test_versions_are_ordered_as_numbers(root: Path, version: Path) -> None:
    """10 is higher than 9, and the highest is opened unless another is asked for."""
    renumber(version, 9)
    renumber(version, 10)
    store = ModelStore(root)

    assert store.versions(NAME) == [1, 9, 10]
    assert store.open(NAME).manifest.version == 10
    assert store.open(NAME, 9).manifest.version == 9


@pytest.mark.parametrize("other", [".2.partial", "2.partial", "latest", "-2", "2a"])
def test_a_directory_that_is_no_version_is_not_seen(root: Path, version: Path, other: str) -> None:
    """A version that is still being written, above all, even when its manifest is there already."""
    shutil.copytree(version, version.parent / other)

    assert ModelStore(root).versions(NAME) == [1]


def test_a_number_without_a_manifest_is_not_seen(root: Path) -> None:
    """And neither is a file that is called like a version."""
    (root / NAME / "2").mkdir()
    (root / NAME / "3").write_text("")

    assert ModelStore(root).versions(NAME) == [1]


def test_names_are_those_with_a_version(root: Path, version: Path) -> None:
    """In order of the alphabet; other folders and files lying about are no models."""
    shutil.copytree(version, root / "another" / "1")
    (root / "empty").mkdir()
    (root / "file").write_text("")

    assert ModelStore(root).names() == ["another", NAME]


def test_a_repository_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """What to do about it is said by who needs a model."""
    store = ModelStore(tmp_path / "absent")

    assert (store.names(), store.versions(NAME)) == ([], [])
    with pytest.raises(ModelNotFound, match="which has none"):
        store.open(NAME)


@pytest.mark.parametrize(("name", "number"), [("other", None), (NAME, 2)])
def test_an_unknown_model_or_version_is_not_found(root: Path, name: str, number: int | None) -> None:
    """The message says what there is."""
    with pytest.raises(ModelNotFound, match=f"{name}.*which has {NAME}"):
        ModelStore(root).open(name, number)


@pytest.mark.parametrize("kind", ["labels.txt", "fp32/stage_1.onnx", "golden.npz", "MODEL_CARD.md"])
def test_a_changed_file_is_refused(root: Path, version: Path, kind: str) -> None:
    """One byte, in any file of the version; the message names the file."""
    data = bytearray((version / kind).read_bytes())
    data[len(data) // 2] ^= 1
    (version / kind).write_bytes(data)

    with pytest.raises(ModelInvalid, match=f"test_vit version 1: {kind} is not the file that was published"):
        ModelStore(root).open(NAME)


def test_a_missing_file_is_refused(root: Path, version: Path) -> None:
    """Even one that serving would not need just now."""
    (version / "fp32" / "stage_2.onnx").unlink()

    with pytest.raises(ModelInvalid, match=r"fp32/stage_2.onnx cannot be read: No such file"):
        ModelStore(root).open(NAME)


def test_a_file_beside_those_listed_is_no_matter(root: Path, version: Path) -> None:
    """Only what the manifest names is used."""
    (version / "notes.txt").write_text("mine")

    assert ModelStore(root).open(NAME).manifest.version == 1


@pytest.mark.parametrize("change", [{"name": "other"}, {"version": 2}])
def test_a_manifest_of_another_model_or_version_is_refused(root: Path, version: Path, change: dict[str, Any]) -> None:
    """A directory copied to the wrong place, found out by what its manifest calls itself."""
    edit(version, lambda body: body.update(change))

    with pytest.raises(ModelInvalid, match=r"test_vit/1 holds (other version 1|test_vit version 2)"):
        ModelStore(root).open(NAME)


@pytest.mark.parametrize("path", ["../x", "fp32/../../x", "/etc/hostname", "..\\x"])
def test_a_file_outside_of_the_version_is_refused(root: Path, version: Path, path: str) -> None:
    """Even when it exists and its checksum is right: a manifest has no business outside of its directory."""
    (version.parent / "x").write_text("x")
    edit(version, lambda body: body["files"].update({path: sha256(b"x").hexdigest()}))

    with pytest.raises(ModelInvalid, match=r"(?s)cannot be used.*leads out of the version's directory") as refused:
        ModelStore(root).open(NAME)
    assert "test_vit version 1" in str(refused.value)


def test_an_unknown_key_is_refused(root: Path, version: Path) -> None:
    """A manifest of a later form may mean something that this service would not do."""
    edit(version, lambda body: body.update(surprise=1))

    with pytest.raises(ModelInvalid, match="surprise"):
        ModelStore(root).open(NAME)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_manifest_that_cannot_be_read_is_refused(root: Path, version: Path, text: str) -> None:
    """Torn or empty, it names the model and the version."""
    (version / MANIFEST_FILE).write_text(text)

    with pytest.raises(ModelInvalid, match="the manifest of test_vit version 1 cannot be used"):
        ModelStore(root).open(NAME)


def test_labels_must_be_one_per_class(root: Path, version: Path) -> None:
    """Eleven labels for ten classes would give wrong names to some."""
    text = (version / "labels.txt").read_text() + "eleventh\n"
    (version / "labels.txt").write_text(text)
    edit(version, lambda body: body["files"].update({"labels.txt": sha256(text.encode()).hexdigest()}))

    with pytest.raises(ModelInvalid, match="10 classes and 11 labels"):
        ModelStore(root).open(NAME)
