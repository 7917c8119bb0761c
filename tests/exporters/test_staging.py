"""Costs of stages: counted by formula, checked against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from exporters.staging import stage_specs
from models.zoo import ZOO, create_model


@pytest.mark.parametrize("name", sorted(ZOO))
def test_macs_are_those_that_pytorch_counts(name: str) -> None:
    """Half the floating-point operations of one image through each stage."""
    model, entry = create_model(name).eval(), ZOO[name]
    x = torch.zeros(1, 3, entry.config.image_size, entry.config.image_size)
    for stage, spec in zip(model.stages, stage_specs(model, entry.preprocess), strict=True):
        # The counter knows attention only in its plain form.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            _, x = stage(x)
        assert counter.get_total_flops() / 2 == pytest.approx(spec.gmacs * 1e9, rel=1e-6)
