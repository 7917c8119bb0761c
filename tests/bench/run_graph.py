"""`python -m tests.bench.run_graph FILE`: time and memory of one graph, in a process that imports as little as the service."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import psutil

from app.runtime.ort_backend import session_options
from models.manifest import PIXELS


def main(file: str) -> None:
    """Print the median milliseconds of one image, and MiB at the peak beyond what the process has without the graph."""
    process = psutil.Process()
    before = process.memory_info().rss
    session = ort.InferenceSession(file, session_options(1), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    pixels = np.random.default_rng(0).integers(0, 256, (1, *taken.shape[1:]), dtype=np.uint8)
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 1.0 and len(seconds) < 30):
        started = time.perf_counter()
        session.run(None, {PIXELS: pixels})
        seconds.append(time.perf_counter() - started)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    peak_mib = int(peak.split()[1]) / 1024 - before / 2**20
    print(json.dumps({"ms": 1000 * statistics.median(seconds[1:]), "peak_mib": peak_mib}))


if __name__ == "__main__":
    main(sys.argv[1])
