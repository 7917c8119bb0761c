"""What the recipe can be told, as frozen dataclasses: the defaults made the embedded model."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.training.augmentation import AugmentConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One network's run: one cosine cycle with warm-up."""

    epochs: int
    batch_size: int
    learning_rate: float  # the highest; for the batch size given
    weight_decay: float  # of matrices and kernels; vectors and position embeddings are spared
    warmup_fraction: float = 0.1
    label_smoothing: float = 0.1
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    muon: bool = True  # for kernels and the blocks' matrices; AdamW for all where not
    seed: int = 0
    bf16: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig(RunConfig):
    """The convolutional teacher."""

    epochs: int = 14
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedTeacherConfig(RunConfig):
    """A teacher that was trained elsewhere: few epochs, small steps, AdamW for all."""

    epochs: int = 4
    batch_size: int = 128
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    muon: bool = False
    side: int = 128  # pixels that it sees
    weights_sha256: str = ""
    num_heads: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # that it was trained with
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig(RunConfig):
    """The network with exits: Muon for kernels and the blocks' matrices, AdamW for the rest."""

    model: str = "vit_cifar10"
    first_stage_epochs: int = 8  # before all others, of the first stage alone, in a cycle of its own
    epochs: int = 16
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    exit_weights: tuple[float, ...] = (0.6, 0.8, 1.0)  # of each exit's loss, first to last
    taught_by: str = "a convolutional network"
    started_from: str = ""  # SHA-256 of another run's checkpoint, if any
    stem_from: str = ""  # SHA-256 of the convolutional network's checkpoint whose first groups the stem starts from, if any
    stored_views: int = 0  # of each image, looked at by the teacher before the training; 0: it is asked in every step
    unlabelled_per_batch: int = 0  # beside its images: further photographs, of which only the teacher's answers are known
    distillation: float = 0.7  # share of the teacher in an exit's loss; the labels have the rest
