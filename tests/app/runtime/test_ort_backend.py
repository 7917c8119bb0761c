"""Real ONNX Runtime on the tiny exported model: what it computes, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

from app.errors import ModelInvalid, StartupError
from app.runtime.cpu import has_exact_int8
from app.runtime.ort_backend import OrtBackend
from app.runtime.targets import TargetProfile, resolve_profile
from app.types import Array, StageOutput
from models.manifest import LOGITS, PIXELS, ModelManifest, TensorSpec, VariantSpec

NUM_IMAGES = 11
FP32_ATOL = 1e-5  # another batch size may sum in another order; logits here are of the order of 1


@pytest.fixture
def directory(tiny_repository: Path) -> Path:
    return tiny_repository / "test_vit" / "1"


@pytest.fixture
def manifest(directory: Path) -> ModelManifest:
    return ModelManifest.load(directory)


@pytest.fixture
def profile() -> TargetProfile:
    return resolve_profile("cpu", instances=1)


@pytest.fixture
def images(manifest: ModelManifest) -> Array:
    """Noise of full contrast, as stage 0 takes it."""
    shape = (NUM_IMAGES, *manifest.preprocess.crop, 3)
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def run_all(backend: OrtBackend, manifest: ModelManifest, images: Array) -> list[StageOutput]:
    """Every stage on the state that the one before gave."""
    inputs: Mapping[str, Array] = {PIXELS: images}
    outputs = []
    for stage in range(len(manifest.stages)):
        outputs.append(backend.run(stage, inputs))
        inputs = outputs[-1].state
    return outputs


def with_variant(manifest: ModelManifest, **changes: object) -> ModelManifest:
    """The manifest with its fp32 variant changed, unchecked."""
    variant: VariantSpec = manifest.variant("fp32").model_copy(update=changes)
    return manifest.model_copy(update={"variants": (variant,)})


def with_tensor(manifest: ModelManifest, stage: int, kind: str, **changes: object) -> ModelManifest:
    """The manifest with the first input or output of a stage changed, unchecked."""
    tensors: tuple[TensorSpec, ...] = getattr(manifest.stages[stage], kind)
    changed = (tensors[0].model_copy(update=changes), *tensors[1:])
    stages = list(manifest.stages)
    stages[stage] = stages[stage].model_copy(update={kind: changed})
    return manifest.model_copy(update={"stages": tuple(stages)})


def test_the_outputs_are_what_the_manifest_says(
    directory: Path, manifest: ModelManifest, profile: TargetProfile, images: Array
) -> None:
    """Names, types and shapes of every stage; logits apart from the state, and no state after the last."""
    outputs = run_all(OrtBackend(directory, manifest, "fp32", profile), manifest, images)

    for stage, output in zip(manifest.stages, outputs, strict=True):
        arrays = {LOGITS: output.logits, **output.state}
        expected = {tensor.name: (tensor.dtype, (NUM_IMAGES, *tensor.shape[1:])) for tensor in stage.outputs}
        assert expected == {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    assert not outputs[-1].state


def test_different_images_get_different_logits(
    directory: Path, manifest: ModelManifest, profile: TargetProfile, images: Array
) -> None:
    """Else the comparisons below could not fail: images differ by far more than their tolerances."""
    outputs = run_all(OrtBackend(directory, manifest, "fp32", profile), manifest, images)

    for output in outputs:
        assert np.abs(output.logits[0] - output.logits[1]).max() > 1000 * FP32_ATOL


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_an_image_does_not_depend_on_its_batch(
    directory: Path, manifest: ModelManifest, profile: TargetProfile, images: Array, variant: str, batch_size: int
) -> None:
    """Alone or among others, at any place: INT8 bit for bit, fp32 up to the order of summation."""
    if variant not in {each.name for each in manifest.variants}:
        assert not has_exact_int8()
        pytest.skip("this CPU's u8 x s8 products saturate, so the recipe made no INT8 variant")
    backend = OrtBackend(directory, manifest, variant, profile)
    together = run_all(backend, manifest, images)

    for start in range(0, NUM_IMAGES - batch_size + 1, batch_size):
        rows = slice(start, start + batch_size)
        for output, whole in zip(run_all(backend, manifest, images[rows]), together, strict=True):
            parts = {LOGITS: output.logits, **output.state}
            wholes = {LOGITS: whole.logits, **whole.state}
            for name, part in parts.items():
                if variant == "int8":
                    np.testing.assert_array_equal(part, wholes[name][rows])
                else:
                    np.testing.assert_allclose(part, wholes[name][rows], rtol=0, atol=FP32_ATOL)


def test_a_run_is_ended_by_its_control_alone(
    directory: Path, manifest: ModelManifest, profile: TargetProfile, images: Array
) -> None:
    """Whoever holds another one is not met, and the same one may go on with the next run."""
    backend = OrtBackend(directory, manifest, "fp32", profile)
    first, second = backend.control(), backend.control()
    whole = backend.run(0, {PIXELS: images})
    first.terminate = True
    with pytest.raises(Exception, match="terminate"):
        backend.run(0, {PIXELS: images}, first)
    np.testing.assert_array_equal(backend.run(0, {PIXELS: images}, second).logits, whole.logits)
    first.terminate = False
    np.testing.assert_array_equal(backend.run(0, {PIXELS: images}, first).logits, whole.logits)


def test_a_run_that_fails_on_its_hardware_is_not_done_elsewhere(
    directory: Path, manifest: ModelManifest, profile: TargetProfile, images: Array
) -> None:
    """ONNX Runtime would open the session anew on the CPU and try again, in silence."""
    backend = OrtBackend(directory, manifest, "fp32", profile)
    (session, *_) = backend._sessions
    calls = []

    class Failing:
        def __getattr__(self, name: str) -> object:
            return getattr(whole, name)

        def run(self, *arguments: object) -> None:
            calls.append(arguments)
            raise EPFail("the device was lost")

    whole, session._sess = session._sess, Failing()
    with pytest.raises(EPFail, match="lost"):
        backend.run(0, {PIXELS: images})
    assert len(calls) == 1


def test_warm_up_runs_every_stage_at_every_batch_size(
    directory: Path, manifest: ModelManifest, profile: TargetProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With inputs of the manifest's shape."""
    backend = OrtBackend(directory, manifest, "fp32", profile)
    seen = []
    run = backend.run

    def remember(stage: int, inputs: Mapping[str, Array]) -> StageOutput:
        seen.append((stage, {len(array) for array in inputs.values()}))
        return run(stage, inputs)

    monkeypatch.setattr(backend, "run", remember)
    backend.warm_up([1, 4])

    assert [(stage, {size}) for size in (1, 4) for stage in range(len(manifest.stages))] == seen


