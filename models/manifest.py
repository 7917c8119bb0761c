"""The contract between exporting and serving: what `manifest.json` of a published version says.

The file is a border, so these are pydantic models: frozen, and an unknown key is an error rather than a surprise.
Nothing here imports torch, ONNX Runtime or the other packages of this project.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StringConstraints, model_validator

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION: Final = 1
PIXELS = "pixels"  # the input of stage 0
LOGITS = "logits"  # every stage has this output; the others are its state
BATCH: Final = "B"  # how a shape writes its one free axis

FULL, BALANCED = "full", "balanced"  # the operating points that every variant has: all stages, and its own exits

NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class HardwareTarget(StrEnum):
    """What a variant may run on. `cpu_vnni` is a CPU whose u8 x s8 dot product is exact and fast (docs/adr/0009)."""

    CPU = "cpu"
    CPU_VNNI = "cpu_vnni"
    CUDA = "cuda"
    TENSORRT = "tensorrt"
    OPENVINO = "openvino"
    COREML = "coreml"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorSpec(_Frozen):
    """One input or output of a stage."""

    name: str
    dtype: Literal["uint8", "float32", "int64"]
    shape: tuple[PositiveInt | Literal["B"], ...] = Field(description="The first axis is the batch, written 'B'.")

    @model_validator(mode="after")
    def _batch_is_the_first_and_only_free_axis(self) -> Self:
        if not self.shape or self.shape[0] != BATCH or BATCH in self.shape[1:]:
            raise ValueError(f"tensor {self.name!r}: shape {self.shape} must start with 'B' and have no other free axis")
        return self


class PreprocessSpec(_Frozen):
    """From an RGB uint8 image to what stage 0 takes: resize the shorter side, crop the centre, normalise."""

    resize: PositiveInt = Field(description="Length of the shorter side after resizing, in pixels.")
    squash: bool = Field(default=False, description="Both sides become that long, whatever the picture's proportions.")
    crop: tuple[PositiveInt, PositiveInt] = Field(description="Height and width of the centre crop, in pixels.")
    crop_rounding: Literal["half_to_even", "down"] = Field(
        default="half_to_even", description="Of the crop's offset, where the margins are odd: torchvision's, or transformers'."
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    mean: tuple[float, float, float] = Field(description="Per channel, RGB, in units of the scaled values.")
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    scale: float = Field(default=1 / 255, gt=0, description="Factor on the uint8 values before mean and std.")
    layout: Literal["uint8_nhwc", "float32_nchw"] = Field(
        description="uint8_nhwc: the graph normalises, pixels are uint8 (B, H, W, 3). "
        "float32_nchw: the service normalises, pixels are float32 (B, 3, H, W)."
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if max(self.crop) > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        return self

    def pixels(self) -> TensorSpec:
        """The tensor that stage 0 must take."""
        height, width = self.crop
        if self.layout == "uint8_nhwc":
            return TensorSpec(name=PIXELS, dtype="uint8", shape=(BATCH, height, width, 3))
        return TensorSpec(name=PIXELS, dtype="float32", shape=(BATCH, 3, height, width))


class StageSpec(_Frozen):
    """One ONNX file's interface. The first stage takes `pixels`, a later one exactly the state of the stage before.

    In a cascade the first stage of the next network takes `pixels` again, and the stage before it hands over nothing.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    gmacs: float = Field(ge=0, description="Cost of this stage alone, in 10^9 multiply-adds per image.")

    @property
    def logits(self) -> TensorSpec:
        return next(tensor for tensor in self.outputs if tensor.name == LOGITS)

    @model_validator(mode="after")
    def _has_logits(self) -> Self:
        names = [tensor.name for tensor in self.outputs]
        if LOGITS not in names or len(set(names)) != len(names):
            raise ValueError(f"a stage needs one output called {LOGITS!r} and no name twice, not {names}")
        if self.logits.dtype != "float32" or len(self.logits.shape) != 2:
            raise ValueError(f"{LOGITS} must be float32 of the shape (B, classes), not {self.logits}")
        return self

    @property
    def state(self) -> frozenset[TensorSpec]:
        """What it hands to the next stage: its outputs but the logits."""
        return frozenset(tensor for tensor in self.outputs if tensor.name != LOGITS)


class ExitSpec(_Frozen):
    """When an image may leave after a stage: its score, on logits / temperature, reaches the threshold."""

    score: Literal["max_softmax", "margin", "entropy", "patience"] = Field(
        description="max_softmax: largest probability. margin: largest minus second. entropy: 1 - entropy / log(classes). "
        "patience: how many exits in a row, this the last, gave one class, less one, plus max_softmax; over the stages."
    )
    temperature: float = Field(gt=0, description="Logits are divided by it (Guo et al., 2017).")
    threshold: float | None = Field(description="None on the last stage, where every image leaves.")


class Certificate(_Frozen):
    """What an operating point loses at most, as far as images can prove it (docs/risk-control.md)."""

    risk: Literal["accuracy", "disagreement"] = Field(
        description="accuracy: how much more rarely it is right. disagreement: how often it gives another class."
    )
    compared_with: str = Field(description="What it is compared with on each image, in words.")
    epsilon: float = Field(gt=0, lt=1, description="Largest loss promised, a share of the images.")
    delta: float = Field(
        gt=0, lt=1, description="Largest probability that the promise is not kept, over the draw of the images."
    )
    images: PositiveInt = Field(description="How many it was tested on; they had no part in fitting.")
    images_sha256: Sha256 = Field(description="Over the files of the set that these are part of.")
    method: str
    limits: str = Field(description="What it does not promise.")

    def __str__(self) -> str:
        """What it promises, in a line."""
        what = {
            "accuracy": f"loses at most {100 * self.epsilon:.3g} points of accuracy",
            "disagreement": f"gives another class for at most {100 * self.epsilon:.3g} % of the images",
        }[self.risk]
        return f"{what} against {self.compared_with}, with {100 * (1 - self.delta):.3g} % confidence ({self.images} images)"


