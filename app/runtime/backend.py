"""What a backend is to the pool: synchronous; `run` may be called from several threads at once (docs/adr/0003)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from app.types import Array, StageOutput


class RunControl(Protocol):
    """Of the runs of one thread, which follow each other."""

    terminate: bool  # set on any thread: the run that goes on raises as soon as the engine looks at it


class Backend(Protocol):
    """Runs the stages of one variant."""

    def control(self) -> RunControl:
        """For one thread."""
        ...

    def run(self, stage: int, inputs: Mapping[str, Array], control: RunControl | None = None) -> StageOutput:
        """Run one stage on a batch; raises whatever the engine raises."""
        ...

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Run every stage at these batch sizes, so that the first request pays for no allocation."""
        ...

    def close(self) -> None:
        """Free what the engine holds; the backend cannot run afterwards."""
        ...
