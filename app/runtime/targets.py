"""Hardware targets as a table: which ONNX Runtime providers, how many instances and threads (docs/adr/0009)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnxruntime

from app.errors import StartupError
from app.runtime.cpu import has_exact_int8, num_cpus
from models.manifest import HardwareTarget

# Best first; the CPU provider stands behind every other for the operators that one lacks.
PROVIDERS: dict[HardwareTarget, tuple[str, ...]] = {
    HardwareTarget.TENSORRT: ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    HardwareTarget.CUDA: ("CUDAExecutionProvider", "CPUExecutionProvider"),
    HardwareTarget.OPENVINO: ("OpenVINOExecutionProvider", "CPUExecutionProvider"),
    HardwareTarget.COREML: ("CoreMLExecutionProvider", "CPUExecutionProvider"),
    HardwareTarget.CPU_VNNI: ("CPUExecutionProvider",),
    HardwareTarget.CPU: ("CPUExecutionProvider",),
}
# Chosen by themselves, best first. TensorRT and Core ML compile for minutes at start: only when asked for by name.
AUTOMATIC = (HardwareTarget.CUDA, HardwareTarget.OPENVINO)
ON_THE_CPU = frozenset({HardwareTarget.CPU, HardwareTarget.CPU_VNNI, HardwareTarget.OPENVINO})


@dataclass(frozen=True, slots=True)
class TargetProfile:
    """How to run on one target."""

    target: HardwareTarget
    providers: tuple[str, ...]  # in ONNX Runtime's order of preference
    instances: int  # batches that run at once, a thread each
    intra_op_threads: int  # ONNX Runtime's threads of one instance
    spinning: bool = False  # its threads spin between the parts of a run, never between runs


def detect_target(available_providers: Collection[str], *, exact_int8: bool) -> HardwareTarget:
    """The best target that starts quickly, given the providers of the installed ONNX Runtime and this CPU."""
    for target in AUTOMATIC:
        if PROVIDERS[target][0] in available_providers:
            return target
    return HardwareTarget.CPU_VNNI if exact_int8 else HardwareTarget.CPU


def resolve_profile(target: str = "auto", *, instances: int = 0, intra_op_threads: int = 1) -> TargetProfile:
    """The profile for this machine.

    Args:
        target: `auto`, or the name of a target that this machine must then have.
        instances: 0 for one per CPU of the quota (divided by the threads of each), and one on an accelerator.
        intra_op_threads: of each instance.

    Raises:
        StartupError: when the target was asked for and cannot run here.
    """
    available = onnxruntime.get_available_providers()
    exact_int8 = has_exact_int8()
    chosen = detect_target(available, exact_int8=exact_int8) if target == "auto" else HardwareTarget(target)
    needed = PROVIDERS[chosen][0]
    if needed not in available:
        raise StartupError(
            f"target {chosen} needs ONNX Runtime's {needed}, and the one installed has {', '.join(available)}: "
            f"install the extra for {chosen} in an environment of its own, or set FOVEA_RUNTIME__TARGET=auto"
        )
    if chosen is HardwareTarget.CPU_VNNI and not exact_int8:
        raise StartupError("target cpu_vnni needs a CPU with VNNI (or Arm's dot product), which this one does not report")
    if not instances:
        instances = max(1, num_cpus() // intra_op_threads) if chosen in ON_THE_CPU else 1
    return TargetProfile(chosen, PROVIDERS[chosen], instances, intra_op_threads)
