"""What tests of the recipe and of its commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from safetensors.torch import save_file

from models.zoo import CIFAR10_LABELS, create_model
from tests.images import make_jpeg, photo


@pytest.fixture(scope="module", autouse=True)
def exact_int8_sums() -> Iterator[None]:
    """ONNX Runtime sums 8-bit products exactly, also on CPUs where its fast way saturates.

    So INT8 graphs are compared within the same tolerances on every machine. The option makes u8 x s8 products u8 x u8 on x86
    without VNNI, which is slower and exact; elsewhere it has no effect.

    Source: `kOrtSessionOptionsAvx2PrecisionMode` in ONNX Runtime's onnxruntime_session_options_config_keys.h.
    """
    make_session = ort.InferenceSession.__init__

    def make_exact(self: Any, model: Any, sess_options: Any = None, *arguments: Any, **named: Any) -> None:
        options = ort.SessionOptions() if sess_options is None else sess_options
        options.add_session_config_entry("session.x64quantprecision", "1")
        make_session(self, model, options, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort.InferenceSession, "__init__", make_exact)
        yield


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
