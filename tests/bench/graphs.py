"""Times of ONNX graphs, all of them in turn, so that a busy machine slows them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort

from app.runtime.ort_backend import session_options
from app.types import Array
from models.manifest import PIXELS


def session(model: onnx.ModelProto, *, threads: int = 1) -> ort.InferenceSession:
    """With the options of the service's own sessions."""
    return ort.InferenceSession(model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"])


def milliseconds_per_image(
    networks: Mapping[str, Sequence[onnx.ModelProto]],
    pixels: Array,
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    rounds: int = 7,
) -> dict[str, tuple[float, int]]:
    """Median time of an image at the best batch size, and that size; one thread.

    Args:
        networks: the graphs of their stages, by name; every image goes through all of them.
        pixels: (N, ...), what they take; N at least the largest batch.
    """
    sessions = {name: [session(graph) for graph in graphs] for name, graphs in networks.items()}
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):  # the first warms up
        for batch_size in batch_sizes:
            batch = np.ascontiguousarray(pixels[:batch_size])
            for name, each in sessions.items():
                started = time.perf_counter()
                _run(each, batch)
                if turn:
                    seconds.setdefault((name, batch_size), []).append((time.perf_counter() - started) / batch_size)
    best: dict[str, tuple[float, int]] = {}
    for (name, batch_size), times in seconds.items():
        median = 1000 * statistics.median(times)
        if name not in best or median < best[name][0]:
            best[name] = median, batch_size
    return best


def _run(stages: Sequence[ort.InferenceSession], batch: Array) -> None:
    outputs: dict[str, Array] = {PIXELS: batch}
    for stage in stages:
        names = [node.name for node in stage.get_outputs()]
        wanted = {node.name: outputs[node.name] for node in stage.get_inputs()}
        outputs = dict(zip(names, stage.run(names, wanted), strict=True))
