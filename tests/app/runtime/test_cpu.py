"""What a container may use is its quota, not its host; INT8 is trusted only where the CPU says that it is exact."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.runtime.cpu import has_bf16, has_exact_int8, num_cpus

HOST_CPUS = 16
X86 = "processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nflags\t\t: fpu sse2 avx2 avx512f {}\nbugs\t\t: avx_vnni\n\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm crc32 {}\nCPU implementer\t: 0x41\n\n"


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may run on sixteen CPUs."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(HOST_CPUS)), raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, HOST_CPUS),
        ({"cpu.max": "6400000 100000\n"}, HOST_CPUS),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, HOST_CPUS),
        ({"cpu.max": "torn\n", "cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "300000\n"}, HOST_CPUS),
        ({}, HOST_CPUS),
    ],
    ids=[
        "v2",
        "v2 rounded up",
        "v2 a tenth",
        "v2 no limit",
        "v2 above the host",
        "v1",
        "v1 no limit",
        "both",
        "v1 half",
        "none",
    ],
)
def test_the_quota_of_the_cgroup_caps_the_cpus(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """Version 2 first, then version 1; rounded up, at least one, and the affinity where there is no limit."""
    assert num_cpus(write(tmp_path, files)) == expected


def test_the_affinity_counts_where_it_is_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process bound to one CPU has one, whatever its quota."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3}, raising=False)

    assert num_cpus(write(tmp_path, {"cpu.max": "400000 100000"})) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86.format("avx512_vnni"), True),
        (X86.format("avx_vnni") * 2, True),
        (X86.format(""), False),
        (X86.format("avx512_vnni_like"), False),
        (ARM.format("asimddp"), True),
        (ARM.format(""), False),
        ("", False),
    ],
    ids=["AVX-512 VNNI", "AVX VNNI", "no VNNI", "a longer word", "Arm dot product", "Arm without", "empty"],
)
def test_exact_int8_is_read_from_the_cpu_flags(tmp_path: Path, text: str, expected: bool) -> None:
    """Whole words of the line `flags` or `Features`; nothing of other lines counts."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)

    assert has_exact_int8(cpuinfo) is expected


@pytest.mark.parametrize(
    ("system", "machine", "expected"), [("Darwin", "arm64", True), ("Darwin", "x86_64", False), ("Linux", "aarch64", False)]
)
def test_without_cpuinfo_only_apple_silicon_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, machine: str, expected: bool
) -> None:
    """Where nothing can be read the answer is no, except on the one kind that always has the instruction."""
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)

    assert has_exact_int8(tmp_path / "absent") is expected


def test_the_tightest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    """A service unit's own group may be unlimited inside a slice that is not, and the other way round."""
    groups = {"system.slice": "300000 100000", "system.slice/fovea.service": "max 100000"}
    for name, quota in groups.items():
        (tmp_path / "cgroup" / name).mkdir(parents=True)
        (tmp_path / "cgroup" / name / "cpu.max").write_text(quota + "\n")
    own = tmp_path / "own"
    own.write_text("0::/system.slice/fovea.service\n")
    expected = min(3, len(os.sched_getaffinity(0)))

    assert num_cpus(tmp_path / "cgroup", own) == expected
    (tmp_path / "cgroup/system.slice/fovea.service/cpu.max").write_text("50000 100000\n")
    assert num_cpus(tmp_path / "cgroup", own) == 1


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    """The path is the host's and does not exist here; the root has the container's quota."""
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    own = tmp_path / "own"
    own.write_text("0::/docker/0123456789abcdef\n")

    assert num_cpus(tmp_path, own) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86.format("avx512_bf16"), True),
        (X86.format("avx512_vnni"), False),
        (ARM.format("bf16"), True),
        (ARM.format(""), False),
    ],
)
def test_bfloat16_is_used_where_the_cpu_has_it(tmp_path: Path, text: str, expected: bool) -> None:
    """And not where it cannot be told."""
    (tmp_path / "cpuinfo").write_text(text)

    assert has_bf16(tmp_path / "cpuinfo") is expected
    assert not has_bf16(tmp_path / "absent")
