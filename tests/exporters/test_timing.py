"""Ways are timed in turns on the same images; energy is told where the machine tells it; stages as the service takes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from app.exits import ExitPolicy
from app.types import StageOutput
from exporters.timing import TIMED_BATCH, TIMED_ROUNDS, EnergyMeter, cost_per_image, in_batches
from models.manifest import PIXELS, ExitSpec


def test_ways_are_taken_in_turns() -> None:
    """Each as often as the others, and never twice running; the meter of another machine is not asked."""
    calls: list[tuple[str, int]] = []
    pixels = np.zeros((40, 2), dtype=np.uint8)
    ways = {name: lambda x, name=name: calls.append((name, len(x))) for name in "ab"}

    costs = cost_per_image(ways, pixels, EnergyMeter(Path("nowhere")))

    assert [name for name, _ in calls] == ["a", "b"] * (1 + TIMED_ROUNDS)
    assert {count for _, count in calls[2:]} == {40}
    assert all(cost.ms >= 0 and cost.cpu_ms >= 0 and cost.joules is None for cost in costs.values())


def package(root: Path, number: int, now: int, largest: int = 1_000_000_000) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{now}\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")
    return folder


def test_energy_is_the_sum_of_all_packages(tmp_path: Path) -> None:
    """A counter that began anew is seen through; parts of a package are not counted again."""
    package(tmp_path, 0, 5_000_000)
    package(tmp_path, 1, 999_000_000)
    (package(tmp_path, 0, 5_000_000).parent / "intel-rapl:0:0").mkdir()
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    package(tmp_path, 0, 7_000_000)
    package(tmp_path, 1, 1_000_000)

    assert meter.works
    assert meter.joules_since(before) == pytest.approx(2 + 2)


def test_a_machine_that_does_not_tell_its_energy(tmp_path: Path) -> None:
    """There is no counter, or it may not be read."""
    assert EnergyMeter(tmp_path).joules_since(EnergyMeter(tmp_path).read()) is None
    (package(tmp_path, 0, 1) / "energy_uj").unlink()
    meter = EnergyMeter(tmp_path)
    assert not meter.works
    assert meter.joules_since(meter.read()) is None


class Counting:
    """Two stages; the first is sure of images whose pixel is 1."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    def run(self, stage: int, inputs: Mapping[str, np.ndarray]) -> StageOutput:
        values = inputs[PIXELS if stage == 0 else "tokens"]
        self.batches.append((stage, len(values)))
        logits = np.where(values[:, :1] == 1, [[9.0, 0.0]], [[0.1, 0.0]]).astype(np.float32)
        return StageOutput(logits=logits, state={"tokens": values} if stage == 0 else {})

    def warm_up(self, batch_sizes: object) -> None: ...

    def close(self) -> None: ...


def test_survivors_are_batched_anew() -> None:
    """As the service does it; at the full depth nobody leaves, and a stage for which there is nobody is not run."""
    exits = [
        ExitSpec(score="max_softmax", temperature=1, threshold=0.9),
        ExitSpec(score="max_softmax", temperature=1, threshold=None),
    ]
    pixels = (np.arange(2 * TIMED_BATCH) % 2).astype(np.float32)[:, None]
    for policy, images, expected in (
        (ExitPolicy(exits), pixels, [(0, TIMED_BATCH), (0, TIMED_BATCH), (1, TIMED_BATCH)]),
        (None, pixels, [(0, TIMED_BATCH), (0, TIMED_BATCH), (1, TIMED_BATCH), (1, TIMED_BATCH)]),
        (ExitPolicy(exits), np.ones((3, 1), np.float32), [(0, 3)]),
    ):
        backend = Counting()
        in_batches(backend, 2, policy)(images)
        assert backend.batches == expected
