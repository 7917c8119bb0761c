"""The log is plain here too: structlog's own traceback, with all variables, takes seconds beside computing threads."""

from __future__ import annotations

from tests.app.http.conftest import log_lines

__all__ = ["log_lines"]  # an automatic fixture
