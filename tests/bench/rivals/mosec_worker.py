"""mosec (`pip install mosec`): a process that decodes, one per core that runs batches of up to 8 on one thread.

`MODEL=stage_0.onnx python tests/bench/rivals/mosec_worker.py --port 8982`; a network of 224 pixels a side, uint8 (B, H, W, 3).
"""

from __future__ import annotations

import io
import os

import numpy as np
import onnxruntime as ort
from mosec import Server, Worker  # type: ignore[import-not-found]
from PIL import Image


class Decode(Worker):  # type: ignore[misc]
    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        return np.asarray(image.crop((left, top, left + 224, top + 224)))


class Infer(Worker):  # type: ignore[misc]
    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def forward(self, batch: list[np.ndarray]) -> list[dict[str, int]]:
        (logits,) = self.session.run(None, {self.input: np.stack(batch)})
        return [{"label": int(label)} for label in logits.argmax(axis=1)]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Decode, num=1)
    server.append_worker(Infer, num=os.cpu_count() or 1, max_batch_size=8, max_wait_time=10)
    server.run()
