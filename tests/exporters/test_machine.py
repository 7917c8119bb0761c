"""What is told of the machine beside a measurement."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters.machine import cpu_model

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
"""


@pytest.mark.parametrize(
    ("told", "expected"),
    [(CPUINFO, "AMD EPYC (family 26, model 2)"), ("model name\t: A CPU of its own\n", "A CPU of its own")],
)
def test_a_cpu_is_told_from_others_of_its_name(tmp_path: Path, told: str, expected: str) -> None:
    """By family and model, where the system says them."""
    (tmp_path / "cpuinfo").write_text(told)
    assert cpu_model(tmp_path / "cpuinfo") == expected


def test_where_nothing_is_told_there_is_still_a_name(tmp_path: Path) -> None:
    """As on systems without the file."""
    assert cpu_model(tmp_path / "missing").endswith(" CPU")
