"""The public JSON: bodies of requests and answers. `app.http.answers` writes answers directly; tests hold them to these."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.request import Parameters

EXAMPLE_PNG = (  # a red square of 8 x 8 pixels, so that the example in the API page works when it is sent
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFElEQVR4nGO44uCPFTEMLQlscQwAyP5jAV5wjGUAAAAASUVORK5CYII="
)


class ClassifyFields(BaseModel):
    """Parameters that may stand in the body instead of the query."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="Model to use; unset: the default one.")
    version: int | None = Field(None, ge=1, description="Version of the model; unset: the highest loaded.")
    top_k: int | None = Field(None, description="How many classes to answer with; unset: 5, or all if there are fewer.")
    quality: str | None = Field(
        None, description="Operating point: full, balanced, or one that the model adds; unset: its default."
    )
    min_quality: str | None = Field(
        None,
        description="Last operating point that may be used instead when there is much to do; unset: the quality itself, or "
        "where none is named, the model's own floor.",
    )
    timeout_ms: int | None = Field(
        None,
        ge=1,
        description="Time budget in milliseconds, upload included; unset: the model's own. Also as the header "
        "X-Request-Timeout-Ms.",
    )

    def parameters(self) -> Parameters:
        """For the use case."""
        return Parameters(self.model, self.version, self.top_k, self.quality, self.min_quality, self.timeout_ms)


class ClassifyJson(ClassifyFields):
    """A request with images in JSON."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"images": [EXAMPLE_PNG], "top_k": 3}]})

    images: list[str] = Field(description="Each an encoded image (JPEG, PNG, ...) in base64; a data: URL is accepted too.")


class LabelScoreBody(BaseModel):
    label: str
    index: int = Field(description="Number of the class, from 0.")
    probability: float = Field(description="Calibrated on images that were not trained on.")


class ExitBody(BaseModel):
    stage: int = Field(description="The stage after which the image left, from 0.")
    stages: int = Field(description="How many stages the model has.")
    confidence: float = Field(description="The score of the exit, 0 .. 1.")


class StageTimingsBody(BaseModel):
    queue: float = Field(description="Wait for a batch of this stage.")
    compute: float = Field(description="Run of the batch the image was in.")


class TimingsBody(BaseModel):
    decode: float = Field(description="Decoding and preprocessing; with the wait for a thread, where threads do only that.")
    queue: float = Field(description="All waits for a batch.")
    compute: float = Field(description="All runs.")
    total: float = Field(description="From the arrival of the request's head to the answer, the upload of the body included.")
    stages: list[StageTimingsBody] = Field(description="One for each stage the image went through.")


class ErrorBody(BaseModel):
    code: str
    detail: str


class ImageResult(BaseModel):
    """One image's answer: either predictions, exit and timings, or an error."""

    predictions: list[LabelScoreBody] | None = None
    exit: ExitBody | None = None
    timings_ms: TimingsBody | None = None
    error: ErrorBody | None = None


class ClassifyResponse(BaseModel):
    """One result per image, in the order of the request."""

    model: str
    version: int
    variant: str
    quality: str = Field(description="The operating point that was used.")
    bound: str = Field(description="What it costs at most against the full depth, in words; empty where that is not proved.")
    request_id: str | None
    results: list[ImageResult]


class QualityBody(BaseModel):
    """An operating point."""

    name: str
    default: bool = Field(description="Used when a request names none.")
    thresholds: list[float | None] = Field(description="Of each early exit; null: nobody leaves there.")
    bound: str = Field(description="What it costs at most against the full depth, in words; empty where that is not proved.")
    certificate: dict[str, Any] | None = Field(description="The bound in figures, and how it is known; null: not proved.")


class StageCostBody(BaseModel):
    """What a run of a stage takes lately: a fixed time, and one for each image."""

    batch_size: int = Field(description="Most images in a run.")
    fixed_ms: float
    per_image_ms: float


class ModelBody(BaseModel):
    """A loaded version."""

    name: str
    version: int
    default: bool = Field(description="Used when a request names no model and no version.")
    ready: bool
    target: str = Field(description="Hardware target it runs on.")
    instances: int = Field(description="Batches that run at once, a thread each.")
    intra_op_threads: int = Field(description="ONNX Runtime threads of one instance.")
    variant: str = Field(description="Precision it runs at.")
    variant_reason: str = Field(description="Why this variant.")
    stages: int
    classes: int
    labels: list[str]
    gmacs_by_stage: list[float] = Field(description="10^9 multiply-adds per image, of each stage alone.")
    stage_costs: list[StageCostBody] = Field(description="What a run of each stage takes, as fitted to the last ones.")
    exits: list[dict[str, Any]] = Field(description="Score, temperature and threshold of each exit.")
    qualities: list[QualityBody] = Field(description="Operating points that a request may ask for, most faithful first.")
    provenance: dict[str, str]


class ModelsResponse(BaseModel):
    models: list[ModelBody]


class Problem(BaseModel):
    """RFC 9457, application/problem+json."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None
