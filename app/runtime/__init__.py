"""ONNX Runtime behind the `StageExecutor` protocol: synchronous backends, each on a thread of its own."""
