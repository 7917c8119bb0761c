"""Stand-ins for a runtime, scripted by the test and held by events, and an event loop whose time is the test's own.

Images are numbers: the pixels of image 7 are `[7]`, its right answer is class 7, and what travels between stages says so
twice. So whoever got another's answer, or another's state, is found out.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from app.exits import ExitPolicy
from app.types import Array, PipelineResult, RunEnded, StageOutput, Take, Work
from models.manifest import LOGITS, PIXELS, ExitSpec, ModelManifest

NUM_STAGES = 3
NUM_CLASSES = 64
SURE, UNSURE = 7.0, 1.0  # the logit of the right class, all others 0: a probability of 0.95, and of 0.04
SURER = 0.05  # more for each number, so that no two are equally sure
THRESHOLD = 0.9
PATIENCE_S = 20.0  # after so long without an event a test waits in vain and fails; no test waits so long to pass


def pixels(number: int) -> Array:
    """The pixels of an image, without the batch axis."""
    return np.array([number], dtype=np.int64)


def make_policy(num_stages: int = NUM_STAGES, points: Sequence[Sequence[float | None]] | None = None) -> ExitPolicy:
    """Images leave where they are surer than 0.9, or by the thresholds of operating points."""
    return ExitPolicy(
        [
            ExitSpec(score="max_softmax", temperature=1.0, threshold=THRESHOLD if stage < num_stages - 1 else None)
            for stage in range(num_stages)
        ],
        points,
    )


def numbers_of(inputs: Mapping[str, Array]) -> list[int]:
    """Which images are in a batch; fails where the parts of a state belong to different images."""
    if PIXELS in inputs:
        assert inputs.keys() == {PIXELS}
        return [int(row[0]) for row in inputs[PIXELS]]
    assert inputs.keys() == {"number", "twice"}
    numbers = [int(row[0]) for row in inputs["number"]]
    assert [[2 * number, 2 * number] for number in numbers] == inputs["twice"].tolist()
    return numbers


def answer(numbers: Sequence[int], stage: int, leaves_after: Mapping[int, int]) -> StageOutput:
    """What the stage gives for these images: each is sure of its own number from the stage told on (0 if not told)."""
    logits = np.zeros((len(numbers), NUM_CLASSES), dtype=np.float32)
    for row, number in enumerate(numbers):
        logits[row, number] = SURE + SURER * number if stage >= leaves_after.get(number, 0) else UNSURE
    column = np.array(numbers, dtype=np.int64)[:, None]
    return StageOutput(logits, {"number": column, "twice": np.repeat(2 * column, 2, axis=1)})


def answered_number(result: PipelineResult) -> int:
    """Whose answer this is."""
    return int(result.probabilities.argmax())


class Clock:
    """A clock that stands until it is moved; may be moved from several threads."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


