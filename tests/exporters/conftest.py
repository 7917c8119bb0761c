"""What tests of the recipe and of its commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from models.zoo import CIFAR10_LABELS, create_model
from tests.images import make_jpeg, photo


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and two images a class."""
    directory = tmp_path_factory.mktemp("inputs")
    save_file(create_model("test_vit", seed=0).state_dict(), directory / "weights.safetensors")
    for label, name in enumerate(CIFAR10_LABELS):
        (directory / "images" / name).mkdir(parents=True)
        for number in range(2):
            (directory / "images" / name / f"{number}.jpg").write_bytes(make_jpeg(photo(40, 36, seed=2 * label + number)))
    return directory
