"""Load weights by file; what is loaded is named by its checksum."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn


class WeightsError(ValueError):
    """A file that holds no weights for this network."""


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from `.safetensors`, or from a checkpoint of `models.training` (key `model`).

    Raises:
        WeightsError: the file is neither, or cannot be read. Pickles are read with `weights_only`, so none runs code.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many kinds; none of them is ours to tell apart
        first_line = str(error).strip().partition("\n")[0]
        raise WeightsError(f"{path.name} is not a file of weights: {first_line}") from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path.name} holds no state dict")
    return state


def load_weights(model: nn.Module, path: Path) -> str:
    """Load a file into a network, exactly; returns its sha256.

    Raises:
        WeightsError: names of missing, superfluous or wrongly shaped tensors.
    """
    try:
        model.load_state_dict(load_state_dict(path), strict=True)
    except RuntimeError as error:
        raise WeightsError(f"{path.name} does not fit the network: {error}") from error
    return sha256_of(path)


def sha256_of(path: Path) -> str:
    """What a file of weights is named by."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
