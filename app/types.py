"""The frozen dataclasses that travel between modules, and what scheduling knows of a runtime. Times in seconds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
EncodedImage = bytes | Callable[[], bytes]  # or what makes them, which is called on a decode thread and may raise RequestError


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What one run of one stage gives for a batch of B images."""

    logits: FloatArray  # (B, C)
    state: Mapping[str, Array]  # what the next stage takes, each (B, ...); empty after the last stage


@dataclass(frozen=True, slots=True)
class ExitInfo:
    """Where an image left, and how sure the model was there."""

    stage: int
    num_stages: int
    confidence: float


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """One image's way through the stages it needed."""

    probabilities: FloatArray  # (C,), calibrated by the exit's temperature
    exit: ExitInfo
    queue_s: tuple[float, ...]  # wait before each stage it went through
    compute_s: tuple[float, ...]  # run time of the batch it was in, per stage


@dataclass(frozen=True, slots=True)
class RunTime:
    """One run of a stage: how many images it had, and how long it took."""

    images: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One line of an answer."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one image's time went."""

    decode_s: float
    queue_s: tuple[float, ...]
    compute_s: tuple[float, ...]
    total_s: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one image."""

    predictions: tuple[LabelScore, ...]
    exit: ExitInfo
    timings: Timings


StageRun = Callable[[int, Mapping[str, Array]], Awaitable[StageOutput]]


class StageExecutor(Protocol):
    """All that scheduling knows of a runtime."""

    @property
    def num_instances(self) -> int:
        """How many batches can run at once."""
        ...

    def slot(self) -> AbstractAsyncContextManager[StageRun]:
        """Wait for a free instance and borrow it; first come, first served."""
        ...
