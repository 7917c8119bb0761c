"""What is trained and how: the convolutional teacher, and the network with exits that learns from it and from the labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.training.config import RunConfig, StudentConfig
from models.training.teacher import ConvTeacher
from models.zoo import ZooEntry, create_model


class TeacherLearner:
    """Cross-entropy on the labels; a convolutional network, unless another is given."""

    def __init__(self, config: RunConfig, entry: ZooEntry, model: nn.Module | None = None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model: nn.Module = ConvTeacher(len(entry.labels)) if model is None else model
        self.mean, self.std = entry.preprocess.mean, entry.preprocess.std
        self.num_classes = len(entry.labels)
        self._config = config
        self._optimizing = Optimizing(self.model, list(self.model.named_parameters()), config)
        self.optimizers = self._optimizing.optimizers

    def logits(self, x: Tensor) -> list[Tensor]:
        """As of one exit."""
        return [self.model(x)]

    def loss(self, logits: list[Tensor], x: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        """The mean over the batch; nobody teaches the teacher."""
        return F.cross_entropy(logits[0], targets, label_smoothing=self._config.label_smoothing)

    def prepare_step(self) -> None:
        """Hand kernels' gradients over."""
        self._optimizing.prepare_step()

    def load(self, checkpoint: Path) -> None:
        """Take the weights of a finished run."""
        self.model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
        self.model.eval()


class StudentLearner:
    """All exits at once, from the labels and from what a teacher says of the very same augmented image, where it is right.

    `num_stages` trains the first stages alone: a shallow network learns its convolutions at a fraction of the cost, and the
    deeper stages have something to start from (progressive stacking: Gong et al., ICML 2019).

    The teacher is a network of its own, or, where there is none, the last exit, which then teaches the exits before it.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; that teacher and student must see the same
    crop: Beyer et al., Knowledge distillation: A good teacher is patient and consistent, CVPR 2022; a network's deepest exit
    as teacher of the others: Zhang et al., Be Your Own Teacher, ICCV 2019.
    """

    def __init__(
        self, config: StudentConfig, entry: ZooEntry, teacher: TeacherLearner | None, *, num_stages: int | None = None
    ) -> None:
        self._network = create_model(config.model, seed=config.seed)
        self._stages = [*self._network.stages][:num_stages]
        self.model: nn.Module = self._network
        self.mean, self.std = entry.preprocess.mean, entry.preprocess.std
        self.num_classes = len(entry.labels)
        self._config = config
        self._teacher = teacher
        trained = {id(p) for stage in self._stages for p in stage.parameters()}
        named = [(name, p) for name, p in self.model.named_parameters() if id(p) in trained]
        self._optimizing = Optimizing(self.model, named, config)
        self.optimizers = self._optimizing.optimizers

    def logits(self, x: Tensor) -> list[Tensor]:
        """Of every exit there is yet."""
        found = []
        for stage in self._stages:
            exit_logits, x, _ = stage(x)
            found.append(exit_logits)
        return found

    def start_from(self, checkpoint: Path) -> None:
        """Take the weights of another run of the same network."""
        self.model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])

    def loss(self, logits: list[Tensor], x: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        """Weighted sum over the exits of the mean over the batch; `taught` is what the teacher said, if it was asked before."""
        config = self._config
        from_outside = taught is not None or self._teacher is not None
        if taught is None:
            taught = self._teach(x) if self._teacher is not None else logits[-1].detach().softmax(dim=1)
        # Nothing is to be learned from a teacher that is wrong: there the labels have all of the loss.
        share = config.distillation * (taught.argmax(1) == targets.argmax(1)).float()  # (B,)
        total = x.new_zeros(())
        for index, (weight, exit_logits) in enumerate(zip(config.exit_weights[: len(logits)], logits, strict=True)):
            loss = F.cross_entropy(exit_logits, targets, label_smoothing=config.label_smoothing, reduction="none")
            if from_outside or index < len(logits) - 1:
                divergence = F.kl_div(F.log_softmax(exit_logits, dim=1), taught, reduction="none").sum(dim=1)
                loss = (1 - share) * loss + share * divergence
            total = total + weight * loss.mean()
        return total

    def prepare_step(self) -> None:
        """Hand kernels' gradients over."""
        self._optimizing.prepare_step()

    @torch.no_grad()
    def _teach(self, x: Tensor) -> Tensor:
        """Class probabilities (B, C) by the teacher."""
        assert self._teacher is not None  # noqa: S101 - the caller asked
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._config.bf16):
            logits = self._teacher.logits(x)[0]
        return logits.float().softmax(dim=1)


class Optimizing:
    """Muon for kernels and the blocks' matrices, AdamW for the rest.

    Two epochs of the convolutional teacher: 83 % held-out with it, 68 with stochastic gradient descent. Muon knows matrices
    only, so kernels are given to it as matrices that share their memory.

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; its updates are scaled to those of
    AdamW (Liu et al., Muon is Scalable for LLM Training, 2025), so that both share one learning rate.
    """

    def __init__(self, model: nn.Module, named: Sequence[tuple[str, nn.Parameter]], config: RunConfig) -> None:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
        self._kernels = [(p, _as_matrix(p)) for _, p in named if config.muon and p.ndim == 4 and p.shape[1] > 3]
        matrices = [(name, p) for name, p in named if config.muon and ".blocks." in name and p.ndim == 2]
        taken = {id(p) for _, p in matrices} | {id(p) for p, _ in self._kernels}
        muon = [*matrices, *(("kernel", matrix) for _, matrix in self._kernels)]
        rest = [(name, p) for name, p in named if id(p) not in taken]
        adamw = torch.optim.AdamW(parameter_groups(rest, config.learning_rate, config.weight_decay))
        self.optimizers: Sequence[torch.optim.Optimizer] = [adamw]
        if muon:
            groups = parameter_groups(muon, config.learning_rate, config.weight_decay)
            self.optimizers = [torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw"), adamw]

    def prepare_step(self) -> None:
        """Before the optimizers' steps: the kernels' gradients become those of their matrices."""
        for kernel, matrix in self._kernels:
            matrix.grad = None if kernel.grad is None else kernel.grad.permute(0, 2, 3, 1).flatten(1)
            kernel.grad = None


def _as_matrix(kernel: nn.Parameter) -> nn.Parameter:
    """A kernel (O, I, k, k), channels last in memory, as a matrix (O, k * k * I) on the same memory."""
    matrix = nn.Parameter(kernel.detach().permute(0, 2, 3, 1).flatten(1))
    if matrix.data_ptr() != kernel.data_ptr():
        raise ValueError("the kernel's channels are not last in memory")
    return matrix


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
