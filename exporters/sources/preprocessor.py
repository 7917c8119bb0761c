"""How pictures are prepared, as a file says it that lies beside many checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from exporters.sources.base import SourceError
from exporters.sources.timm_vit import timm_preprocessing, told_by
from exporters.sources.transformers_whole import image_processor, preprocessing
from models.manifest import PreprocessSpec


def preprocessing_of(path: Path, size: tuple[int, int]) -> PreprocessSpec:
    """What transformers' `preprocessor_config.json` or timm's `config.json` says.

    Args:
        size: height and width that the network takes; another is refused.

    Raises:
        SourceError: it is neither, or says what is not supported.
    """
    try:
        told = json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"{path.name} is no JSON: {error}") from error
    if isinstance(told, dict) and "pretrained_cfg" in told:
        spec = timm_preprocessing(told_by(path).pretrained_cfg)
    else:
        spec, flipped = preprocessing(image_processor(path))
        if flipped:
            raise SourceError(f"{path.name} asks for BGR, and the service gives RGB: turn the colours inside the graph")
    if spec.crop != size:
        raise SourceError(f"{path.name} gives {spec.crop} pixels and the network takes {size}")
    return spec
