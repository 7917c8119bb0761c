"""A classifier that its owner has as an ONNX file already."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from app.types import FloatArray
from exporters.sources.base import SourceError, WholeModel
from exporters.sources.preprocessor import preprocessing_of
from exporters.whole_graph import GraphError, classifier, first_line, height_and_width, logits_of, simplified
from models.weights import sha256_of

BATCH = 2  # that a graph must be able to take


@dataclass(frozen=True, slots=True)
class OnnxSource:
    """A file, how pictures are prepared for it, and what its classes are called.

    Args:
        file: one input, float32 (batch, 3, height, width), normalised; one output, logits or probabilities (batch, classes).
        preprocessor: transformers' `preprocessor_config.json`, or timm's `config.json`.
        labels: one per class, in the order of the output.
    """

    file: Path
    preprocessor: Path
    labels: tuple[str, ...]

    def load(self) -> WholeModel:
        """Read it, with its batch axis made free.

        Raises:
            SourceError: it is no classifier of pictures, its batch size is fixed inside, or the rest does not fit it.
        """
        try:
            model = onnx.load(self.file)
            onnx.checker.check_model(model)
        except Exception as error:  # protobuf's and the checker's errors have no common base
            raise SourceError(f"{self.file.name} is no ONNX model: {first_line(error)}") from error
        try:
            graph = simplified(classifier(model))
        except GraphError as error:
            raise SourceError(f"{self.file.name}: {error}") from error
        spec = preprocessing_of(self.preprocessor, height_and_width(graph))
        probe = np.random.default_rng(0).normal(size=(BATCH, 3, *spec.crop)).astype(np.float32)
        try:
            logits = logits_of(graph, probe)
        except GraphError as error:
            raise SourceError(
                f"{self.file.name} cannot take {BATCH} pictures at once: export it with a free batch axis ({error})"
            ) from error
        if logits.shape != (BATCH, len(self.labels)):
            raise SourceError(
                f"there are {len(self.labels)} labels, and {self.file.name} gives {logits.shape} for {BATCH} pictures"
            )
        if (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1, atol=1e-4):
            raise SourceError(
                f"{self.file.name} gives probabilities by other means than a softmax at its end: export its logits"
            )

        def answer(pixels: FloatArray) -> FloatArray:
            return logits_of(graph, pixels, at_once=False)

        return WholeModel(graph, answer, spec, self.labels, _sha256(self.file), self.file.name)


def _sha256(file: Path) -> str:
    """Of the file, and of the files beside it in which its weights lie."""
    bare = onnx.load(file, load_external_data=False)
    beside = {entry.value for tensor in bare.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    sums = [sha256_of(file), *(sha256_of(file.parent / name) for name in sorted(beside))]
    return sums[0] if len(sums) == 1 else hashlib.sha256(" ".join(sums).encode()).hexdigest()
