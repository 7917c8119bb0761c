"""A folder as transformers' `save_pretrained` or timm's `save_for_hf` writes it, or its name on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path

from exporters.sources.base import Asked, Source, SourceError
from exporters.sources.timm_vit import TimmSource
from exporters.sources.timm_whole import TimmWholeSource
from exporters.sources.transformers_vit import CONFIG, PREPROCESSOR, WEIGHTS, TransformersSource
from exporters.sources.transformers_whole import TransformersWholeSource

WANTED = [CONFIG, PREPROCESSOR, *WEIGHTS]
FAMILIES = ("vit", "deit")  # transformers' `model_type`s that become a network of our own, with stages

OWN = ("vit_", "deit", "cait")  # how timm's architectures begin that do


def find(name: str) -> Path:
    """The folder of that name, or a download of it.

    Raises:
        SourceError: there is no such folder, and no hub, or none that has it.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith(("/", ".")):
        raise SourceError(f"there is no folder {name}")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise SourceError(
            f"there is no folder {name}; to have it from the hub, pip install huggingface_hub, or download it elsewhere"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:  # the hub's, the network's and the disk's errors have no common base
        raise SourceError(f"there is no folder {name}, and the hub did not give it: {error}") from error


def from_folder(folder: Path, labels: tuple[str, ...], asked: Asked) -> tuple[Source, tuple[str, ...]]:
    """What is in the folder, and the labels of its classes.

    Args:
        labels: where given, those of a folder that does not name its classes itself.
        asked: stages and sizes of a network of our own, where other than as it comes.

    Raises:
        SourceError: it is not of a kind that is known, or nobody says the labels.
    """
    path = folder / CONFIG
    if not path.exists():
        raise SourceError(f"{folder.name} holds no {CONFIG}")
    try:
        told = json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"{CONFIG} is no JSON: {error}") from error
    if not isinstance(told, dict) or not {"architecture", "model_type"} & told.keys():
        raise SourceError(f"{CONFIG} is neither timm's (it has no architecture) nor transformers' (no model_type)")
    if "architecture" in told:
        return _timm(folder, told, labels, asked)
    if told["model_type"] not in FAMILIES:
        _as_it_is(asked, str(told["model_type"]), " and ".join(FAMILIES))
        whole = TransformersWholeSource(folder)
        return whole, whole.labels()
    source = TransformersSource(folder, asked)
    return source, source.labels()


def _timm(folder: Path, told: dict[str, object], labels: tuple[str, ...], asked: Asked) -> tuple[Source, tuple[str, ...]]:
    named = told.get("label_names")
    names = labels or (tuple(map(str, named)) if isinstance(named, list) else ())
    if not names:
        raise SourceError(f"{folder.name} does not name its classes: say --labels FILE, one a line")
    weights = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise SourceError(f"{folder.name} holds neither {' nor '.join(WEIGHTS)}")
    if str(told["architecture"]).startswith(OWN):
        return TimmSource(weights, folder / CONFIG, names, asked), names
    _as_it_is(asked, str(told["architecture"]), "ViT, DeiT and CaiT")
    return TimmWholeSource(weights, folder / CONFIG, names), names


def _as_it_is(asked: Asked, name: str, others: str) -> None:
    if asked.boundaries:
        raise SourceError(f"{name} is exported in one piece; --boundaries are for {others}")
    if asked.other_size:
        raise SourceError(f"{name} is exported as it is; --image-size and --patch-size are for {others}")
