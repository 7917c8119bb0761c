"""Exits that listen to those before them: fitted, and served as fitted, whoever shares a batch with whom."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.repository.store import ModelStore
from exporters import recipe
from exporters.config import Chosen, ExitConfig
from exporters.evaluation import logits_per_exit
from exporters.exit_fitting import route, scores_of, with_thresholds
from exporters.images import read_images
from exporters.published import backends_here
from models.manifest import ModelManifest
from tests.app.http.served import check_answer, make_settings, running
from tests.exporters.exporting import make_config


@pytest.mark.anyio
async def test_patience_is_served_as_it_was_fitted(inputs: Path, tmp_path: Path) -> None:
    """Images sent at once leave where they do offline, by the exits that they went through themselves."""
    config = replace(make_config(inputs, tmp_path / "repository"), exits=ExitConfig(score="patience"), int8=False)
    fitted = ModelManifest.load(recipe.run(config)).variants[0].exits
    assert {exit_.score for exit_ in fitted} == {"patience"}
    stored = ModelStore(tmp_path / "repository").open("test_vit", 1)
    images = read_images(inputs / "images", stored.labels, stored.manifest.preprocess)
    logits = logits_per_exit(backends_here(stored)["fp32"], 3, images.pixels)
    # So that about a third leaves at each exit: of random weights nothing like it comes by fitting.
    first, second = scores_of(logits, fitted)
    exits = with_thresholds(fitted, (float(np.quantile(first, 2 / 3)), float(np.median(second))))
    expected = route(logits, exits)
    assert set(expected.exit_stage) == {0, 1, 2}
    recipe.run(replace(config, version=2, chosen=Chosen(exits, None, (), {"balanced": ""})))

    files = sorted((inputs / "images").glob("*/*"))
    settings = make_settings(tmp_path / "repository", runtime={"variant": "fp32", "instances": 2})
    async with running(settings) as served:
        answers = [check_answer(each) for each in await asyncio.gather(*(served.classify(f.read_bytes()) for f in files))]

    found = [(result.exit.stage, result.predictions[0].label) for answer in answers for result in answer.results if result.exit]
    labels = [stored.labels[int(number)] for number in expected.predicted]
    assert found == [*zip(expected.exit_stage.tolist(), labels, strict=True)]
