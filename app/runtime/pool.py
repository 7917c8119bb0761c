"""N instances, one thread each, that fetch their batches when they are free (docs/adr/0021).

Many batches are done fastest by instances of one ONNX Runtime thread each, one batch by all threads together. So there may be a
wide backend beside the instances' own: whoever runs while all others are idle runs on that (docs/adr/0020).
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue

from prometheus_client import Counter

from app.log import get_logger
from app.runtime.backend import Backend, RunControl
from app.runtime.health import RunHealth
from app.types import RunEnded, Take, Work

log = get_logger(__name__)

MAX_WATCH_S = 1.0  # between two looks at whether a run does not end, and, while all fail, between two trials


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
        self._own = tuple(backends)
        self._wide = wide
        self._run_timeout_s = run_timeout_s
        self._counter = replaced
        self._backends: list[Backend] = list(dict.fromkeys([*backends, *([] if wide is None else [wide])]))  # each once
        self._health = RunHealth(self._backends)
        self._take: Take | None = None
        self._instances: list[_Instance] = []
        self._idle: list[_Instance] = []  # of those, whoever waits to be woken
        self._busy: set[_Instance] = set()  # and whoever has work
        self._watch: asyncio.TimerHandle | None = None

    @property
    def num_instances(self) -> int:
        return len(self._own)

    @property
    def failed(self) -> bool:
        """See `RunHealth.failed`."""
        return self._health.failed

    def start(self, take: Take) -> None:
        self._take = take
        self._instances = [self._start_instance(index) for index in range(len(self._own))]
        if self._run_timeout_s is not None:
            self._watch = asyncio.get_running_loop().call_later(self._watch_s, self._look)

    def wake(self) -> None:
        try:
            instance = self._idle.pop()  # the last one: its thread has slept least
        except IndexError:  # whoever is busy looks for more work before it sleeps
            return
        instance.wake()

    def end_abandoned(self) -> None:
        for instance in tuple(self._busy):
            instance.end_abandoned()

    def stop(self) -> None:
        """Look no more at whether runs end; called on the event loop, before `close`."""
        if self._watch is not None:
            self._watch.cancel()

    def close(self) -> None:
        """End the threads after the work they are in, and close the backends; called on another thread, for it waits."""
        for instance in self._instances:
            instance.close()
        for backend in self._backends:
            backend.close()

    @property
    def _watch_s(self) -> float:
        return min(MAX_WATCH_S, (self._run_timeout_s or MAX_WATCH_S) / 4)

    def _look(self) -> None:
        """Whether a run does not end."""
        self._watch = asyncio.get_running_loop().call_later(self._watch_s, self._look)
        timeout_s = self._run_timeout_s or math.inf
        for index, instance in enumerate(self._instances):
            if (work := instance.give_up(timeout_s)) is not None:
                # The thread cannot be ended; it is left to itself, and whatever it still brings is not looked at.
                log.error("a run did not end and was given up", stage=instance.stage, seconds=timeout_s)
                self._health.gave_up()
                if self._counter is not None:
                    self._counter.inc()
                self._busy.discard(instance)
                self._instances[index] = self._start_instance(index)
                work.stop(TimeoutError(f"the run of stage {instance.stage} did not end within {timeout_s:g} s"))
        self._health.try_again()

    def _start_instance(self, index: int) -> _Instance:
        if self._take is None:
            raise RuntimeError("the pool has not been started")
        choose, take = partial(self._choose, self._own[index]), partial(self._take_for_one, self._take)
        control = self._own[index].control()
        return _Instance(choose, take, control, self._health, self.wake, self._idle, self._busy, f"instance-{index}")

    def _take_for_one(self, take: Take) -> Work | None:
        return take(len(self._own) - len(self._busy) - 1)

    def _choose(self, own: Backend) -> Backend:
        """For a run that begins now."""
        return own if self._wide is None or len(self._busy) > 1 else self._wide


class _Instance:
    """A thread that fetches work and does it; while there is none it stands in `idle`, else in `busy`.

    Args:
        choose: the backend for a run that begins now.
        control: of its runs.
        health: told of each that has ended.
        wake_another: there is work, and this one is not the one to do it.
    """

    def __init__(
        self,
        choose: Callable[[], Backend],
        take: Callable[[], Work | None],
        control: RunControl,
        health: RunHealth,
        wake_another: Callable[[], None],
        idle: list[_Instance],
        busy: set[_Instance],
        name: str,
    ) -> None:
        self._choose = choose
        self._take = take
        self._control = control
        self._health = health
        self._wake_another = wake_another
        self._idle = idle
        self._busy = busy
        self._calls: SimpleQueue[None] = SimpleQueue()  # wakes it
        self._closed = False
        self._work: Work | None = None
        self._lock = threading.Lock()  # of the two that follow and `control`: a run ends, or it is ended or given up
        self._began: float | None = None  # the run that goes on now
        self._given_up = False
        self.stage = 0
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._calls.put(None)

    def close(self) -> None:
        """End the thread after the work it is in; whoever was given up is not waited for."""
        self._closed = True
        self.wake()
        self._thread.join()

    def give_up(self, timeout_s: float) -> Work | None:
        """The work whose run goes on for longer than that; None: there is none.

        What the run brings is not looked at, and the thread ends after it. The caller stops the work: the run may end as soon
        as it is told to, and nobody else does.
        """
        with self._lock:
            if not self._given_up and self._began is not None and time.monotonic() - self._began > timeout_s:
                self._given_up = self._control.terminate = True
                return self._work
            return None

    def end_abandoned(self) -> None:
        """End its run, if there is one and nobody waits for it."""
        with self._lock:  # who is aboard changes only between runs
            if self._began is not None and self._work is not None and self._work.abandoned:
                self._control.terminate = True

    def _live(self) -> None:
        while not self._closed and not self._given_up:
            work = self._take()
            if work is None:
                # Work that came before it stood among the idle woke nobody, so it looks once more.
                self._idle.append(self)
                work = self._take()
                if work is None:
                    self._calls.get()
                    continue
                try:
                    self._idle.remove(self)
                except ValueError:  # it was woken meanwhile, perhaps for other work than this
                    self._calls.get()
                    self._wake_another()
            self._busy.add(self)
            self._do(work)
            self._busy.discard(self)
            del work  # an idle thread holds on to nothing

    def _do(self, work: Work) -> None:
        self._work = work
        runs = work.go()
        try:
            self.stage, inputs = next(runs)
            while True:
                output, error = None, None
                with self._lock:
                    self._control.terminate = False
                    self._began = time.monotonic()
                try:
                    output = self._choose().run(self.stage, inputs, self._control)
                except Exception as raised:
                    error = raised
                finally:
                    with self._lock:
                        self._began = None
                        given_up, ended = self._given_up, self._control.terminate
                del inputs
                if given_up:  # its images are failed, and another thread has its place
                    runs.close()
                    return
                if output is None and ended:
                    error = RunEnded()
                else:
                    self._health.ended(self.stage, failed=error is not None)
                self.stage, inputs = runs.send(output) if output is not None else runs.throw(error or RuntimeError("no output"))
        except StopIteration:
            pass
        except BaseException as error:  # meant to end this thread, not the service
            if not self._given_up:
                work.stop(error)
        finally:
            self._work = None
