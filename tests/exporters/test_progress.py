"""Long work shows how far it is, and leaves nothing on the screen but its steps."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from exporters.progress import SILENT, ConsoleProgress


def test_nobody_listening_changes_nothing() -> None:
    """The items come, in their order."""
    assert [*SILENT.track([3, 1, 2], "counting")] == [3, 1, 2]
    SILENT.step("silent")


def test_steps_stay_and_bars_go() -> None:
    """While it runs the bar says what, how many of how many and how long still; an error takes it away too."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with ConsoleProgress.on(console) as progress:
        progress.step("reading")
        assert [*progress.track(range(3), "pictures")] == [0, 1, 2]
        for item in (tracked := progress.track(range(5), "layers")):
            if item == 2:
                shown = [(task.description, task.completed, task.total) for task in progress._bars.tasks]
                with pytest.raises(RuntimeError):
                    tracked.throw(RuntimeError("broken"))
        left = list(progress._bars.tasks)

    assert shown == [("layers", 2, 5)]
    assert left == []
    assert "· reading" in console.file.getvalue()
