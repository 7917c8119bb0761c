"""The plain loop does the work that the service does: each image goes through the stages it needs, and no more."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from app.imaging.preprocess import load_pixels
from app.types import Array, StageOutput
from models.manifest import ModelManifest
from tests.bench.inprocess import PlainLoop, decode_by_hand
from tests.images import make_jpeg, make_png, photo

NUM_STAGES = 3


class BrightnessBackend:
    """Sure of an image from the stage that its grey level names; remembers the levels each stage saw."""

    def __init__(self, *, fails: bool = False) -> None:
        self.seen: list[list[list[int]]] = [[] for _ in range(NUM_STAGES)]
        self._fails = fails
        self._lock = threading.Lock()

    def run(self, stage: int, inputs: Mapping[str, Array]) -> StageOutput:
        if self._fails:
            raise RuntimeError("the engine failed")
        levels = inputs["pixels"][:, 0, 0, 0].astype(np.float32) if stage == 0 else inputs[f"level_{stage - 1}"][:, 0]
        with self._lock:
            self.seen[stage].append(levels.astype(int).tolist())
        sure = np.where(levels <= stage, 9.0, 0.0)
        logits = np.stack([sure, np.zeros_like(sure)], axis=-1).astype(np.float32)
        return StageOutput(logits, {f"level_{stage}": levels[:, None]} if stage < NUM_STAGES - 1 else {})

    def warm_up(self, batch_sizes: Sequence[int]) -> None: ...

    def close(self) -> None: ...


def manifest() -> ModelManifest:
    """Three stages that hand on a number, two exits that ask for a probability of 0.9."""
    logits = {"name": "logits", "dtype": "float32", "shape": ["B", 2]}
    pixels = {"name": "pixels", "dtype": "uint8", "shape": ["B", 4, 4, 3]}
    levels = [{"name": f"level_{stage}", "dtype": "float32", "shape": ["B", 1]} for stage in range(NUM_STAGES - 1)]
    stages = [
        {"inputs": [pixels], "outputs": [logits, levels[0]], "gmacs": 1},
        {"inputs": [levels[0]], "outputs": [logits, levels[1]], "gmacs": 1},
        {"inputs": [levels[1]], "outputs": [logits], "gmacs": 1},
    ]
    exits = [{"score": "max_softmax", "temperature": 1, "threshold": threshold} for threshold in (0.9, 0.9, None)]
    files = [f"{stage}.onnx" for stage in range(NUM_STAGES)]
    return ModelManifest.model_validate(
        {
            "name": "levels",
            "version": 1,
            "labels_file": "labels",
            "golden_file": "golden",
            "preprocess": {
                "resize": 4,
                "crop": [4, 4],
                "interpolation": "nearest",
                "mean": [0, 0, 0],
                "std": [1, 1, 1],
                "layout": "uint8_nhwc",
            },
            "stages": stages,
            "variants": [{"name": "fp32", "targets": ["cpu"], "files": files, "exits": exits, "golden_atol": 1}],
            "files": dict.fromkeys([*files, "labels", "golden"], "0" * 64),
            "provenance": {},
        }
    )


def loop_over(levels: Sequence[int], backend: BrightnessBackend, *, threads: int = 1) -> PlainLoop:
    return PlainLoop([backend] * threads, manifest(), "fp32", images_of(levels), chunk_size=4, max_pixels=100)


def images_of(levels: Sequence[int]) -> list[bytes]:
    return [make_png(np.full((4, 4, 3), level, dtype=np.uint8)) for level in levels]


def test_only_survivors_go_on() -> None:
    """An image leaves after the first stage that is sure of it; the others keep their own state."""
    backend = BrightnessBackend()

    exits = loop_over([0], backend).classify(images_of([2, 0, 1, 0, 2]))

    assert exits.tolist() == [2, 0, 1, 0, 2]
    assert backend.seen == [[[2, 0, 1, 0, 2]], [[2, 1, 2]], [[2, 2]]]


def test_stages_nobody_needs_are_not_run() -> None:
    """When all are sure, the rest of the network costs nothing."""
    backend = BrightnessBackend()
    loop = loop_over([0, 0], backend)

    loop.latency(2)

    assert backend.seen == [[[0], [0]], [], []]


def test_threads_share_the_images() -> None:
    """Every chunk is taken once, whichever thread takes it; exit rates are over all of them."""
    backend = BrightnessBackend()

    figures = loop_over([0, 1, 2, 0], backend, threads=2).throughput(seconds=0.05)

    assert figures["exit_rates"] == [0.5, 0.25, 0.25]
    assert all(chunk == [0, 1, 2, 0] for chunk in backend.seen[0])


def test_failure_in_a_thread_is_raised() -> None:
    """A loop that does no work must not look fast."""
    with pytest.raises(RuntimeError, match="the engine failed"):
        loop_over([0], BrightnessBackend(fails=True), threads=2).throughput(seconds=0.05)


def test_decoding_by_hand_gives_the_same_image() -> None:
    """The whole picture and the reduced one differ by what reducing may cost, and not in what they show."""
    spec = manifest().preprocess.model_copy(update={"resize": 32, "crop": (32, 32), "interpolation": "bicubic"})
    data = make_jpeg(photo(400, 300))

    by_hand, served = decode_by_hand(data, spec), load_pixels(data, spec, max_pixels=10**6)

    assert by_hand.shape == served.shape
    assert np.abs(by_hand.astype(int) - served).mean() < 2  # grey levels; docs/adr/0008 has the bound
