"""What an export can be told, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from exporters.sources.base import Source
from models.manifest import Certificate, ExitSpec, OperatingPoint


@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """Images for the ranges of INT8 activations."""

    num_images: int = 1024
    batch_size: int = 64
    # Channels of a linear layer's input that may stay fp32, and how much smaller the range must become for that: one of eight
    # bits, or two where it takes more channels.
    outliers: tuple[tuple[int, float], ...] = ((2, 2.0), (8, 4.0))


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """What INT8 may cost, at the last exit, on the fitting images; beyond it nothing is published."""

    min_agreement: float = 0.95  # share of images with the same class as in fp32
    max_accuracy_drop: float = 0.01
    target_agreement: float = 0.98  # layers are left in fp32 until it is reached
    max_fp32_share: float = 0.2  # of the multiply-adds, in those layers
    agreement_images: int = 512
    sensitivity_images: int = 32  # of which one layer at a time is INT8


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """How a schedule of token reduction is found."""

    num_images: int = 64
    first_images: int = 16  # of them, on which every candidate is tried
    kept: float = 0.25  # of the candidates, tried on all
    covered: float = 0.9  # share of the images that lose nothing above a threshold
    tolerance: float = 0.05  # of the smallest change of the answer: as good, for which fewer reductions are preferred


@dataclass(frozen=True, slots=True)
class ExitConfig:
    """How exits are fitted."""

    score: str = "max_softmax"
    max_accuracy_drop: float = 0.005  # allowed on the fitting images, against taking every image to the last exit
    labelled: bool = True  # else the labels are the network's own answers, which say nothing of how sure the last exit may be


@dataclass(frozen=True, slots=True)
class BoundConfig:
    """What is to be proved of exits (`exporters.certificate`)."""

    epsilon: float = 0.005  # largest loss of accuracy, a share of the images
    delta: float = 0.05  # largest probability that it is more
    seed: int = 0  # of the draw of the images that are set apart


@dataclass(frozen=True, slots=True)
class Tried:
    """What a search for operating points measured of one way, on the images that it chose by."""

    what: str
    ms_per_image: float
    lost: float  # share of the images


@dataclass(frozen=True, slots=True)
class Chosen:
    """Operating points that were chosen before the export, for a network whose stages they fit."""

    exits: tuple[ExitSpec, ...]
    certificate: Certificate | None
    points: tuple[OperatingPoint, ...]
    bounds: Mapping[str, str]  # of each point, in words
    tried: tuple[Tried, ...] = ()  # what they were chosen among


@dataclass(frozen=True, slots=True)
class ExitHeadConfig:
    """How the heads of a network that came without exits are fitted."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 128
    noise: float = 0.1  # of each feature, relative: a few hundred images are soon known by heart
    max_steps: int = 3000
    look_every: int = 25  # steps
    patience: int = 500  # steps without a better agreement
    held_out: float = 0.2  # of the images
    min_held_out: int = 10
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """One export: what, from which weights, with which images, to where."""

    name: str  # of the published model
    source: Source
    calibration_images: Path  # folder or zip of <class>/<file>; never part of the training images
    test_images: Path  # the same form; only ever measured on
    repository: Path
    version: int
    unlabelled: bool = False  # calibration and test images have no labels: the network's own answers in fp32 stand for them
    folders: Mapping[str, int] | None = None  # the class of each folder of images; None: folders are labels
    other_images: Mapping[str, Path] = field(default_factory=dict)  # by name: measured too, and only that
    other_folders: Mapping[str, int] | None = None  # likewise, of those
    better_than_chance: bool = True  # refuse images to fit on that the network does not know
    int8: bool = True
    qdq: bool = False  # INT8 for OpenVINO too, as QDQ pairs
    fp16: bool = False  # for GPUs
    reduction: str | None = None  # a schedule as `exporters.reduction_schedule` reads it
    recovery: Path | None = None  # photographs of anything, from which a reduced network learns its former answers again
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    exits: ExitConfig = field(default_factory=ExitConfig)
    bound: BoundConfig | None = None  # None: exits are fitted, and nothing is proved
    chosen: Chosen | None = None  # instead of exits that are fitted
    receipt: bool = False  # `report.html` too (`exporters.receipt`)
    fast_drop: float = 0.02  # what the operating point `fast` may lose; not more than the exits themselves may: no such point
    mirror: bool = False  # a last exit that sees the mirror image too (`exporters.mirror`)
    exit_heads: ExitHeadConfig = field(default_factory=ExitHeadConfig)
    licence: str = "not stated"
    data: str = ""  # one sentence on the training data, for the model card
    training: str = ""  # one sentence on the training, for the model card
    command: str = ""  # that made it

    def having_learned(self, said: Sequence[str]) -> ExportConfig:
        """With that in the card, and no more to learn."""
        return replace(self, training="; ".join(filter(None, [self.training, *said])), recovery=None)
