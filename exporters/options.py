"""What commands have in common: the same options, and texts of options read and written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from exporters.config import BoundConfig, ExitConfig, ExportConfig, QuantizationConfig
from exporters.images import ImageSetError
from exporters.sources.base import AS_IT_IS, Asked, Source, SourceError
from exporters.sources.folder import find, from_folder
from exporters.sources.onnx_file import OnnxSource
from exporters.sources.timm_vit import TimmSource
from exporters.sources.zoo import ZooSource
from models.zoo import ZOO


class ScoreName(StrEnum):
    """As `models.manifest.ExitSpec` has them."""

    MAX_SOFTMAX = "max_softmax"
    MARGIN = "margin"
    ENTROPY = "entropy"
    PATIENCE = "patience"


INT8 = QuantizationConfig()  # what it is asked for by default
USUAL_FAST_DROP, USUAL_CONFIDENCE = 2.0, 95.0
USUAL_SCORE = ScoreName(ExitConfig().score)

Agreement = Annotated[
    float,
    typer.Option(min=0, max=100, help="Percent of the images whose answer INT8 may not change: layers stay in fp32 for it."),
]
Fp32Share = Annotated[
    float, typer.Option(min=0, max=100, help="Percent of the multiply-adds that stay in fp32 for that, at most.")
]
MaxDrop = Annotated[float, typer.Option(min=0, max=99, help="Points of accuracy that exits may cost.")]
FastDrop = Annotated[
    float, typer.Option(min=0, max=99, help="Points that the operating point `fast` may cost; no more than --max-drop: none.")
]
Score = Annotated[
    ScoreName,
    typer.Option(
        help="How sure an exit is: by its probabilities, or, with patience, first by how many exits in a row agree.",
    ),
]
Confidence = Annotated[
    float,
    typer.Option(
        min=0,
        max=99.5,
        help="Percent, with which that is proved where there are images enough: half of them are set apart. 0: not proved.",
    ),
]
Recover = Annotated[
    Path | None,
    typer.Option(
        exists=True, help="Folder or zip of photographs of anything: with fewer tokens it learns to answer as before."
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The options of all commands that publish a version; shares in percent, as they are said."""

    model: str
    version: int
    repository: Path
    calibration: Path
    test: Path
    unlabelled: bool
    folders: Path | None
    max_drop: float
    fast_drop: float
    confidence: float
    score: ScoreName = USUAL_SCORE
    target_agreement: float = 100 * INT8.target_agreement
    max_fp32_share: float = 100 * INT8.max_fp32_share

    def config(self, source: Source, provenance: Mapping[str, str], command: str) -> ExportConfig:
        """What they ask for.

        Args:
            provenance: what is stated of the network's data, training and licence.
            command: for the card.
        """
        return ExportConfig(
            name=self.model,
            source=source,
            calibration_images=self.calibration,
            test_images=self.test,
            repository=self.repository,
            version=self.version,
            unlabelled=self.unlabelled,
            folders=numbered(self.folders),
            quantization=replace(INT8, target_agreement=self.target_agreement / 100, max_fp32_share=self.max_fp32_share / 100),
            exits=ExitConfig(score=self.score.value, max_accuracy_drop=self.max_drop / 100),
            bound=self._bound(),
            fast_drop=self.fast_drop / 100,
            data=provenance.get("data", "not stated"),
            training=provenance.get("training", "not stated"),
            licence=provenance.get("licence", "not stated"),
            command=command,
        )

    def command(self, name: str, options: Mapping[str, object], flags: Mapping[str, bool] | None = None) -> str:
        """As `repeated`, with further options of its own."""
        every: dict[str, object] = {
            "--model": self.model,
            "--version": self.version,
            **options,
            "--max-drop": f"{self.max_drop:g}",
            **self._where_other(),
            "--folders": self.folders,
            "--calibration": self.calibration,
            "--test": self.test,
        }
        return repeated(name, every, {**(flags or {}), "--unlabelled": self.unlabelled})

    def _bound(self) -> BoundConfig | None:
        """None where nothing is to be proved, or nothing can be: a loss of zero."""
        if not self.max_drop or not self.confidence:
            return None
        return BoundConfig(epsilon=self.max_drop / 100, delta=1 - self.confidence / 100)

    def _where_other(self) -> dict[str, str]:
        """What was asked for, where it is not what is asked for by default."""
        asked = {
            "--target-agreement": (self.target_agreement, 100 * INT8.target_agreement),
            "--max-fp32-share": (self.max_fp32_share, 100 * INT8.max_fp32_share),
            "--fast-drop": (self.fast_drop, USUAL_FAST_DROP),
            "--confidence": (self.confidence, USUAL_CONFIDENCE),
        }
        other = {option: f"{value:g}" for option, (value, usual) in asked.items() if value != usual}
        return other if self.score is USUAL_SCORE else {**other, "--score": self.score.value}


