"""Times of ONNX graphs, all of them in turn, so that a busy machine slows them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort

from app.types import Array
from models.manifest import PIXELS


def session(model: onnx.ModelProto, *, threads: int = 1) -> ort.InferenceSession:
    """With the options of the service's own sessions."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def milliseconds_per_image(
    graphs: Mapping[str, onnx.ModelProto], pixels: Array, *, batch_sizes: Sequence[int] = (1, 4, 8), rounds: int = 7
) -> dict[str, tuple[float, int]]:
    """Median time of an image at the best batch size, and that size; one thread.

    Args:
        graphs: of one stage each, by name.
        pixels: (N, ...), what they take; N at least the largest batch.
    """
    sessions = {name: session(graph) for name, graph in graphs.items()}
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):  # the first warms up
        for batch_size in batch_sizes:
            batch = np.ascontiguousarray(pixels[:batch_size])
            for name, each in sessions.items():
                started = time.perf_counter()
                each.run(None, {PIXELS: batch})
                if turn:
                    seconds.setdefault((name, batch_size), []).append((time.perf_counter() - started) / batch_size)
    best: dict[str, tuple[float, int]] = {}
    for (name, batch_size), times in seconds.items():
        median = 1000 * statistics.median(times)
        if name not in best or median < best[name][0]:
            best[name] = median, batch_size
    return best
