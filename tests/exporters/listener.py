"""A progress that remembers what it was told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from exporters.progress import Progress

T = TypeVar("T")


class Listener(Progress):
    """Steps and what was tracked to its end."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.tracked: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def track(self, items: Sequence[T], what: str) -> Iterator[T]:
        yield from items
        self.tracked.append(what)
