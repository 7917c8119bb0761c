"""A machine that does not compute the model as it was exported is found out before it serves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from app.errors import ModelInvalid
from app.runtime.golden import golden_key, verify_golden
from app.runtime.ort_backend import OrtBackend
from app.runtime.targets import resolve_profile
from app.types import Array, StageOutput
from models.manifest import LOGITS, PIXELS, ModelManifest
from tests.fakes import NUM_STAGES, FakeBackend, answer, make_manifest

IMAGES = [3, 5]
NEVER_SURE = dict.fromkeys(IMAGES, NUM_STAGES)


class Altered(FakeBackend):
    """Computes one stage otherwise: its logits are off by `logits`, its state stands for other images."""

    def __init__(self, stage: int, logits: float, *, state: int = 0) -> None:
        super().__init__(NEVER_SURE)
        self._altered = (stage, np.float32(logits), state)

    def run(self, stage: int, inputs: Mapping[str, Array]) -> StageOutput:
        output = super().run(stage, inputs)
        at, logits, state = self._altered
        if stage != at:
            return output
        return StageOutput(output.logits + logits, {name: value + state for name, value in output.state.items()})


@pytest.fixture
def golden() -> dict[str, Array]:
    """What the exporter saw: every stage's logits, and the state of all but the last."""
    arrays: dict[str, Array] = {PIXELS: np.array(IMAGES)[:, None]}
    for stage in range(NUM_STAGES):
        output = answer(IMAGES, stage, NEVER_SURE)
        arrays[golden_key("int8", stage, LOGITS)] = output.logits
        for name, value in output.state.items():
            arrays[golden_key("int8", stage, name)] = value
    return arrays


@pytest.fixture
def manifest() -> ModelManifest:
    """Variant int8 may differ by 0.001."""
    return make_manifest()


def verify(directory: Path, manifest: ModelManifest, golden: Mapping[str, Array], backend: FakeBackend) -> float:
    np.savez(directory / manifest.golden_file, **golden)  # type: ignore[arg-type]
    return verify_golden(backend, directory, manifest, "int8")


def test_equal_logits_pass(tmp_path: Path, manifest: ModelManifest, golden: dict[str, Array]) -> None:
    """Every stage is run once, on the stored images."""
    backend = FakeBackend(NEVER_SURE)

    assert verify(tmp_path, manifest, golden, backend) == 0
    assert [(stage, IMAGES) for stage in range(NUM_STAGES)] == backend.runs


@pytest.mark.parametrize("stage", range(NUM_STAGES))
def test_the_largest_difference_within_the_tolerance_is_told(
    tmp_path: Path, manifest: ModelManifest, golden: dict[str, Array], stage: int
) -> None:
    """Whichever stage it is of."""
    assert verify(tmp_path, manifest, golden, Altered(stage, 0.0005)) == pytest.approx(0.0005, rel=1e-3)


@pytest.mark.parametrize("stage", range(NUM_STAGES))
@pytest.mark.parametrize("difference", [0.002, -0.002, np.nan, np.inf])
def test_other_logits_are_refused(
    tmp_path: Path, manifest: ModelManifest, golden: dict[str, Array], stage: int, difference: float
) -> None:
    """Beyond the tolerance, NaN included, whatever the stage; the message names variant and stage."""
    with pytest.raises(ModelInvalid, match=f"variant int8, stage {stage}: logits differ"):
        verify(tmp_path, manifest, golden, Altered(stage, difference))


def test_every_stage_gets_the_stored_state(tmp_path: Path, manifest: ModelManifest, golden: dict[str, Array]) -> None:
    """Not the state just computed: a difference shows where it arises, and not at all stages behind."""
    backend = Altered(0, 0.0, state=1)

    assert verify(tmp_path, manifest, golden, backend) == 0
    assert backend.runs[1] == (1, IMAGES)


@pytest.mark.parametrize("key", [PIXELS, "int8/stage_0/logits", "int8/stage_1/number", "int8/stage_2/logits"])
def test_a_missing_array_is_named(tmp_path: Path, manifest: ModelManifest, golden: dict[str, Array], key: str) -> None:
    """A golden file that lacks something proves nothing."""
    del golden[key]

    with pytest.raises(ModelInvalid, match=f"lacks '{key}'"):
        verify(tmp_path, manifest, golden, FakeBackend(NEVER_SURE))


def test_a_stored_nan_is_refused(tmp_path: Path, manifest: ModelManifest, golden: dict[str, Array]) -> None:
    """It would compare as no difference with `>`."""
    golden["int8/stage_1/logits"][0, 0] = np.nan

    with pytest.raises(ModelInvalid, match="stage 1"):
        verify(tmp_path, manifest, golden, FakeBackend(NEVER_SURE))


def test_the_exported_model_replays_its_own_golden_pair(tiny_repository: Path) -> None:
    """What the recipe wrote is what ONNX Runtime computes here, for every variant that this CPU may run."""
    directory = tiny_repository / "test_vit" / "1"
    manifest = ModelManifest.load(directory)

    for variant in manifest.variants:
        backend = OrtBackend(directory, manifest, variant.name, resolve_profile("cpu", instances=1))
        assert verify_golden(backend, directory, manifest, variant.name) <= variant.golden_atol
