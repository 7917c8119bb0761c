"""What travels between modules, and what scheduling knows of a runtime. Times in seconds.

What is made for every image is a named tuple: a frozen dataclass takes 0.5 µs to make instead of 0.2. `LabelScore` cannot be
one: it has an `index`, and so have tuples.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
EncodedImage = bytes | Callable[[], bytes]  # or what makes them, which is called where it is decoded and may raise RequestError


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What one run of one stage gives for a batch of B images."""

    logits: FloatArray  # (B, C)
    state: Mapping[str, Array]  # what the next stage takes, each (B, ...); empty after the last stage


class ExitInfo(NamedTuple):
    """Where an image left, and how sure the model was there."""

    stage: int
    num_stages: int
    confidence: float


class PipelineResult(NamedTuple):
    """One image's way through the stages it needed."""

    probabilities: FloatArray  # (C,), calibrated by the exit's temperature
    exit: ExitInfo
    queue_s: tuple[float, ...]  # wait before each stage it went through
    compute_s: tuple[float, ...]  # run time of the batch it was in, per stage
    decode_s: float = 0.0  # where the pipeline decoded it


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


class Timings(NamedTuple):
    """Where one image's time went."""

    decode_s: float
    queue_s: tuple[float, ...]
    compute_s: tuple[float, ...]
    total_s: float


class Prediction(NamedTuple):
    """The answer for one image."""

    predictions: tuple[LabelScore, ...]
    exit: ExitInfo
    timings: Timings


StageRun = tuple[int, Mapping[str, Array]]  # which stage, and what it takes


class RunEnded(Exception):
    """A run was ended before it was done, because nobody waited for it any more."""


class Work(Protocol):
    """What an instance does at a time."""

    @property
    def abandoned(self) -> bool:
        """Nobody waits any more for the run it is in. Asked on any thread."""
        ...

    def go(self) -> Generator[StageRun, StageOutput, None]:
        """Yields each run that it needs and is sent what came of it; a run's error, or `RunEnded`, is thrown in."""
        ...

    def stop(self, error: BaseException) -> None:
        """It does not go on: a run raised what is no `Exception`, or never ended. Called in its place, on any thread."""
        ...


Take = Callable[[int], Work | None]  # the next work for an instance, beside so many that are idle; called on its thread


class StageExecutor(Protocol):
    """All that scheduling knows of a runtime: instances that fetch their work when they are free."""

    @property
    def num_instances(self) -> int:
        """How many batches can run at once."""
        ...

    def start(self, take: Take) -> None:
        """Begin to fetch work; called once, on the event loop."""
        ...

    def wake(self) -> None:
        """There is work: if an instance is idle, it fetches it."""
        ...

    def end_abandoned(self) -> None:
        """End the runs whose work is abandoned, as far as the runtime can; called on the event loop."""
        ...
