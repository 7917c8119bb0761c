"""The public JSON: what is written by hand is what the published schema says."""

from __future__ import annotations

import base64
from io import BytesIO

import pytest
from PIL import Image
from pydantic import ValidationError

from app.errors import InvalidImage
from app.http.answers import answer_body, prediction_body, server_timing
from app.http.schemas import (
    EXAMPLE_PNG,
    ClassifyFields,
    ClassifyJson,
    ImageResult,
)
from app.types import ExitInfo, LabelScore, Prediction, Timings


def make_prediction(total_s: float = 0.010) -> Prediction:
    """An image that went through two of three stages."""
    return Prediction(
        predictions=(LabelScore("owl", 24, 0.93456789), LabelScore("cat", 3, 0.02)),
        exit=ExitInfo(stage=1, num_stages=3, confidence=0.93456789),
        timings=Timings(decode_s=0.0031, queue_s=(0.001, 0.0005), compute_s=(0.002, 0.0024567), total_s=total_s),
    )


def test_a_prediction_is_written_in_milliseconds() -> None:
    """Everything of it, rounded to a microsecond and to six digits of a probability."""
    assert prediction_body(make_prediction()) == {
        "predictions": [
            {"label": "owl", "index": 24, "probability": 0.934568},
            {"label": "cat", "index": 3, "probability": 0.02},
        ],
        "exit": {"stage": 1, "stages": 3, "confidence": 0.934568},
        "timings_ms": {
            "decode": 3.1,
            "queue": 1.5,
            "compute": 4.457,
            "total": 10.0,
            "stages": [{"queue": 1.0, "compute": 2.0}, {"queue": 0.5, "compute": 2.457}],
        },
    }


def test_what_is_written_by_hand_holds_the_schema() -> None:
    """Both kinds of results, with nothing that the schema does not have."""
    for answer in (make_prediction(), InvalidImage("the JPEG ends early")):
        body = answer_body(answer)
        assert body == ImageResult.model_validate(body, strict=True).model_dump(exclude_unset=True)
    assert body == {"error": {"code": "invalid_image", "detail": "the JPEG ends early"}}


def test_server_timing_tells_of_the_slowest() -> None:
    """Its decode, queue, compute of each stage, and total."""
    header = server_timing([make_prediction(0.009), make_prediction(0.0123456), make_prediction(0.010)])
    assert header == "decode;dur=3.100, queue;dur=1.500, stage_0;dur=2.000, stage_1;dur=2.457, total;dur=12.346"


def test_the_example_is_a_red_square() -> None:
    """A broken one would greet everybody who tries the API page."""
    with Image.open(BytesIO(base64.b64decode(EXAMPLE_PNG))) as image:
        assert (image.format, image.size) == ("PNG", (8, 8))
        red, green, blue = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert red > 150
    assert max(green, blue) < 100


@pytest.mark.parametrize(
    "values",
    [{"version": 0}, {"version": 1.5}, {"top_k": "many"}, {"top_k": None, "topk": 1}, {"model": 3}, {"images": ["aaaa"]}],
)
def test_fields_that_cannot_be_meant_are_refused(values: dict[str, object]) -> None:
    """Misspelt ones above all, which would otherwise be ignored without a word."""
    with pytest.raises(ValidationError):
        ClassifyFields.model_validate(values)


def test_fields_may_come_as_text() -> None:
    """As form fields do."""
    assert ClassifyFields(model="a", version=2, top_k=3) == ClassifyFields.model_validate(
        {"model": "a", "version": "2", "top_k": "3"}
    )
    assert ClassifyJson(images=["aaaa"]) == ClassifyJson.model_validate({"images": ["aaaa"], "model": None})
