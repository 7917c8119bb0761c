"""Where and with what a benchmark ran: never a path, a user or a host name."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil

from app import __version__
from app.runtime.cpu import has_exact_int8, num_cpus
from exporters.machine import cpu_model, installed, kernel

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "numpy", "pillow", "uvicorn", "uvloop")
_TAKES_A_PLACE = {"--images": "DIR", "--url": "URL", "--output": "FILE"}  # options whose value is not told

_OURS = frozenset({"FOVEA_HTTP__HOST", "FOVEA_HTTP__PORT"})  # the benchmark chooses them


def facts(root: Path) -> dict[str, str]:
    """Date, machine, versions and commit, in the order to print them."""
    load, _, _ = os.getloadavg()
    return {
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Machine": f"{cpu_model()}, {num_cpus()} of {os.cpu_count()} CPUs, "
        f"int8 dot product: {'yes' if has_exact_int8() else 'no'}, {psutil.virtual_memory().total / 2**30:.0f} GiB memory",
        "Other load": f"load average {load:.2f} over the minute before the start",
        "Versions": f"fovea {__version__}, Python {platform.python_version()}, {installed(PACKAGES)}, {kernel()}",
        "Commit": _commit(root),
    }


def command_line(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command that repeats this, with DIR for folders and URL for addresses, settings of the environment first."""
    words = [
        f"{key}={_hidden(value)}" for key, value in sorted(environment.items()) if key.startswith("FOVEA_") and key not in _OURS
    ]
    words += ["python", "-m", "tests.bench"]
    placeholder: str | None = None
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if placeholder is not None:
            words.append(placeholder)
            placeholder = None
        elif name in _TAKES_A_PLACE and equals:
            words.append(f"{name}={_TAKES_A_PLACE[name]}")
        else:
            words.append(_hidden(argument))
            placeholder = _TAKES_A_PLACE.get(argument)
    return " ".join(words)


def _hidden(value: str) -> str:
    return "DIR" if "/" in value or "\\" in value else value


def _commit(root: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit}, with uncommitted changes" if git("status", "--porcelain") else commit
    except (OSError, subprocess.CalledProcessError):
        return "none (not a git checkout, or nothing committed yet)"
