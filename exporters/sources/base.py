"""What every source gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import onnx
from pydantic import ValidationError
from torch import Tensor

from app.types import FloatArray
from models.manifest import HardwareTarget, PreprocessSpec, StageSpec
from models.multi_exit import MultiExitViT
from models.vit_state import Told, network_of
from models.weights import WeightsError

LARGEST_MARGIN = 0.08  # of a side, right and below, that patches of another size may leave unseen


class SourceError(ValueError):
    """A configuration or a checkpoint that is not understood, or not of a kind that is supported."""


@dataclass(frozen=True, slots=True)
class Network:
    """A network with its weights, and what an export must know of it."""

    model: MultiExitViT  # in evaluation mode
    preprocess: PreprocessSpec
    labels: tuple[str, ...]
    weights_sha256: str
    origin: str  # what it is called where it comes from
    has_exits: bool  # else the heads of all stages but the last are still to be fitted

    @property
    def num_stages(self) -> int:
        return len(self.model.stages)


@dataclass(frozen=True, slots=True)
class WholeModel:
    """A classifier of another kind, as one graph, and what an export must know of it.

    The graph takes float32 (B, 3, H, W), normalised, and gives logits (B, C) and nothing else; B is free.
    """

    graph: onnx.ModelProto
    answer: Callable[[FloatArray], FloatArray]  # normalised pixels -> logits by other means: PyTorch, or the file as it came
    preprocess: PreprocessSpec
    labels: tuple[str, ...]
    weights_sha256: str
    origin: str  # what it is called where it comes from

    @property
    def num_stages(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Published:
    """The stages of a published version, in fp32; or of several, one after the other, as they are."""

    graphs: tuple[onnx.ModelProto, ...]
    stages: tuple[StageSpec, ...]
    preprocess: PreprocessSpec
    labels: tuple[str, ...]
    weights_sha256: str
    origin: str  # its name and number, and what it was made from
    token_reduction: str  # that it has already
    fitting_images_sha256: str  # that its exits were fitted on
    variant: str = "fp32"
    targets: tuple[HardwareTarget, ...] | None = None  # None: wherever a variant of that name may run
    fitted_on: tuple[str, ...] = ()  # sha256 of image sets that can certify nothing: the graphs themselves were fitted on them

    @property
    def num_stages(self) -> int:
        return len(self.stages)


Loaded = Network | WholeModel | Published


@dataclass(frozen=True, slots=True)
class Asked:
    """How a network of our own is wanted, where not as it comes; other networks come in one piece as they are.

    boundaries: numbers of blocks after which a stage ends; none: one stage.
    image_size, patch_size: pixels, square; None: as it was trained. Positions and the patch embedding are resampled.
    """

    boundaries: tuple[int, ...] = ()
    image_size: int | None = None
    patch_size: int | None = None

    @property
    def other_size(self) -> bool:
        """Whether pictures or patches are of another size than the network was trained with."""
        return self.image_size is not None or self.patch_size is not None


AS_IT_IS = Asked()


class Source(Protocol):
    """Knows where a network is."""

    def load(self) -> Loaded:
        """Read it.

        Raises:
            SourceError, WeightsError: it cannot be used.
        """
        ...


def own_network(state: dict[str, Tensor], told: Told, asked: Asked) -> MultiExitViT:
    """`models.vit_state.network_of`, for a user.

    Raises:
        SourceError: the boundaries do not fit the depth, or patches do not fill the picture.
        WeightsError: the state dict does not fit.
    """
    told = replace(told, image_size=asked.image_size or told.image_size, patch_size=asked.patch_size)
    try:
        model = network_of(state, told, asked.boundaries)
    except WeightsError:
        raise
    except ValueError as error:
        raise SourceError(str(error)) from error
    pixels, patch = model.config.image_size, model.config.patch_size
    if asked.other_size and pixels % patch > LARGEST_MARGIN * pixels:
        raise SourceError(
            f"patches of {patch} pixels leave {pixels % patch} of a picture's {pixels} unseen: say another --image-size or "
            "--patch-size"
        )
    return model


def at_size(spec: PreprocessSpec, side: int) -> PreprocessSpec:
    """The same part of a picture at another number of pixels."""
    resize = round(spec.resize * side / spec.crop[0])
    return spec.model_copy(update={"resize": resize, "crop": (side, side)})


def faults_of(error: ValidationError) -> str:
    """Where and what, of every fault."""
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