class OperatingPoint(_Frozen):
    """A further choice of thresholds for the same exits, which a request may ask for as `quality`."""

    name: Name
    thresholds: tuple[float, ...] = Field(description="Of every exit but the last, in place of its own.")
    certificate: Certificate | None = Field(default=None, description="None where too few images could prove it.")


class VariantSpec(_Frozen):
    """The same stages at one precision: the files, where they may run, and the exits fitted on exactly these files."""

    name: Name
    targets: tuple[HardwareTarget, ...] = Field(min_length=1)
    files: tuple[str, ...] = Field(description="One ONNX file per stage, relative to the version's directory.")
    exits: tuple[ExitSpec, ...] = Field(description="One per stage.")
    golden_atol: float = Field(gt=0, description="Largest absolute difference of a logit when the golden pair is replayed.")
    certificate: Certificate | None = Field(
        default=None, description="Of these exits; none where too few images could prove it."
    )
    points: tuple[OperatingPoint, ...] = Field(
        default=(), description="Further operating points, each faster than the one before; these exits are `balanced`."
    )

    @model_validator(mode="after")
    def _points_fit(self) -> Self:
        names = [FULL, BALANCED, *(point.name for point in self.points)]
        if len(set(names)) != len(names):
            raise ValueError(f"two operating points have the same name: {names}")
        if wrong := [point.name for point in self.points if len(point.thresholds) != len(self.exits) - 1]:
            raise ValueError(f"the points {wrong} need a threshold for each of {len(self.exits) - 1} early exits")
        return self


class ModelManifest(_Frozen):
    """Everything the service needs to know of one published version."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Name
    version: PositiveInt
    labels_file: str
    golden_file: str = Field(description="npz: `pixels`, and `<variant>/stage_<k>/<output>` for each stage's outputs.")
    preprocess: PreprocessSpec
    stages: tuple[StageSpec, ...] = Field(min_length=1)
    variants: tuple[VariantSpec, ...] = Field(min_length=1)
    files: dict[str, Sha256] = Field(description="Every file of the version but this one, with its checksum.")
    provenance: dict[str, str] = Field(description="Weights, licence, data, command, commit, package versions.")

    @property
    def num_classes(self) -> int:
        return int(self.stages[-1].logits.shape[1])

    @property
    def entries(self) -> tuple[int, ...]:
        """Stages that take the pixels: the first, and in a cascade the first of each further network."""
        pixels = self.preprocess.pixels()
        return tuple(index for index, stage in enumerate(self.stages) if stage.inputs == (pixels,))

    def variant(self, name: str) -> VariantSpec:
        """The variant of that name; KeyError when there is none."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(name)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read and validate `manifest.json` in a version's directory."""
        return cls.model_validate_json((directory / MANIFEST_FILE).read_bytes())

    @model_validator(mode="after")
    def _stages_fit_together(self) -> Self:
        if self.stages[0].inputs != (self.preprocess.pixels(),):
            raise ValueError(f"stage 0 must take exactly {self.preprocess.pixels()}, as the preprocessing gives it")
        if len({stage.logits.shape for stage in self.stages}) != 1:
            raise ValueError("all stages must give logits of the same shape")
        for index, (before, stage) in enumerate(zip(self.stages[:-1], self.stages[1:], strict=True), start=1):
            if stage.inputs == (self.preprocess.pixels(),) and not before.state:
                continue  # the next network of a cascade
            if not stage.inputs or frozenset(stage.inputs) != before.state:
                raise ValueError(
                    f"stage {index} takes {sorted(map(str, stage.inputs))}, "
                    f"but stage {index - 1} hands over {sorted(map(str, before.state))}"
                )
        if self.stages[-1].state:
            raise ValueError("the last stage hands its state to nobody: it must give logits only")
        return self

    @model_validator(mode="after")
    def _variants_are_complete(self) -> Self:
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"two variants have the same name: {names}")
        for variant in self.variants:
            if len(variant.files) != len(self.stages) or len(variant.exits) != len(self.stages):
                raise ValueError(f"variant {variant.name!r} needs one file and one exit for each of {len(self.stages)} stages")
            open_exits = [index for index, exit_ in enumerate(variant.exits[:-1]) if exit_.threshold is None]
            if open_exits or variant.exits[-1].threshold is not None:
                raise ValueError(f"variant {variant.name!r}: every exit but the last needs a threshold, the last has none")
        return self

    @model_validator(mode="after")
    def _files_are_listed_and_inside(self) -> Self:
        needed = {self.labels_file, self.golden_file, *(file for variant in self.variants for file in variant.files)}
        unlisted = needed - self.files.keys()
        if unlisted:
            raise ValueError(f"files without a checksum: {sorted(unlisted)}")
        for file in self.files:
            path = PurePosixPath(file)
            if path.is_absolute() or ".." in path.parts or "\\" in file:
                raise ValueError(f"{file!r} leads out of the version's directory")
        return self
