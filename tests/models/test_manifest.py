"""A manifest that is accepted can be served; everything else is refused where it is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.manifest import LOGITS, MANIFEST_FILE, PIXELS, HardwareTarget, ModelManifest, PreprocessSpec, TensorSpec
from tests.fakes import make_manifest

Body = dict[str, Any]


@pytest.fixture
def body() -> Body:
    """A valid manifest as JSON."""
    found: Body = json.loads(make_manifest().model_dump_json())
    return found


def test_a_manifest_survives_its_file(tmp_path: Path) -> None:
    """Written and read again it is the same, and a name finds its variant."""
    manifest = make_manifest()
    (tmp_path / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2))

    loaded = ModelManifest.load(tmp_path)

    assert manifest == loaded
    assert loaded.variant("int8").targets == (HardwareTarget.CPU_VNNI,)
    assert loaded.num_classes == 64
    with pytest.raises(KeyError):
        loaded.variant("fp16")


def test_the_exported_manifest_is_valid(tiny_repository: Path) -> None:
    """What the recipe writes is what the service reads; every file of the version is listed."""
    directory = tiny_repository / "test_vit" / "1"
    manifest = ModelManifest.load(directory)

    written = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert written - {MANIFEST_FILE} == set(manifest.files)
    assert len(manifest.stages) == 3


@pytest.mark.parametrize(
    ("layout", "dtype", "shape"),
    [("uint8_nhwc", "uint8", ("B", 20, 30, 3)), ("float32_nchw", "float32", ("B", 3, 20, 30))],
)
def test_the_preprocessing_says_what_stage_0_takes(layout: str, dtype: str, shape: tuple[object, ...]) -> None:
    """Height before width, channels where the layout has them."""
    spec = PreprocessSpec.model_validate(
        {"resize": 32, "crop": (20, 30), "interpolation": "bicubic", "mean": (0, 0, 0), "std": (1, 1, 1), "layout": layout}
    )

    assert (PIXELS, dtype, shape) == (spec.pixels().name, spec.pixels().dtype, spec.pixels().shape)


@pytest.mark.parametrize("shape", [(), (1, 3), (3, "B"), ("B", "B"), ("B", 0), ("B", -1), ("N", 3)])
def test_only_the_first_axis_of_a_tensor_is_free(shape: tuple[object, ...]) -> None:
    """It is the batch; a second free axis would be a shape that nobody can allocate."""
    with pytest.raises(ValidationError):
        TensorSpec.model_validate({"name": "x", "dtype": "float32", "shape": shape})


def put(*path: str | int, value: object) -> Callable[[Body], None]:
    """A change: set what lies at the path."""

    def change(body: Body) -> None:
        for step in path[:-1]:
            body = body[step]  # type: ignore[index]
        body[path[-1]] = copy.deepcopy(value)  # type: ignore[index]

    return change


def list_file(name: str) -> Callable[[Body], None]:
    return lambda body: body["files"].update({name: "0" * 64})


def drop_file(name: str) -> Callable[[Body], None]:
    return lambda body: body["files"].pop(name)


def same_variant_twice(body: Body) -> None:
    body["variants"].append(body["variants"][0])


PIXELS_SPEC = {"name": PIXELS, "dtype": "uint8", "shape": ["B", 4, 4, 3]}
LOGITS_SPEC = {"name": LOGITS, "dtype": "float32", "shape": ["B", 64]}
STATE_SPEC = {"name": "number", "dtype": "float32", "shape": ["B", 1]}  # stage 0 gives it as int64
EXIT = {"score": "max_softmax", "temperature": 1.0, "threshold": 0.9}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("surprise", value=1), "surprise"),
        (put("stages", 0, "surprise", value=1), "surprise"),
        (put("variants", 0, "exits", 0, "surprise", value=1), "surprise"),
        (put("schema_version", value=2), "schema_version"),
        (put("name", value="../x"), "name"),
        (put("name", value="Upper"), "name"),
        (put("name", value=""), "name"),
        (put("name", value=".hidden"), "name"),
        (put("version", value=0), "version"),
        (put("files", "labels.txt", value="0" * 63), "labels.txt"),
        (drop_file("labels.txt"), "files without a checksum: .'labels.txt'"),
        (drop_file("golden.npz"), "files without a checksum: .'golden.npz'"),
        (drop_file("int8/stage_1.onnx"), "files without a checksum: .'int8/stage_1.onnx'"),
        (list_file("../x"), "leads out of the version's directory"),
        (list_file("fp32/../../x"), "leads out of the version's directory"),
        (list_file("/x"), "leads out of the version's directory"),
        (list_file("..\\x"), "leads out of the version's directory"),
        (put("preprocess", "crop", value=[4, 5]), "larger than resize"),
        (put("preprocess", "std", value=[1, 0, 1]), "std"),
        (put("preprocess", "scale", value=0), "scale"),
        (put("preprocess", "interpolation", value="magic"), "interpolation"),
        (put("preprocess", "layout", value="float32_nchw"), "stage 0 must take exactly"),
        (put("stages", value=[]), "stages"),
        (put("stages", 0, "inputs", value=[]), "stage 0 must take exactly"),
        (put("stages", 0, "inputs", value=[PIXELS_SPEC, PIXELS_SPEC]), "stage 0 must take exactly"),
        (put("stages", 0, "gmacs", value=-1), "gmacs"),
        (put("stages", 1, "inputs", value=[STATE_SPEC]), "stage 1 takes .*number.* but stage 0 hands over"),
        (put("stages", 2, "inputs", 0, "name", value="unknown"), "stage 2 takes .*unknown.* but stage 1 hands over"),
        (put("stages", 1, "outputs", value=[STATE_SPEC]), "a stage needs one output called 'logits'"),
        (put("stages", 1, "outputs", value=[LOGITS_SPEC, LOGITS_SPEC]), "no name twice"),
        (put("stages", 2, "outputs", 0, "shape", value=["B", 63]), "logits of the same shape"),
        (put("variants", value=[]), "variants"),
        (same_variant_twice, "two variants have the same name"),
        (put("variants", 0, "targets", value=[]), "targets"),
        (put("variants", 0, "targets", value=["abacus"]), "targets"),
        (put("variants", 0, "files", value=["fp32/stage_0.onnx"]), "one file and one exit for each of 3 stages"),
        (put("variants", 0, "exits", value=[EXIT]), "one file and one exit for each of 3 stages"),
        (put("variants", 0, "exits", 2, "threshold", value=0.9), "the last has none"),
        (put("variants", 0, "exits", 0, "threshold", value=None), "every exit but the last needs a threshold"),
        (put("variants", 0, "exits", 0, "temperature", value=0), "temperature"),
        (put("variants", 0, "exits", 0, "score", value="luck"), "score"),
        (put("variants", 0, "golden_atol", value=0), "golden_atol"),
    ],
)
def test_what_could_not_be_served_is_refused(body: Body, change: Callable[[Body], object], reason: str) -> None:
    """Every way in which the parts of a manifest can disagree; the message says which."""
    change(body)

    with pytest.raises(ValidationError, match=f"(?s){reason}"):
        ModelManifest.model_validate_json(json.dumps(body))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["temperature", "threshold"])
def test_numbers_are_finite(body: Body, field: str, value: str) -> None:
    """A threshold of NaN would keep every image, in silence."""
    body["variants"][0]["exits"][0][field] = float(value)

    with pytest.raises(ValidationError, match=field):
        ModelManifest.model_validate_json(json.dumps(body))


def test_a_later_stage_takes_exactly_what_the_one_before_hands_over(body: Body) -> None:
    """The pipeline hands on the whole state and nothing else; anything more would fail at the first survivor."""
    for inputs in ([PIXELS_SPEC], [], body["stages"][1]["inputs"][:1]):
        changed = json.loads(json.dumps(body))
        changed["stages"][1]["inputs"] = inputs
        with pytest.raises(ValidationError, match="stage 0 hands over"):
            ModelManifest.model_validate_json(json.dumps(changed))


@pytest.mark.parametrize("change", [{"shape": ["B"]}, {"shape": ["B", 2, 5]}, {"dtype": "int64"}])
def test_logits_are_one_number_per_class(body: Body, change: dict[str, object]) -> None:
    """Softmax and exits work on float32 (B, C)."""
    for stage in body["stages"]:
        for tensor in stage["outputs"]:
            if tensor["name"] == "logits":
                tensor.update(change)
    with pytest.raises(ValidationError, match="must be float32 of the shape"):
        ModelManifest.model_validate_json(json.dumps(body))


def test_a_manifest_does_not_change() -> None:
    """A published version is what it is."""
    manifest = make_manifest()

    with pytest.raises(ValidationError):
        manifest.name = "other"  # type: ignore[misc]
