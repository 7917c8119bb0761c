"""With what something was measured: never a path, a user or a host name."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the CPU calls itself."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else f"{platform.processor() or platform.machine()} CPU"


def kernel() -> str:
    """The operating system, and the first two numbers of its kernel."""
    return f"{platform.system()} {'.'.join(platform.release().split('-')[0].split('.')[:2])}"


def installed(packages: Sequence[str]) -> str:
    """Those that are there, with their versions."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
