"""ONNX Runtime behind the `StageExecutor` protocol: synchronous backends, each on a thread of its own."""

import os

# ONNX Runtime reports its use to its maker unless told not to, before it is imported; a service must not.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
