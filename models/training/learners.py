"""What is trained and how: the convolutional teacher, and the network with exits that learns from it and from the labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.training.config import StudentConfig, TeacherConfig
from models.training.teacher import ConvTeacher
from models.zoo import ZooEntry, create_model


class TeacherLearner:
    """Cross-entropy on the labels."""

    def __init__(self, config: TeacherConfig, entry: ZooEntry) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model: nn.Module = ConvTeacher(len(entry.labels))
        self.mean, self.std = entry.preprocess.mean, entry.preprocess.std
        self.num_classes = len(entry.labels)
        self._config = config
        groups = parameter_groups(self.model.named_parameters(), config.learning_rate, config.weight_decay)
        self.optimizers: Sequence[torch.optim.Optimizer] = [
            torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True)
        ]

    def logits(self, x: Tensor) -> list[Tensor]:
        """As of one exit."""
        return [self.model(x)]

    def loss(self, logits: list[Tensor], x: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch."""
        return F.cross_entropy(logits[0], targets, label_smoothing=self._config.label_smoothing)

    def load(self, checkpoint: Path) -> None:
        """Take the weights of a finished run."""
        self.model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
        self.model.eval()


class StudentLearner:
    """All exits at once, each from the labels and from what the teacher says of the very same augmented image.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; that teacher and student must see the same
    crop: Beyer et al., Knowledge distillation: A good teacher is patient and consistent, CVPR 2022.
    """

    def __init__(self, config: StudentConfig, entry: ZooEntry, teacher: TeacherLearner | None) -> None:
        if config.distillation and teacher is None:
            raise ValueError("distillation needs a teacher; set it to 0 to learn from the labels alone")
        self.model: nn.Module = create_model(config.model, seed=config.seed)
        self.mean, self.std = entry.preprocess.mean, entry.preprocess.std
        self.num_classes = len(entry.labels)
        self._config = config
        self._teacher = teacher
        named = list(self.model.named_parameters())
        matrices = [(name, p) for name, p in named if ".blocks." in name and p.ndim == 2]
        rest = [(name, p) for name, p in named if not (".blocks." in name and p.ndim == 2)]
        self.optimizers: Sequence[torch.optim.Optimizer] = [
            # Its updates are scaled to those of AdamW, so that both share one learning rate.
            torch.optim.Muon(
                parameter_groups(matrices, config.learning_rate, config.weight_decay), adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(parameter_groups(rest, config.learning_rate, config.weight_decay)),
        ]

    def logits(self, x: Tensor) -> list[Tensor]:
        """Of every exit."""
        return self.model(x)  # type: ignore[no-any-return]

    def loss(self, logits: list[Tensor], x: Tensor, targets: Tensor) -> Tensor:
        """Weighted sum over the exits of the mean over the batch."""
        config = self._config
        taught = self._teach(x) if self._teacher is not None and config.distillation else None
        if taught is not None:
            # Nothing is to be learned from a teacher that is wrong: there the labels have all of the loss.
            share = config.distillation * (taught.argmax(1) == targets.argmax(1)).float()  # (B,)
        total = x.new_zeros(())
        for weight, exit_logits in zip(config.exit_weights, logits, strict=True):
            loss = F.cross_entropy(exit_logits, targets, label_smoothing=config.label_smoothing, reduction="none")
            if taught is not None:
                divergence = F.kl_div(F.log_softmax(exit_logits, dim=1), taught, reduction="none").sum(dim=1)
                loss = (1 - share) * loss + share * divergence
            total = total + weight * loss.mean()
        return total

    @torch.no_grad()
    def _teach(self, x: Tensor) -> Tensor:
        """Class probabilities (B, C) by the teacher."""
        assert self._teacher is not None  # noqa: S101 - the caller asked
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._config.bf16):
            logits = self._teacher.logits(x)[0]
        return logits.float().softmax(dim=1)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], learning_rate: float, weight_decay: float
) -> list[dict[str, object]]:
    """Matrices and kernels decay; vectors, class tokens and position embeddings do not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        groups[parameter.ndim >= 2 and "pos_embed" not in name and "cls_token" not in name].append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate,
            "highest_lr": learning_rate,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays, parameters in groups.items()
        if parameters
    ]
