"""The programs and packages that the tests here need: skipped where one is missing, and failed in CI, where none may be."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from typing import NoReturn

import pytest

TIMEOUT_S = 60.0
PROGRAMS = {  # how each says its version, and the first one that will do
    "javac": ("--version", 17),  # stands for the whole JDK: `java Post.java` compiles
    "node": ("--version", 18),  # the first with fetch
    "go": ("version", 1),
    "curl": ("--version", 7),
}


def require_program(name: str) -> None:
    """End the test here unless the program is installed.

    Args:
        name: a key of `PROGRAMS`.
    """
    argument, least = PROGRAMS[name]
    if shutil.which(name) is None:
        _missing(f"{name} is not installed")
    done = subprocess.run([name, argument], capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    version = re.search(r"\d+", done.stdout)
    if done.returncode or version is None or int(version[0]) < least:
        said = (done.stdout or done.stderr).partition("\n")[0]
        _missing(f"{name} {least} or later is not installed; the one here says: {said}")


def require_package(name: str) -> None:
    """End the test here unless Python finds the package."""
    if importlib.util.find_spec(name) is None:
        _missing(f"the Python package {name} is not installed")


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and in CI everything must run", pytrace=False)
    pytest.skip(what)
