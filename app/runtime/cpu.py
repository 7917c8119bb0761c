"""What this process may use of the CPU: its quota, and whether its int8 dot products are exact and fast."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path, PurePosixPath

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")
# x86: VNNI multiplies u8 by s8 and adds in 32 bits in one step. Arm: the dot-product extension does.
EXACT_INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "asimddp"})
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last on Arm


def num_cpus(cgroup_root: Path = CGROUP_ROOT, own_cgroup: Path = OWN_CGROUP) -> int:
    """CPUs this process may keep busy: its affinity, capped by the cgroup quota rounded up; at least 1.

    A container's quota is not what `os.cpu_count` says: that is the host's count, and threads sized from it are
    throttled together (onnxruntime#29510).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(cgroup_root, own_cgroup)
    return max(1, affinity if quota is None else min(affinity, math.ceil(quota)))


def has_exact_int8(cpuinfo: Path = CPUINFO) -> bool:
    """True where u8 x s8 products are summed without saturating, so that INT8 is both faithful and fast.

    Older x86 (AVX2, AVX-512 without VNNI) adds pairs of products in 16 bits and saturates. Where the flags cannot be
    read the answer is no, except on Apple silicon, which always has the dot-product extension.
    """
    flags = _flags(cpuinfo)
    if flags is None:
        return platform.system() == "Darwin" and platform.machine() == "arm64"
    return bool(flags & EXACT_INT8_FLAGS)


def has_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """True where products of bfloat16 are faster than those of float32; False where that cannot be told."""
    return bool((_flags(cpuinfo) or set()) & BF16_FLAGS)


def _flags(cpuinfo: Path) -> set[str] | None:
    """What the CPU says it can do; None where it is not to be read."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return None
    flags: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
    return flags


def _cgroup_quota(root: Path, own_cgroup: Path) -> float | None:
    """CPUs' worth of time this process gets, by cgroup v2 or v1; None when it is not limited or not to be read.

    A limit of any group above counts too. In a container the path may be the host's while the root shows the
    container's own group: what does not exist below the root is passed over.
    """
    quotas = [
        quota
        for controller, path in _own_groups(own_cgroup)
        for group in (path, *path.parents)
        for quota in (_quota_of(root / controller / group.relative_to("/")),)
        if quota is not None
    ]
    return min(quotas, default=None)


def _own_groups(own_cgroup: Path) -> list[tuple[str, PurePosixPath]]:
    """(directory of the hierarchy below the root, path of this process in it), for v2 and for v1's cpu controller."""
    groups = [("", PurePosixPath("/")), ("cpu", PurePosixPath("/"))]  # where there is nothing to read
    try:
        lines = own_cgroup.read_text().splitlines()
    except OSError:
        return groups
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/") and (not controllers or "cpu" in controllers.split(",")):
            groups.append((controllers, PurePosixPath(path)))
    return groups


def _quota_of(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
