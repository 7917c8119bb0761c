"""N instances, one thread each; lent to coroutines first come, first served (docs/adr/0006).

Many batches are done fastest by instances of one ONNX Runtime thread each, one batch by all threads together. So there may be a
wide backend beside the instances' own: whoever is lent an instance while no other is out runs on that (docs/adr/0020).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from prometheus_client import Counter

from app.errors import InferenceFailed
from app.log import get_logger
from app.runtime.backend import Backend
from app.threads import Workers
from app.types import Array, StageOutput, StageRun

log = get_logger(__name__)

MAX_GIVEN_UP = 8  # threads that may be stuck for ever: beyond it the process is not to be trusted any more


class BackendPool:
    """Implements `StageExecutor`.

    Args:
        backends: one per instance; the same one may stand several times where it may run on several threads.
        wide: for a batch that has the machine to itself; None: the instances' own.
        run_timeout_s: a run that takes longer is given up, and its instance gets a new thread.
        replaced: counts those.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        wide: Backend | None = None,
        *,
        run_timeout_s: float | None = None,
        replaced: Counter | None = None,
    ) -> None:
        if not backends:
            raise ValueError("a pool needs at least one backend")
        self._backends = tuple(dict.fromkeys([*backends, *([] if wide is None else [wide])]))
        self._replaced = 0

        def give_up() -> None:
            self._replaced += 1
            if replaced is not None:
                replaced.inc()

        self._instances = [
            _Instance(backend, wide or backend, index, run_timeout_s, give_up) for index, backend in enumerate(backends)
        ]
        self._idle = list(self._instances)
        # A fair semaphore, not an asyncio.Queue of instances: there the loop that returns one takes it again before
        # the waiting loop has woken, and the later stages starve.
        self._free = asyncio.Semaphore(len(self._instances))

    @property
    def num_instances(self) -> int:
        return len(self._instances)

    @property
    def failed(self) -> bool:
        """So many runs never ended that a restart is the better way."""
        return self._replaced >= MAX_GIVEN_UP

    def slot(self) -> AbstractAsyncContextManager[StageRun]:
        """Wait for a free instance and borrow it."""
        return _Slot(self._free, self._idle, len(self._instances))

    def close(self) -> None:
        """End the threads after the runs they are in, and close the backends."""
        for instance in self._instances:
            instance.thread.close()
        for backend in self._backends:
            backend.close()


class _Slot(AbstractAsyncContextManager[StageRun]):
    """One loan. A class, not a generator made into a context manager: that costs a tenth of a small batch's whole way."""

    __slots__ = ("_free", "_idle", "_lent", "_num_instances")

    def __init__(self, free: asyncio.Semaphore, idle: list[_Instance], num_instances: int) -> None:
        self._free = free
        self._idle = idle
        self._num_instances = num_instances

    async def __aenter__(self) -> StageRun:
        await self._free.acquire()
        self._lent = self._idle.pop()
        alone = len(self._idle) == self._num_instances - 1
        return self._lent.run_alone if alone else self._lent.run

    async def __aexit__(self, *_: object) -> None:
        self._idle.append(self._lent)
        self._free.release()


class _Instance:
    def __init__(
        self, backend: Backend, wide: Backend, index: int, run_timeout_s: float | None, on_given_up: Callable[[], None]
    ) -> None:
        self._backend = backend
        self._wide = wide
        self._index = index
        self._run_timeout_s = run_timeout_s
        self._on_given_up = on_given_up
        self.thread = Workers(1, f"instance-{index}")

    async def run(self, stage: int, inputs: Mapping[str, Array]) -> StageOutput:
        return await self._run(self._backend, stage, inputs)

    async def run_alone(self, stage: int, inputs: Mapping[str, Array]) -> StageOutput:
        return await self._run(self._wide, stage, inputs)

    async def _run(self, backend: Backend, stage: int, inputs: Mapping[str, Array]) -> StageOutput:
        try:
            async with asyncio.timeout(self._run_timeout_s):
                return await self.thread.run(backend.run, stage, inputs)
        except TimeoutError as error:
            # The thread cannot be ended; it is left to itself, and whatever it still brings is not looked at.
            log.error("a run did not end and was given up", stage=stage, seconds=self._run_timeout_s)
            self.thread.abandon()
            self.thread = Workers(1, f"instance-{self._index}")
            self._on_given_up()
            raise InferenceFailed(f"the run of stage {stage} did not end within {self._run_timeout_s:g} s") from error
