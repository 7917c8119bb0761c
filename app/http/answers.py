"""The answer to a request that was classified: its body and its headers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import Response

from app.errors import ServiceError
from app.log import request_id
from app.service import Answer
from app.types import Prediction


def classified(answer: Answer) -> Response:
    """A good answer; see `ClassifyResponse`. It has Server-Timing where an image was classified."""
    model, rung = answer.terms.model, answer.terms.rung
    body = {
        "model": model.manifest.name,
        "version": model.manifest.version,
        "variant": model.variant,
        "quality": rung.name,
        "bound": rung.bound,
        "request_id": request_id.get(),
        "results": [answer_body(result) for result in answer.results],
    }
    predictions = [result for result in answer.results if isinstance(result, Prediction)]
    headers = {"Server-Timing": server_timing(predictions)} if predictions else None
    return Response(orjson.dumps(body), headers=headers, media_type="application/json")


def prediction_body(prediction: Prediction) -> dict[str, Any]:
    """The JSON of one image's prediction; see `ImageResult`. Seconds become milliseconds here."""
    timings = prediction.timings
    return {
        "predictions": [
            {"label": p.label, "index": p.index, "probability": _millionths(p.probability)} for p in prediction.predictions
        ],
        "exit": {
            "stage": prediction.exit.stage,
            "stages": prediction.exit.num_stages,
            "confidence": _millionths(prediction.exit.confidence),
        },
        "timings_ms": {
            "decode": _milliseconds(timings.decode_s),
            "queue": _milliseconds(sum(timings.queue_s)),
            "compute": _milliseconds(sum(timings.compute_s)),
            "total": _milliseconds(timings.total_s),
            "stages": [
                {"queue": _milliseconds(queue), "compute": _milliseconds(compute)}
                for queue, compute in zip(timings.queue_s, timings.compute_s, strict=True)
            ],
        },
    }


# Rounded by hand: `round` with digits takes four times as long, and an answer has a dozen figures.


def _millionths(value: float) -> float:
    return int(value * 1e6 + 0.5) / 1e6


def _milliseconds(seconds: float) -> float:
    return int(seconds * 1e6 + 0.5) / 1e3


def answer_body(answer: Prediction | ServiceError) -> dict[str, Any]:
    """The JSON of one image's answer, good or bad."""
    if isinstance(answer, ServiceError):
        return {"error": {"code": answer.code, "detail": str(answer)}}
    return prediction_body(answer)


def server_timing(predictions: Sequence[Prediction]) -> str:
    """The Server-Timing header (W3C) of the image that took longest: decode, queue, compute of each stage, total."""
    chosen = max(predictions, key=_total_s) if len(predictions) > 1 else predictions[0]
    slowest = chosen.timings
    text = f"decode;dur={1000 * slowest.decode_s:.3f}, queue;dur={1000 * sum(slowest.queue_s):.3f}"
    # The first stage is not 0 where a cascade's first network is passed over.
    for stage, seconds in enumerate(slowest.compute_s, start=chosen.exit.stage + 1 - len(slowest.compute_s)):
        text += f", stage_{stage};dur={1000 * seconds:.3f}"
    return f"{text}, total;dur={1000 * slowest.total_s:.3f}"


def _total_s(prediction: Prediction) -> float:
    return prediction.timings.total_s
