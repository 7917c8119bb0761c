"""Where the time of a graph goes: by operator, from ONNX Runtime's own profile."""

from __future__ import annotations

import collections
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from app.runtime.ort_backend import session_options
from app.types import Array


def milliseconds_by_operator(model: Path | bytes, inputs: Mapping[str, Array], *, runs: int = 12) -> dict[str, float]:
    """Milliseconds an image that each kind of operator takes, most first; one thread.

    Args:
        model: the graph's file, or its bytes.
        inputs: one batch of each, (B, ...).
        runs: how many there are; of each node the median counts.
    """
    count = len(next(iter(inputs.values())))
    options = session_options(1)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        profiled = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            profiled.run(None, dict(inputs))
        events = json.loads(Path(profiled.end_profiling()).read_text())
    microseconds: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            microseconds.setdefault((event["name"], event["args"]["op_name"]), []).append(event["dur"])
    found: collections.defaultdict[str, float] = collections.defaultdict(float)
    for (_, kind), each in microseconds.items():
        found[kind] += statistics.median(each) / 1000 / count
    return dict(sorted(found.items(), key=lambda each: -each[1]))
