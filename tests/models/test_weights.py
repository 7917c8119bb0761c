"""Weights from files: exactly the network's, and never code from a pickle."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.weights import WeightsError, load_weights
from models.zoo import create_model


def test_safetensors_and_checkpoints_give_the_same_network(tmp_path: Path) -> None:
    """Both forms hold a state dict."""
    source = create_model("test_vit", seed=3)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save({"model": source.state_dict(), "epoch": 4}, tmp_path / "w.pt")

    for file in ("w.safetensors", "w.pt"):
        model = create_model("test_vit", seed=0)
        checksum = load_weights(model, tmp_path / file)
        assert len(checksum) == 64
        for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """Half a network must not pass for a whole one."""
    state = create_model("test_vit").state_dict()
    del state["stages.1.head.fc.bias"]
    save_file(state, tmp_path / "w.safetensors")

    with pytest.raises(WeightsError, match=r"stages\.1\.head\.fc\.bias"):
        load_weights(create_model("test_vit"), tmp_path / "w.safetensors")


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("harmed"),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`weights_only` reads tensors, nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(pickle.dumps(_Harmful()))

    with pytest.raises(WeightsError, match="not a file of weights"):
        load_weights(create_model("test_vit"), tmp_path / "w.pt")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(("name", "content"), [("w.safetensors", b"no"), ("w.pt", b""), ("w.bin", b"text")])
def test_a_file_that_is_no_weights_is_refused_in_words(tmp_path: Path, name: str, content: bytes) -> None:
    """Whatever the libraries raise becomes one kind of error that names the file."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(WeightsError, match=name):
        load_weights(create_model("test_vit"), tmp_path / name)
