"""What is trained: optimisers over every parameter once, and losses against their formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from models.training.config import PretrainedTeacherConfig, StudentConfig, TeacherConfig
from models.training.learners import StudentLearner, TeacherLearner
from models.training.teacher import ConvTeacher, PretrainedTeacher, start_stem
from models.zoo import ZOO, create_model
from tests.checkpoints import checkpoint

ENTRY = ZOO["test_vit"]
CONFIG = StudentConfig(model="test_vit", distillation=0.0, bf16=False)


class FixedTeacher(TeacherLearner):
    """Says what the test wants."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__(TeacherConfig(), ENTRY)
        self.answer = answer

    def logits(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.answer]


def test_the_teacher_gives_logits_of_any_even_image_size() -> None:
    """Three halvings and a maximum over what is left."""
    teacher = ConvTeacher(7, channels=(8, 8, 8)).eval()
    assert teacher(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert teacher(torch.zeros(2, 3, 64, 48)).shape == (2, 7)


def test_a_stem_starts_from_the_convolutional_networks_groups(tmp_path: Path) -> None:
    """With its weights, and ReLU instead of GELU, each layer of the stem gives what that network's gives."""
    torch.manual_seed(0)
    teacher = ConvTeacher(10).eval()
    for norm in (module for module in teacher.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
        torch.nn.init.normal_(norm.bias)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    torch.save({"model": teacher.state_dict()}, tmp_path / "checkpoint.pt")
    network = create_model("vit_cifar10").eval()

    start_stem(network, tmp_path / "checkpoint.pt")

    for group in (teacher, *teacher.groups):
        for part in (group.stem,) if isinstance(group, ConvTeacher) else (group.reduce, group.residual):
            part[-1] = torch.nn.ReLU()
    x = torch.randn(2, 3, 32, 32)
    stem = network.stages[0].embedding.patch_embed
    torch.testing.assert_close(stem.layers[:5](x), teacher.groups[:2](teacher.stem(x)))
    with pytest.raises(ValueError, match="no convolutional stem"):
        start_stem(create_model("test_vit"), tmp_path / "checkpoint.pt")
    torch.save({"model": {"conv.weight": torch.zeros(7, 3, 3, 3), "norm.running_mean": torch.zeros(7)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no layer of the stem is like the first of"):
        start_stem(network, tmp_path / "other.pt")


def test_every_parameter_has_one_optimiser_and_vectors_do_not_decay() -> None:
    """Kernels and matrices of blocks go to Muon, everything else to AdamW; none is left out or taken twice."""
    learner = StudentLearner(replace(CONFIG, model="vit_cifar10"), ZOO["vit_cifar10"], None)
    taken = [p.data_ptr() for optimizer in learner.optimizers for group in optimizer.param_groups for p in group["params"]]

    assert sorted(taken) == sorted(p.data_ptr() for p in learner.model.parameters())  # one that is not trained has no gradient
    names = {p.data_ptr(): name for name, p in learner.model.named_parameters()}
    kernels = {p.data_ptr() for p in learner.model.parameters() if p.ndim == 4 and p.shape[1] > 3}
    assert len(kernels) == len(ZOO["vit_cifar10"].config.stem) - 1
    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = names[p.data_ptr()]
                spared = p.ndim < 2 or "pos_embed" in name or "cls_token" in name
                assert group["weight_decay"] == (0.0 if spared else CONFIG.weight_decay)
                of_muon = p.data_ptr() in kernels or (".blocks." in name and p.ndim == 2)
                assert of_muon == isinstance(optimizer, torch.optim.Muon)


def test_kernels_move_with_the_matrices_that_muon_is_given() -> None:
    """They share their memory; a kernel's gradient is handed over and gone."""
    learner = StudentLearner(replace(CONFIG, model="vit_cifar10"), ZOO["vit_cifar10"], None)
    kernel = next(p for p in learner.model.parameters() if p.ndim == 4 and p.shape[1] > 3)
    before = kernel.detach().clone()
    kernel.grad = torch.randn_like(kernel)

    learner.prepare_step()
    learner.optimizers[0].step()

    assert kernel.grad is None
    assert not torch.equal(kernel, before)


def test_the_loss_is_the_weighted_cross_entropy_of_every_exit() -> None:
    """Label smoothing included, where nobody teaches."""
    learner = StudentLearner(CONFIG, ENTRY, None)
    logits = [torch.randn(5, 10) for _ in range(3)]
    labels = torch.tensor([1, 2, 3, 4, 5])

    expected = sum(
        weight * F.cross_entropy(z, labels, label_smoothing=0.1) for weight, z in zip((0.6, 0.8, 1.0), logits, strict=True)
    )

    torch.testing.assert_close(learner.loss(logits, torch.zeros(5, 3, 32, 32), F.one_hot(labels, 10).float()), expected)


def test_without_a_teacher_the_last_exit_teaches_the_others() -> None:
    """Where it is right; it learns from the labels alone, and nothing flows back into it from the others."""
    learner = StudentLearner(replace(CONFIG, distillation=1.0), ENTRY, None)
    last = torch.zeros(2, 10)
    last[:, 0] = 20.0
    logits = [torch.randn(2, 10, requires_grad=True), torch.randn(2, 10, requires_grad=True), last.requires_grad_()]
    targets = F.one_hot(torch.tensor([0, 1]), 10).float()

    loss = learner.loss(logits, torch.zeros(2, 3, 32, 32), targets)
    loss.backward()

    def plain(z: torch.Tensor, smoothing: float) -> torch.Tensor:
        return F.cross_entropy(z, targets, label_smoothing=smoothing, reduction="none")

    # Image 0: the last exit is sure and right, so divergence is cross-entropy; image 1: it is wrong, so the label counts.
    early = [(plain(z, 0.0)[0] + plain(z, 0.1)[1]) / 2 for z in logits[:2]]
    torch.testing.assert_close(loss, 0.6 * early[0] + 0.8 * early[1] + plain(last, 0.1).mean(), rtol=1e-4, atol=1e-4)
    alone = last.detach().clone().requires_grad_()
    plain(alone, 0.1).mean().backward()
    torch.testing.assert_close(last.grad, alone.grad)


def test_the_teacher_counts_only_where_it_is_right() -> None:
    """Sure of class 0 for both images: the image of class 1 learns from its label alone."""
    said = torch.zeros(2, 10)
    said[:, 0] = 20.0
    teacher = FixedTeacher(said)
    plain = StudentLearner(CONFIG, ENTRY, None)
    taught = StudentLearner(StudentConfig(model="test_vit", distillation=1.0, bf16=False), ENTRY, teacher)
    logits, x = [torch.randn(1, 10) for _ in range(3)], torch.zeros(1, 3, 32, 32)

    def losses(label: int) -> tuple[float, float]:
        targets = F.one_hot(torch.tensor([label]), 10).float()
        teacher.answer = said[:1]
        return float(plain.loss(logits, x, targets)), float(taught.loss(logits, x, targets))

    right_plain, right_taught = losses(0)
    wrong_plain, wrong_taught = losses(1)
    assert wrong_plain == pytest.approx(wrong_taught)
    divergence = sum(w * -float(F.log_softmax(z, 1)[0, 0]) for w, z in zip((0.6, 0.8, 1.0), logits, strict=True))
    assert right_taught == pytest.approx(divergence, rel=1e-4)  # a sure teacher's divergence is a cross-entropy
    assert right_taught != pytest.approx(right_plain)


def test_a_pretrained_teacher_sees_what_its_network_was_trained_on() -> None:
    """Larger, with its own mean and standard deviation; before it is fitted it prefers no class."""
    config = PretrainedTeacherConfig(side=32, num_heads=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.1))
    state = {name: value for name, value in checkpoint().items() if not name.startswith("head.")}  # it needs no classifier
    teacher = PretrainedTeacher(state, 10, config, ((0.5, 0.4, 0.3), (0.25,) * 3)).eval()
    seen: list[torch.Tensor] = []
    teacher.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    colours = torch.tensor([0.2, 0.6, 0.9]).view(1, 3, 1, 1).expand(2, 3, 16, 16)

    logits = teacher((colours - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / 0.25)

    assert logits.tolist() == [[0.0] * 10] * 2
    expected = torch.tensor([0.2, 0.8, 6.0]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-4)
    learner = TeacherLearner(config, ENTRY, teacher)
    assert [type(optimizer) for optimizer in learner.optimizers] == [torch.optim.AdamW]
