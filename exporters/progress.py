"""How long work says how far it is: steps, and within a step how many of how many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

T = TypeVar("T")


class Progress:
    """Says nothing."""

    def step(self, text: str) -> None:
        """Something begins, or was found."""

    def track(self, items: Sequence[T], what: str) -> Iterator[T]:
        """The items, one after the other."""
        del what
        yield from items


SILENT = Progress()


class ConsoleProgress(Progress):
    """A line per step, and a bar with the time left under them while something is tracked."""

    def __init__(self, console: Console, bars: Bars) -> None:
        self._console, self._bars = console, bars

    @classmethod
    @contextmanager
    def on(cls, console: Console) -> Iterator[ConsoleProgress]:
        """While the block runs."""
        columns = TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Bars(*columns, console=console, transient=True) as bars:
            yield cls(console, bars)

    def step(self, text: str) -> None:
        """A line that stays."""
        self._console.print(f"· {escape(text)}", soft_wrap=True, highlight=False)

    def track(self, items: Sequence[T], what: str) -> Iterator[T]:
        """A bar that goes when all are done."""
        task = self._bars.add_task(escape(what), total=len(items))
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)
