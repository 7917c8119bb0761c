"""What this process may use of the CPU: its quota, and whether its int8 dot products are exact and fast."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")
# x86: VNNI multiplies u8 by s8 and adds in 32 bits in one step. Arm: the dot-product extension does.
EXACT_INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "asimddp"})


def num_cpus(cgroup_root: Path = CGROUP_ROOT) -> int:
    """CPUs this process may keep busy: its affinity, capped by the cgroup quota rounded up; at least 1.

    A container's quota is not what `os.cpu_count` says: that is the host's count, and threads sized from it are
    throttled together (onnxruntime#29510).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(cgroup_root)
    return max(1, affinity if quota is None else min(affinity, math.ceil(quota)))


def has_exact_int8(cpuinfo: Path = CPUINFO) -> bool:
    """True where u8 x s8 products are summed without saturating, so that INT8 is both faithful and fast.

    Older x86 (AVX2, AVX-512 without VNNI) adds pairs of products in 16 bits and saturates. Where the flags cannot be
    read the answer is no, except on Apple silicon, which always has the dot-product extension.
    """
    try:
        text = cpuinfo.read_text()
    except OSError:
        return platform.system() == "Darwin" and platform.machine() == "arm64"
    flags: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
    return bool(flags & EXACT_INT8_FLAGS)


def _cgroup_quota(root: Path) -> float | None:
    """CPUs' worth of time this cgroup gets, v2 or v1; None when it is not limited or not to be read."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period)
