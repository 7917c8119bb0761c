"""A plain FastAPI app: decode, run, answer; ONNX Runtime with all cores, as it comes.

`MODEL=stage_0.onnx uvicorn tests.bench.rivals.plain_fastapi:app --port 8981`, of 224 pixels a side, uint8 (B, H, W, 3).
"""

from __future__ import annotations

import io
import os

import anyio.to_thread
import numpy as np
import onnxruntime as ort
from fastapi import FastAPI, Request
from PIL import Image

app = FastAPI()
session = ort.InferenceSession(os.environ["MODEL"], providers=["CPUExecutionProvider"])
INPUT = session.get_inputs()[0].name


def classify(data: bytes) -> int:
    """The class of an encoded image."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)))
    (logits,) = session.run(None, {INPUT: pixels[None]})
    return int(logits[0].argmax())


@app.post("/v1/classify")
async def post(request: Request) -> dict[str, int]:
    return {"label": await anyio.to_thread.run_sync(classify, await request.body())}
