"""Which target this machine is, and that one which cannot run is refused in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.errors import StartupError
from app.runtime import targets
from app.runtime.targets import PROVIDERS, detect_target, resolve_profile
from models.manifest import HardwareTarget

CPU, CUDA, OPENVINO = "CPUExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider"
TENSORRT, COREML = "TensorrtExecutionProvider", "CoreMLExecutionProvider"
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this machine another one."""

    def make(*providers: str, exact_int8: bool = False, cpus: int = 8) -> None:
        monkeypatch.setattr(targets.onnxruntime, "get_available_providers", lambda: list(providers))
        monkeypatch.setattr(targets, "has_exact_int8", lambda: exact_int8)
        monkeypatch.setattr(targets, "num_cpus", lambda: cpus)

    return make


@pytest.mark.parametrize(
    ("providers", "exact_int8", "expected"),
    [
        ([CPU], False, HardwareTarget.CPU),
        ([CPU], True, HardwareTarget.CPU_VNNI),
        ([CUDA, CPU], True, HardwareTarget.CUDA),
        ([OPENVINO, CPU], True, HardwareTarget.OPENVINO),
        ([OPENVINO, CUDA, CPU], False, HardwareTarget.CUDA),
        ([TENSORRT, CUDA, CPU], False, HardwareTarget.CUDA),
        ([COREML, CPU], False, HardwareTarget.CPU),
    ],
)
def test_the_best_target_that_starts_quickly_is_detected(
    providers: list[str], exact_int8: bool, expected: HardwareTarget
) -> None:
    """TensorRT and Core ML compile for minutes, so they are never chosen unasked."""
    assert detect_target(providers, exact_int8=exact_int8) is expected


def test_every_target_has_providers() -> None:
    """The table is complete, and behind every provider stands the CPU's."""
    assert set(PROVIDERS) == set(HardwareTarget)
    assert {providers[-1] for providers in PROVIDERS.values()} == {CPU}


@pytest.mark.parametrize(
    ("target", "providers", "intra_op_threads", "expected"),
    [
        ("auto", [CPU], 1, 8),
        ("auto", [CPU], 3, 2),
        ("auto", [CPU], 16, 1),
        ("auto", [CUDA, CPU], 1, 1),
        ("openvino", [OPENVINO], 2, 4),
    ],
)
def test_instances_fill_the_quota(
    machine: Machine, target: str, providers: list[str], intra_op_threads: int, expected: int
) -> None:
    """On the CPU one per CPU, divided by the threads of each and at least one; on an accelerator one."""
    machine(*providers, cpus=8)

    profile = resolve_profile(target, intra_op_threads=intra_op_threads)

    assert (profile.instances, profile.intra_op_threads) == (expected, intra_op_threads)


def test_instances_asked_for_are_taken(machine: Machine) -> None:
    """The operator knows better."""
    machine(CUDA, CPU, cpus=8)

    assert resolve_profile("auto", instances=5).instances == 5


def test_the_profile_has_the_providers_of_its_target(machine: Machine) -> None:
    """In ONNX Runtime's order of preference."""
    machine(TENSORRT, CUDA, CPU)

    assert resolve_profile("tensorrt").providers == (TENSORRT, CUDA, CPU)


def test_a_target_without_its_provider_is_refused(machine: Machine) -> None:
    """The message names what is missing, what there is, and the way out."""
    machine(CPU)

    with pytest.raises(StartupError, match=r"target cuda needs .*CUDAExecutionProvider.* has CPUExecutionProvider.*=auto"):
        resolve_profile("cuda")


def test_cpu_vnni_is_refused_on_a_cpu_without_it(machine: Machine) -> None:
    """INT8 would saturate without a word there."""
    machine(CPU, exact_int8=False)

    with pytest.raises(StartupError, match="cpu_vnni needs a CPU with VNNI"):
        resolve_profile("cpu_vnni")


def test_cpu_is_to_be_had_on_a_cpu_with_vnni(machine: Machine) -> None:
    """To compare, or to be sure of fp32."""
    machine(CPU, exact_int8=True)

    assert resolve_profile("cpu").target is HardwareTarget.CPU
