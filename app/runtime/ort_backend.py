"""ONNX Runtime as a backend: one session per stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from app.errors import ModelInvalid, StartupError
from app.runtime.backend import RunControl
from app.runtime.targets import TargetProfile
from app.types import Array, StageOutput
from models.manifest import BATCH, LOGITS, PIXELS, ModelManifest, StageSpec, TensorSpec

ORT_TYPES = {"uint8": "tensor(uint8)", "float32": "tensor(float)", "int64": "tensor(int64)"}


class OrtBackend:
    """The stages of one variant. `run` may be called from several threads: sessions keep no state between runs.

    Raises:
        ModelInvalid: a file is not what the manifest says, or ONNX Runtime cannot read it.
        StartupError: the provider asked for is not the one the session got.
    """

    def __init__(self, directory: Path, manifest: ModelManifest, variant: str, profile: TargetProfile) -> None:
        self._stages = manifest.stages
        self._sessions = [
            _open_session(directory / file, stage, profile)
            for file, stage in zip(manifest.variant(variant).files, manifest.stages, strict=True)
        ]
        self._output_names = [[tensor.name for tensor in stage.outputs] for stage in manifest.stages]
        self._last_entry = manifest.entries[-1]  # before it the pixels go along, for the next network of a cascade

    def control(self) -> RunControl:
        """For the runs of one thread; ONNX Runtime looks at it before each node."""
        options: RunControl = ort.RunOptions()
        return options

    def run(self, stage: int, inputs: Mapping[str, Array], control: RunControl | None = None) -> StageOutput:
        """Run one stage on a batch: `inputs` are what the stage before handed over, or the pixels, each (B, ...)."""
        names = self._output_names[stage]
        taken, pixels = inputs, None
        if self._last_entry and PIXELS in inputs:
            pixels = inputs[PIXELS]
            taken = {tensor.name: inputs[tensor.name] for tensor in self._stages[stage].inputs}
        outputs = dict(zip(names, self._sessions[stage].run(names, taken, control), strict=True))
        logits = outputs.pop(LOGITS)
        if pixels is not None and stage < self._last_entry:
            outputs[PIXELS] = pixels
        return StageOutput(logits=logits, state=outputs)

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Run every stage once at each batch size, on zeros."""
        for batch_size in batch_sizes:
            for index, stage in enumerate(self._stages):
                self.run(index, {tensor.name: _zeros(tensor, batch_size) for tensor in stage.inputs})

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()


def session_options(intra_op_threads: int, *, spinning: bool = False) -> ort.SessionOptions:
    """Of every session here; whoever measures wants the same.

    Args:
        intra_op_threads: with one, the calling thread does all the work.
        spinning: the others wait for the next part of a run by spinning, which is faster where nobody else wants their cores.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; what matters is raised
    # Idle threads must not spin: other instances, decoding and the event loop need these cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _open_session(path: Path, stage: StageSpec, profile: TargetProfile) -> ort.InferenceSession:
    try:
        session = ort.InferenceSession(
            path, session_options(profile.intra_op_threads, spinning=profile.spinning), providers=list(profile.providers)
        )
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        raise ModelInvalid(f"ONNX Runtime cannot open {path.name}: {error}") from error
    session.disable_fallback()  # else a run that fails on a GPU is done again on the CPU, and all that follow, without an error
    # While opening, too, ONNX Runtime falls back to the CPU without an error, so compare with what the session really got.
    got = session.get_providers()[0]
    if got != profile.providers[0]:
        raise StartupError(
            f"target {profile.target} needs {profile.providers[0]}, but ONNX Runtime fell back to {got}: "
            "its driver or a library is missing. Mend that, or choose another FOVEA_RUNTIME__TARGET"
        )
    _compare(path, "input", session.get_inputs(), stage.inputs)
    _compare(path, "output", session.get_outputs(), stage.outputs)
    return session


def _compare(path: Path, kind: str, found: Sequence[ort.NodeArg], wanted: Sequence[TensorSpec]) -> None:
    described = {node.name: (node.type, _shape(node)) for node in found}
    expected = {tensor.name: (ORT_TYPES[tensor.dtype], tensor.shape) for tensor in wanted}
    if described != expected:
        raise ModelInvalid(f"{path.name} has the {kind}s {described}, but the manifest says {expected}")


def _shape(node: ort.NodeArg) -> tuple[int | str, ...]:
    """As the manifest writes it; a batch of a fixed size stays a number, and so is not what the manifest says."""
    return tuple(BATCH if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(node.shape))


def _zeros(tensor: TensorSpec, batch_size: int) -> Array:
    shape = [batch_size, *(size for size in tensor.shape[1:] if isinstance(size, int))]
    return np.zeros(shape, dtype=tensor.dtype)
