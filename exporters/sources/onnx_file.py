"""A classifier that its owner has as an ONNX file already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from app.types import FloatArray
from exporters.sources.base import SourceError, WholeModel
from exporters.sources.preprocessor import preprocessing_of
from exporters.whole_graph import GraphError, classifier, height_and_width, logits_of, simplified
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
            raise SourceError(f"{self.file.name} is no ONNX model: {str(error).strip().splitlines()[0]}") from error
        try:
            graph = classifier(model)
            spec = preprocessing_of(self.preprocessor, height_and_width(graph))
            probe = np.random.default_rng(0).normal(size=(BATCH, 3, *spec.crop)).astype(np.float32)
            try:
                num_classes = logits_of(simplified(graph), probe).shape[-1]
            except GraphError as error:
                raise SourceError(
                    f"{self.file.name} cannot take {BATCH} pictures at once: export it with a free batch axis ({error})"
                ) from error
        except GraphError as error:
            raise SourceError(f"{self.file.name}: {error}") from error
        if num_classes != len(self.labels):
            raise SourceError(f"there are {len(self.labels)} labels, and {self.file.name} has {num_classes} classes")

        def answer(pixels: FloatArray) -> FloatArray:
            return logits_of(graph, pixels, at_once=False)

        return WholeModel(simplified(graph), answer, spec, self.labels, sha256_of(self.file), self.file.name)
