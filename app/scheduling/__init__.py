"""Admission, dynamic batching and the staged pipeline: asyncio, and nothing of images or ONNX."""
