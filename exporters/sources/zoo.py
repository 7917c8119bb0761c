"""A network of the zoo, with the weights of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporters.sources.base import Network, SourceError
from models.multi_exit import first_stages
from models.weights import load_weights
from models.zoo import ZOO, create_model


@dataclass(frozen=True, slots=True)
class ZooSource:
    """Name in the zoo, and a file of weights: `.safetensors`, or a training checkpoint."""

    name: str
    weights: Path
    stages: int | None = None  # the first so many; None: all

    def load(self) -> Network:
        """Read the weights into the network of that name.

        Raises:
            ValueError: there is no network of that name.
            SourceError: it has not so many stages.
            WeightsError: the file does not fit.
        """
        model = create_model(self.name)
        sha256 = load_weights(model, self.weights)
        model.eval()
        if self.stages is not None:
            try:
                model = first_stages(model, self.stages)
            except ValueError as error:
                raise SourceError(str(error)) from error
        entry = ZOO[self.name]
        return Network(model, entry.preprocess, entry.labels, sha256, f"{self.name} of the zoo", has_exits=True)
