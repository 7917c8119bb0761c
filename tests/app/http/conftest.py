"""The application in this process, as fixtures."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import structlog

from app.log import configure
from tests.app.http.served import WAYS, Gate, Served, going, make_settings, running

LogLines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FOVEA_")]:
        monkeypatch.delenv(name)


@pytest.fixture(params=WAYS)
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """What holds for the application alone holds behind its server."""
    with going(request.param):
        yield


@pytest.fixture
async def served(tiny_repository: Path) -> AsyncIterator[Served]:
    """The application with the tiny model."""
    async with running(make_settings(tiny_repository)) as served:
        yield served


@pytest.fixture
async def served_over_socket(tiny_repository: Path) -> AsyncIterator[Served]:
    """The same, behind its server."""
    with going("over a socket"):
        async with running(make_settings(tiny_repository)) as served:
            yield served


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Holds, fails and counts the runs of every backend opened from now on; open at first."""
    return Gate().installed(monkeypatch)


@pytest.fixture(autouse=True)
def log_lines() -> Iterator[LogLines]:
    """The log as the service writes it, in JSON: every line so far."""
    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()
    stream = StringIO()
    with redirect_stderr(stream):
        configure("info", "json")
    root.handlers += handlers  # pytest's own
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers, root.level = handlers, level
    structlog.configure(**config)
