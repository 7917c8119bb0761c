"""With what something was measured: never a path, a user or a host name."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the CPU calls itself, and which it is: a virtual one tells no more of its name than the maker's line of servers."""
    try:
        told = cpuinfo.read_text()
    except OSError:
        told = ""
    name, family, model = (
        re.search(rf"^{key}\s*:\s*(.+)$", told, flags=re.MULTILINE) for key in ("model name", "cpu family", "model")
    )
    if name is None:
        return f"{platform.processor() or platform.machine()} CPU"
    return name[1].strip() + (f" (family {family[1].strip()}, model {model[1].strip()})" if family and model else "")


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