def repeated(name: str, options: Mapping[str, object], flags: Mapping[str, bool]) -> str:
    """The command for the card: files by name only, no folders of this machine."""
    words = ["python", "-m", "exporters", name]
    for option, value in options.items():
        if value is not None:
            words += [option, value.name if isinstance(value, Path) else str(value)]
    return shlex.join([*words, *(flag for flag, given in flags.items() if given)])


def numbers(text: str | None) -> tuple[int, ...]:
    """Of blocks.

    Raises:
        SourceError: something else stands there.
    """
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise SourceError(f"{text!r} are no numbers of blocks; say --boundaries 4,8,12") from error


def numbered(folders: Path | None) -> dict[str, int] | None:
    """The class of each folder: its line."""
    return None if folders is None else {folder: number for number, folder in enumerate(lines(folders))}


def lines(path: Path) -> list[str]:
    """Of a file, without what ends them."""
    return path.read_text().rstrip("\n").split("\n")


def named_paths(texts: list[str]) -> dict[str, Path]:
    """Of NAME=PATH.

    Raises:
        ImageSetError: nothing is there.
    """
    paths = {name: Path(path) for name, _, path in (text.partition("=") for text in texts)}
    if missing := [name for name, path in paths.items() if not path.exists()]:
        raise ImageSetError(f"there are no images called {', '.join(missing)}; say --also NAME=PATH")
    return paths


def source_of(
    model: str,
    weights: Path | None,
    timm_config: Path | None,
    labels: Path | None,
    checkpoint: str | None,
    asked: Asked,
    stages: int | None = None,
) -> tuple[Source, tuple[str, ...]]:
    """What the options name, and the labels of its classes.

    Raises:
        SourceError: they do not go together, or nothing is there.
    """
    names = () if labels is None else tuple(lines(labels))
    if stages is not None and (checkpoint is not None or timm_config is not None):
        raise SourceError("--stages is for networks of the zoo, which come with exits; cut others with --boundaries")
    if checkpoint is not None:
        return from_folder(find(checkpoint), names, asked)
    if weights is None:
        raise SourceError("say --weights FILE, --checkpoint FOLDER or --onnx FILE")
    if timm_config is not None:
        if labels is None:
            raise SourceError("with --timm-config say the classes' labels too: --labels FILE, one a line")
        return TimmSource(weights, timm_config, names, asked), names
    if model not in ZOO:
        raise SourceError(f"no network called {model!r}; there are {', '.join(sorted(ZOO))}, or say --timm-config")
    if asked != AS_IT_IS:
        raise SourceError("a network of the zoo is exported as it was trained: its stages and sizes are its own")
    return ZooSource(model, weights, stages), ZOO[model].labels


def onnx_source(file: Path, preprocessor: Path | None, labels: Path | None) -> tuple[Source, tuple[str, ...]]:
    """Of an ONNX file, and the labels of its classes.

    Raises:
        SourceError: what it does not tell is not told.
    """
    if preprocessor is None or labels is None:
        raise SourceError("with --onnx say --preprocessor FILE and --labels FILE: a graph tells neither")
    names = tuple(lines(labels))
    return OnnxSource(file, preprocessor, names), names
