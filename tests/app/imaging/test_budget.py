"""The decode budget: never more at once than allowed, in turn, and given back whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from app.errors import ImageTooLarge, InvalidImage
from app.imaging.budget import DecodeBudget, NeedsTime
from app.imaging.preprocess import load_pixels
from tests.images import make_jpeg, make_png, truncated
from tests.peak_memory import SPEC

PATIENCE_S = 10


class Holders:
    """Threads that hold a share each until told to end."""

    def __init__(self, budget: DecodeBudget) -> None:
        self.budget = budget
        self.order: list[str] = []
        self._pool = ThreadPoolExecutor(8)
        self._ends: dict[str, threading.Event] = {}
        self._begun: dict[str, threading.Event] = {}
        self._futures: dict[str, Future[None]] = {}

    def start(self, name: str, num_bytes: int) -> None:
        """Returns when the thread has its share, or has taken its place in the queue."""
        waiting = len(self.budget._waiting)
        self._ends[name], self._begun[name] = threading.Event(), threading.Event()
        self._futures[name] = self._pool.submit(self._hold, name, num_bytes)
        while not self._begun[name].is_set() and len(self.budget._waiting) == waiting:
            self._begun[name].wait(0.001)

    def has(self, name: str) -> bool:
        return self._begun[name].is_set()

    def end(self, name: str) -> None:
        self._ends[name].set()
        self._futures[name].result(PATIENCE_S)

    def wait_for(self, name: str) -> None:
        assert self._begun[name].wait(PATIENCE_S)

    def close(self) -> None:
        for event in self._ends.values():
            event.set()
        self._pool.shutdown()

    def _hold(self, name: str, num_bytes: int) -> None:
        with self.budget.hold(num_bytes):
            self.order.append(name)
            self._begun[name].set()
            assert self._ends[name].wait(PATIENCE_S)


@pytest.fixture
def holders() -> Iterator[Holders]:
    holders = Holders(DecodeBudget(100))
    yield holders
    holders.close()


def test_shares_that_fit_are_held_at_once(holders: Holders) -> None:
    """Up to the last byte."""
    for name, num_bytes in [("a", 60), ("b", 39), ("c", 1)]:
        holders.start(name, num_bytes)
        assert holders.has(name)


def test_a_share_that_does_not_fit_waits_for_others_to_end(holders: Holders) -> None:
    """Until enough is free, however many have to end for that."""
    holders.start("a", 60)
    holders.start("b", 30)
    holders.start("large", 100)
    assert not holders.has("large")

    holders.end("a")
    assert not holders.has("large")
    holders.end("b")

    holders.wait_for("large")


def test_nobody_is_overtaken(holders: Holders) -> None:
    """A small one behind a large one that waits takes its turn, or small ones could keep the large one waiting for ever."""
    holders.start("first", 60)
    holders.start("large", 100)
    holders.start("small", 10)
    assert not holders.has("small")

    holders.end("first")
    holders.wait_for("large")
    assert not holders.has("small")
    holders.end("large")

    holders.wait_for("small")
    assert holders.order == ["first", "large", "small"]


def test_several_that_fit_begin_together(holders: Holders) -> None:
    """What one gives back may be enough for many."""
    holders.start("first", 100)
    for name in ("a", "b", "c"):
        holders.start(name, 30)

    holders.end("first")

    for name in ("a", "b", "c"):
        holders.wait_for(name)


def test_more_than_the_whole_budget_is_refused_at_once_with_both_numbers() -> None:
    """Also while others hold all of it: waiting would not help."""
    budget = DecodeBudget(100)

    with ExitStack() as stack:
        stack.enter_context(budget.hold(100))
        with pytest.raises(ImageTooLarge, match=r"101 bytes.* 100 "):
            stack.enter_context(budget.hold(101))


@pytest.mark.parametrize("num_threads", [8])
def test_the_budget_is_never_overdrawn_and_always_ends_full(num_threads: int) -> None:
    """Many threads, shares of all sizes."""
    budget, lock, held, most = DecodeBudget(100), threading.Lock(), 0, 0

    def work(seed: int) -> None:
        nonlocal held, most
        for step in range(200):
            num_bytes = 1 + (seed * 37 + step * 53) % 100
            with budget.hold(num_bytes):
                with lock:
                    held += num_bytes
                    most = max(most, held)
                with lock:
                    held -= num_bytes

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_threads)))

    assert most <= 100
    with budget.hold(100):
        pass


def test_an_image_gives_its_share_back_when_it_is_decoded_and_when_it_is_broken() -> None:
    """There is room for one at a time; were a share lost, the next call would wait for ever."""
    budget = DecodeBudget(8 * 2**20)
    for data in (make_jpeg(), make_png()):
        assert load_pixels(data, SPEC, max_pixels=10**6, budget=budget).shape == (224, 224, 3)
        with pytest.raises(InvalidImage):
            load_pixels(truncated(data, 0.7), SPEC, max_pixels=10**6, budget=budget)

    with budget.hold(budget.max_bytes):
        pass


def test_an_image_over_the_budget_is_refused() -> None:
    """By its header."""
    with pytest.raises(ImageTooLarge, match="memory"):
        load_pixels(make_png(), SPEC, max_pixels=10**6, budget=DecodeBudget(10**6))


def test_who_cannot_wait_is_told_so() -> None:
    """At once, and nothing is held for it."""
    budget = DecodeBudget(10)
    with budget.hold(8):
        with pytest.raises(NeedsTime), budget.hold(3, wait=False):
            pass
        with budget.hold(2, wait=False):
            pass
    with budget.hold(10, wait=False):
        pass