def test_a_closed_backend_runs_no_more(directory: Path, manifest: ModelManifest, profile: TargetProfile, images: Array) -> None:
    """Its sessions are gone."""
    backend = OrtBackend(directory, manifest, "fp32", profile)
    backend.close()

    with pytest.raises(IndexError):
        backend.run(0, {PIXELS: images})


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_fall_back_to_another_provider_is_refused(directory: Path, manifest: ModelManifest, profile: TargetProfile) -> None:
    """ONNX Runtime itself only warns and takes the CPU; the message names what was wanted and what there is."""
    wanted = replace(profile, providers=("NoSuchExecutionProvider", *profile.providers))

    with pytest.raises(StartupError, match="needs NoSuchExecutionProvider, but ONNX Runtime fell back to CPUExecutionProvider"):
        OrtBackend(directory, manifest, "fp32", wanted)


def test_a_session_that_lost_its_provider_is_refused(
    directory: Path, manifest: ModelManifest, profile: TargetProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is what the session says it got, not that it was opened without an error."""
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda self: ["OtherExecutionProvider"])

    with pytest.raises(StartupError, match="fell back to OtherExecutionProvider"):
        OrtBackend(directory, manifest, "fp32", profile)


def test_the_files_of_other_stages_are_refused(directory: Path, manifest: ModelManifest, profile: TargetProfile) -> None:
    """A stage file that is not what the manifest says of its stage; the message says what it is."""
    swapped = with_variant(manifest, files=manifest.variant("fp32").files[::-1])

    with pytest.raises(ModelInvalid, match=r"stage_2.onnx has the inputs .*tokens_1.*, but the manifest says .*pixels"):
        OrtBackend(directory, swapped, "fp32", profile)


@pytest.mark.parametrize(
    ("stage", "kind", "changes"),
    [
        (0, "inputs", {"dtype": "float32"}),
        (0, "inputs", {"shape": ("B", 32, 31, 3)}),
        (1, "inputs", {"name": "other"}),
        (1, "inputs", {"shape": ("B", 17)}),
        (0, "outputs", {"shape": ("B", 11)}),
        (2, "outputs", {"dtype": "int64"}),
    ],
)
def test_a_stage_with_another_interface_is_refused(
    directory: Path, manifest: ModelManifest, profile: TargetProfile, stage: int, kind: str, changes: dict[str, object]
) -> None:
    """Name, type or shape of any input or output."""
    with pytest.raises(ModelInvalid, match=f"stage_{stage}.onnx has the {kind}"):
        OrtBackend(directory, with_tensor(manifest, stage, kind, **changes), "fp32", profile)


def test_a_stage_with_another_output_is_refused(directory: Path, manifest: ModelManifest, profile: TargetProfile) -> None:
    """An output that the manifest does not know would be computed for nothing, or stands for another model."""
    stages = (manifest.stages[0].model_copy(update={"outputs": manifest.stages[0].outputs[:1]}), *manifest.stages[1:])

    with pytest.raises(ModelInvalid, match=r"stage_0.onnx has the outputs"):
        OrtBackend(directory, manifest.model_copy(update={"stages": stages}), "fp32", profile)


def test_a_stage_of_a_fixed_batch_size_is_refused(
    directory: Path, manifest: ModelManifest, profile: TargetProfile, tmp_path: Path
) -> None:
    """It would run alone and fail in company, so it is found out when it is opened."""
    shutil.copytree(directory, tmp_path / "1")
    path = tmp_path / "1" / manifest.variant("fp32").files[0]
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, path)

    with pytest.raises(ModelInvalid, match=r"stage_0.onnx has the inputs"):
        OrtBackend(tmp_path / "1", manifest, "fp32", profile)


@pytest.mark.parametrize("content", [b"", b"not a graph", None], ids=["empty", "rubbish", "absent"])
def test_a_file_that_is_no_graph_is_refused(
    directory: Path, manifest: ModelManifest, profile: TargetProfile, tmp_path: Path, content: bytes | None
) -> None:
    """ONNX Runtime's own error, under our name for it and with the file's."""
    shutil.copytree(directory, tmp_path / "1")
    path = tmp_path / "1" / manifest.variant("fp32").files[1]
    path.unlink()
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ModelInvalid, match=r"ONNX Runtime cannot open stage_1.onnx"):
        OrtBackend(tmp_path / "1", manifest, "fp32", profile)
