"""Replay the golden pair: does this backend, on this machine, still give what the exporter saw?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from app.errors import ModelInvalid
from app.runtime.backend import Backend
from app.types import Array
from models.manifest import LOGITS, PIXELS, ModelManifest


def golden_key(variant: str, stage: int, output: str) -> str:
    """The name of a stage's output in the golden file."""
    return f"{variant}/stage_{stage}/{output}"


def verify_golden(backend: Backend, directory: Path, manifest: ModelManifest, variant: str) -> float:
    """Run every stage on the stored inputs of that stage and compare the logits.

    Every stage gets the stored state, not the one just computed, so that a difference shows where it arises.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        ModelInvalid: beyond the variant's `golden_atol`, or the file lacks an array.
    """
    atol = manifest.variant(variant).golden_atol
    worst = 0.0
    with np.load(directory / manifest.golden_file, allow_pickle=False) as golden:
        pixels = _stored(golden, PIXELS)
        inputs: dict[str, Array] = {PIXELS: pixels}
        for index, stage in enumerate(manifest.stages):
            output = backend.run(index, {tensor.name: inputs[tensor.name] for tensor in stage.inputs})
            expected = _stored(golden, golden_key(variant, index, LOGITS))
            difference = float(np.abs(output.logits - expected).max())
            if not difference <= atol:  # NaN is beyond too
                raise ModelInvalid(
                    f"variant {variant}, stage {index}: logits differ from the golden pair by {difference:.3g}, "
                    f"at most {atol:.3g} is allowed; this machine does not compute the model as it was exported"
                )
            worst = max(worst, difference)
            inputs = {PIXELS: pixels}  # for the first stage of a cascade's next network
            inputs |= {name: _stored(golden, golden_key(variant, index, name)) for name in output.state if name != PIXELS}
    return worst


def _stored(golden: np.lib.npyio.NpzFile, key: str) -> Array:
    if key not in golden:
        raise ModelInvalid(f"the golden file lacks {key!r}")
    stored: Array = golden[key]
    return stored.astype(np.float32) if stored.dtype == np.float16 else stored  # stored small, but run as it was exported