class FakeExecutor:
    """A `StageExecutor` without threads: its instances are tasks of the event loop.

    Args:
        leaves_after: per image, the stage from which on it is sure; 0 if not told.
        run_s: how long a run takes, of the loop's time.
    """

    def __init__(self, leaves_after: Mapping[int, int] | None = None, *, instances: int = 1, run_s: float = 0.0) -> None:
        self.num_instances = instances
        self.leaves_after = dict(leaves_after or {})
        self.runs: list[tuple[int, list[int]]] = []  # stage and images of each run, in the order in which they began
        self.began_at: list[float] = []  # loop time of each run
        self.running = 0
        self.most_running = 0
        self.scripted: dict[int, StageOutput | BaseException] = {}  # by stage: instead of its next run's right answers
        self._run_s = run_s
        self._held = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._held_works: dict[asyncio.Future[None], Work] = {}
        self._idle: list[asyncio.Future[None]] = []
        self._busy = 0
        self._instances: list[asyncio.Task[None]] = []

    def start(self, take: Take) -> None:
        self._instances = [asyncio.create_task(self._live(take)) for _ in range(self.num_instances)]

    def wake(self) -> None:
        if self._idle:
            self._idle.pop().set_result(None)

    def end_abandoned(self) -> None:
        for future, work in self._held_works.items():
            if work.abandoned and not future.done():
                future.set_exception(RunEnded())

    async def close(self) -> None:
        """End the instances; whatever ended one before is raised."""
        for instance in self._instances:
            instance.cancel()
        for result in await asyncio.gather(*self._instances, return_exceptions=True):
            if not isinstance(result, asyncio.CancelledError):
                raise AssertionError("an instance ended") from result

    @contextmanager
    def held(self) -> Iterator[None]:
        """No run ends while this is open."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            while self._waiting:
                self.let_one_finish()

    def let_one_finish(self) -> None:
        """End the run that began first of those held."""
        future = self._waiting.popleft()
        if not future.done():
            future.set_result(None)

    def batches(self, stage: int) -> list[list[int]]:
        """The images of each run of one stage."""
        return [numbers for at, numbers in self.runs if at == stage]

    def images(self, stage: int) -> list[int]:
        """Every image that a stage saw, in order."""
        return [number for batch in self.batches(stage) for number in batch]

    async def _live(self, take: Take) -> None:
        while True:
            work = take(self.num_instances - self._busy - 1)
            if work is None:
                called = asyncio.get_running_loop().create_future()
                self._idle.append(called)
                await called
            else:
                self._busy += 1
                await self._do(work)
                self._busy -= 1
            del work

    async def _do(self, work: Work) -> None:
        runs = work.go()
        with suppress(StopIteration):
            stage, inputs = next(runs)
            while True:
                try:
                    output = await self._run(work, stage, inputs)
                except Exception as error:
                    stage, inputs = runs.throw(error)
                except SystemExit as error:  # as a backend may raise it on its thread
                    work.stop(error)
                    return
                else:
                    stage, inputs = runs.send(output)

    async def _run(self, work: Work, stage: int, inputs: Mapping[str, Array]) -> StageOutput:
        numbers = numbers_of(inputs)
        self.runs.append((stage, numbers))
        self.began_at.append(asyncio.get_running_loop().time())
        scripted = self.scripted.pop(stage, None)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self._held:
                future = asyncio.get_running_loop().create_future()
                self._waiting.append(future)
                self._held_works[future] = work
                await future
            await asyncio.sleep(self._run_s)
        finally:
            self.running -= 1
            self._held_works = {future: held for future, held in self._held_works.items() if held is not work}
        if isinstance(scripted, BaseException):
            raise scripted
        return scripted or answer(numbers, stage, self.leaves_after)


class FakeControl:
    """A `RunControl`."""

    terminate = False


class FakeBackend:
    """A `Backend` that is held by the test and remembers what it did; `run` may be called from several threads."""

    def __init__(self, leaves_after: Mapping[int, int] | None = None) -> None:
        self.leaves_after = dict(leaves_after or {})
        self.runs: list[tuple[int, list[int]]] = []
        self.threads: list[str] = []  # that ran each of them
        self.most_running = 0
        self.warmed_up: list[int] = []
        self.warm_ups = 0
        self.warm_up_failure: Exception | None = None
        self.num_closed = 0
        self.failure: BaseException | None = None  # raised by every run
        self._running = 0
        self._changed = threading.Condition()
        self._open = threading.Event()
        self._open.set()

    def control(self) -> FakeControl:
        return FakeControl()

    def run(self, stage: int, inputs: Mapping[str, Array], control: FakeControl | None = None) -> StageOutput:
        numbers = numbers_of(inputs)
        with self._changed:
            self.runs.append((stage, numbers))
            self.threads.append(threading.current_thread().name)
            self._running += 1
            self.most_running = max(self.most_running, self._running)
            self._changed.notify_all()
        until = time.monotonic() + PATIENCE_S
        terminated = False
        while not (released := self._open.wait(0.002)) and not terminated and time.monotonic() < until:
            terminated = control is not None and control.terminate
        with self._changed:
            self._running -= 1
        if terminated and not released:
            raise ValueError("terminated")
        assert released, "held for ever"
        if self.failure is not None:
            raise self.failure
        return answer(numbers, stage, self.leaves_after)

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        self.warm_ups += 1
        if self.warm_up_failure is not None:
            raise self.warm_up_failure
        self.warmed_up.extend(batch_sizes)

    def close(self) -> None:
        self.num_closed += 1

    @contextmanager
    def held(self) -> Iterator[None]:
        """No run ends while this is open."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    async def began(self, count: int) -> None:
        """Wait until so many runs in all have begun."""
        await asyncio.to_thread(self._wait, count)

    def _wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.runs) >= count, PATIENCE_S), f"only {len(self.runs)} runs began"


async def settle() -> None:
    """Let everything that can go on without an event from outside go on."""
    for _ in range(50):  # more than the longest chain of wake-ups in a test
        await asyncio.sleep(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its time stands still while there is something to do and then jumps to the next timer.

    A wait that nothing can end any more is an error instead of a hang.
    """

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds


VIRTUAL_TIME = ("asyncio", {"loop_factory": VirtualTimeLoop})  # for the fixture `anyio_backend`


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:  # only a thread can bring something now
            events = super().select(PATIENCE_S)
            assert events, "the test waits for something that cannot happen any more"
            return events
        self._loop.jump(timeout)
        return events


def make_manifest(**changes: Any) -> ModelManifest:
    """The manifest of the fakes: three stages, variants `fp32` and `int8`; `changes` replace whole entries."""
    logits = {"name": LOGITS, "dtype": "float32", "shape": ["B", NUM_CLASSES]}
    image = {"name": PIXELS, "dtype": "uint8", "shape": ["B", 4, 4, 3]}
    state = [
        {"name": "number", "dtype": "int64", "shape": ["B", 1]},
        {"name": "twice", "dtype": "int64", "shape": ["B", 2]},
    ]
    exits = [{"score": "max_softmax", "temperature": 1.0, "threshold": threshold} for threshold in (0.9, 0.8, None)]
    body: dict[str, Any] = {
        "name": "numbers",
        "version": 1,
        "labels_file": "labels.txt",
        "golden_file": "golden.npz",
        "preprocess": {
            "resize": 4,
            "crop": [4, 4],
            "interpolation": "nearest",
            "mean": [0, 0, 0],
            "std": [1, 1, 1],
            "layout": "uint8_nhwc",
        },
        "stages": [
            {"inputs": [image], "outputs": [logits, *state], "gmacs": 1},
            {"inputs": state, "outputs": [logits, *state], "gmacs": 1},
            {"inputs": state, "outputs": [logits], "gmacs": 1},
        ],
        "variants": [
            {
                "name": name,
                "targets": targets,
                "files": [f"{name}/stage_{stage}.onnx" for stage in range(NUM_STAGES)],
                "exits": exits,
                "golden_atol": 0.001,
            }
            for name, targets in (("fp32", ["cpu", "cpu_vnni"]), ("int8", ["cpu_vnni"]))
        ],
        "provenance": {},
        **changes,
    }
    named = [body["labels_file"], body["golden_file"], *(file for v in body["variants"] for file in v["files"])]
    body.setdefault("files", dict.fromkeys(named, "0" * 64))
    return ModelManifest.model_validate_json(json.dumps(body))
