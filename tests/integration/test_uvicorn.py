"""Which uvicorn these tests are run with."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.e2e.servers import ROOT

pytestmark = pytest.mark.integration


def test_the_server_process_imports_the_version_that_is_asked_for() -> None:
    """The one that `make test-integration` names in `EXPECTED_UVICORN`, else the one of constraints.txt."""
    pinned = re.search(r"^uvicorn==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    program = "import uvicorn, app.http.server; print(uvicorn.__version__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert os.environ.get("EXPECTED_UVICORN", pinned[1]) == done.stdout.strip()


def test_the_oldest_version_tested_is_the_oldest_allowed() -> None:
    """The Makefile's `OLDEST_UVICORN` against the lower bound in pyproject.toml."""
    oldest = re.search(r"^OLDEST_UVICORN := (\d+\.\d+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    allowed = re.search(r'"uvicorn>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest
    assert allowed
    assert allowed[1] == oldest[1]
