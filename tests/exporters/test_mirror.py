"""An exit that sees the mirror image too: the mean of both answers, as graphs and as a published version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from app.repository.store import ModelStore
from app.runtime.golden import verify_golden
from exporters import recipe
from exporters.evaluation import logits_per_exit
from exporters.golden import golden_images
from exporters.mirror import Mirrored
from exporters.published import backends_here
from exporters.sensitivity import every_exit
from exporters.stage_files import SHARED_FILE
from exporters.validation import normalised
from exporters.vit_export import ViTExport
from models.zoo import ZOO, create_model
from tests.app.http.served import check_answer, make_settings, running
from tests.exporters.exporting import make_config
from tests.images import make_jpeg


@pytest.mark.parametrize("layout", ["uint8_nhwc", "float32_nchw"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_last_exit_is_the_mean_of_both_answers(layout: str, batch_size: int) -> None:
    """The others are what they were; by PyTorch and by hand."""
    spec = ZOO["test_vit"].preprocess.model_copy(update={"layout": layout})
    model = create_model("test_vit").eval()
    mirrored = Mirrored(ViTExport(model, spec), spec)
    pixels = np.resize(golden_images(spec), (batch_size, *golden_images(spec).shape[1:]))

    found = every_exit(mirrored.graphs(), pixels)

    x = normalised(pixels, spec)
    with torch.no_grad():
        plain, flipped = model(x), model(x.flip(-1))
    expected = [*(each.numpy() for each in plain), (plain[-1] + flipped[-1]).numpy() / 2]
    assert not np.allclose(expected[-1], expected[-2], atol=1e-2)
    for mine, theirs, told in zip(found, expected, mirrored.answers(pixels), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
        np.testing.assert_allclose(told, theirs, atol=1e-4)


def test_the_manifest_says_what_the_graphs_have() -> None:
    """Names and shapes; the mirror costs as much as all before it."""
    spec = ZOO["test_vit"].preprocess
    mirrored = Mirrored(ViTExport(create_model("test_vit").eval(), spec), spec)
    stages = mirrored.stages()
    for stage, graph in zip(stages, mirrored.graphs(), strict=True):
        for wanted, found in ((stage.inputs, graph.graph.input), (stage.outputs, graph.graph.output)):
            shapes = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in found}
            assert shapes == {tensor.name: tensor.shape for tensor in wanted}
    assert stages[-1].gmacs == pytest.approx(sum(stage.gmacs for stage in stages[:-1]))


@pytest.mark.anyio
async def test_a_version_with_it_is_exported_and_served(inputs: Path, tmp_path: Path) -> None:
    """In every variant; its golden pair can be replayed, and its files are hardly larger than without."""
    plain = recipe.run(make_config(inputs, tmp_path / "repository"))
    directory = recipe.run(replace(make_config(inputs, tmp_path / "repository", version=2), mirror=True))

    stored = ModelStore(tmp_path / "repository").open("test_vit", 2)
    pixels = golden_images(stored.manifest.preprocess)
    for name, backend in backends_here(stored).items():
        assert verify_golden(backend, directory, stored.manifest, name) < stored.manifest.variant(name).golden_atol
        *_, before, last = logits_per_exit(backend, 4, pixels)
        again = logits_per_exit(backend, 4, np.ascontiguousarray(pixels[:, :, ::-1]))[-2]
        np.testing.assert_allclose(last, (before + again) / 2, atol=1e-5)
        assert (directory / name / SHARED_FILE).exists()
    weights = [sum(file.stat().st_size for file in each.glob("*/*")) for each in (plain, directory)]
    assert weights[1] < 1.4 * weights[0]
    async with running(make_settings(tmp_path / "repository", runtime={"variant": "fp32", "instances": 1})) as served:
        answer = check_answer(await served.classify(make_jpeg(), params={"quality": "full"}))
        (result,) = answer.results
        assert result.exit is not None
        assert (result.exit.stage, result.exit.stages) == (3, 4)


def test_fewer_tokens_go_with_it(inputs: Path, tmp_path: Path) -> None:
    """What is lost is told against the network as it came, mirrored too."""
    config = replace(make_config(inputs, tmp_path), int8=False, mirror=True, reduction="tome:2x2")
    stored = ModelStore(tmp_path).open("test_vit", int(recipe.run(config).name))
    assert len(stored.manifest.stages) == 4
    assert "tome:2x2" in (stored.directory / "MODEL_CARD.md").read_text()
