"""Fixtures that several test modules share. Async tests: `pytestmark = pytest.mark.anyio` at the head of the module."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from app.metrics import Metrics

IMAGES_PER_CLASS = {"fitting": 4, "test": 2}
# Tensors of tests are small: more OpenMP threads wait for each other longer than they compute, above all on busy cores.
# torch reads this when it is first imported, which no module does before this one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

WEIGHT_GAIN = 4.0  # on freshly drawn weights, so that logits differ by about 1 and no tolerance is met by being small


@pytest.fixture
def anyio_backend() -> object:
    """Async tests run on asyncio; a module that controls time says `VIRTUAL_TIME` of `tests.fakes` instead."""
    return "asyncio"


@pytest.fixture
def metrics() -> Metrics:
    """The service's metrics, fresh."""
    return Metrics(CollectorRegistry())


@pytest.fixture
def virtual_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scheduling reads the running loop's time, so that a virtual loop decides about all of it."""
    clock = SimpleNamespace(perf_counter=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr("app.scheduling.trip.time", clock)
    monkeypatch.setattr("app.scheduling.pipeline.time", clock)


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with version 1 of `test_vit`, exported by the real recipe from seeded random weights."""
    from safetensors.torch import save_file

    from app.runtime.cpu import has_exact_int8
    from exporters.config import ExportConfig, QuantizationConfig
    from exporters.recipe import run
    from exporters.sources.zoo import ZooSource
    from models.zoo import ZOO, create_model

    folder = tmp_path_factory.mktemp("export")
    state = create_model("test_vit", seed=1).state_dict()
    save_file({name: value * (WEIGHT_GAIN if value.ndim > 1 else 1) for name, value in state.items()}, folder / "w.safetensors")
    generator = np.random.default_rng(0)
    for split, count in IMAGES_PER_CLASS.items():
        for label in ZOO["test_vit"].labels:
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((32, 32)).save(folder / split / label / f"{number}.png")
    config = ExportConfig(
        name="test_vit",
        source=ZooSource("test_vit", folder / "w.safetensors"),
        calibration_images=folder / "fitting",
        test_images=folder / "test",
        repository=folder / "repository",
        version=1,
        int8=has_exact_int8(),
        quantization=QuantizationConfig(min_agreement=0, max_accuracy_drop=1),  # nothing can be asked of random weights
    )
    run(config)
    return config.repository
