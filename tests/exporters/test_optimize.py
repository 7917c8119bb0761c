"""The search for a ladder on a tiny network: candidates, a version with operating points, going on, and refusing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.runtime.cpu import has_exact_int8
from exporters import optimize as module
from exporters.cli import app as exporter
from exporters.config import BoundConfig, ExitConfig, ExportConfig, QuantizationConfig
from exporters.optimize import Search, optimize
from exporters.sources.base import AS_IT_IS, Asked, SourceError
from exporters.sources.timm_vit import TimmSource
from models.manifest import ModelManifest
from tests.app.http.served import check_answer, make_settings, running
from tests.checkpoints import LABELS, checkpoint, write_checkpoint
from tests.exporters.listener import Listener
from tests.images import make_archive, make_jpeg

SEARCH = Search(shares=(0.95, 0.85, 0.5))  # two blocks cannot leave so little as the last


@pytest.fixture
def config(tmp_path: Path) -> ExportConfig:
    """A network of random weights, and images of its classes to fit and to measure on."""
    weights, told = write_checkpoint(tmp_path, checkpoint())
    for name, count in (("fitting.zip", 12), ("test.zip", 6)):
        make_archive(tmp_path / name, LABELS, per_class=count)
    return ExportConfig(
        name="ladder",
        source=TimmSource(weights, told, LABELS, AS_IT_IS),
        calibration_images=tmp_path / "fitting.zip",
        test_images=tmp_path / "test.zip",
        repository=tmp_path / "repository",
        version=1,
        int8=has_exact_int8(),
        quantization=QuantizationConfig(min_agreement=0, max_accuracy_drop=1),  # nothing can be asked of random weights
        exits=ExitConfig(max_accuracy_drop=0.5),
        bound=BoundConfig(delta=0.2),
        fast_drop=0.7,
    )


@pytest.fixture(autouse=True)
def cheaper_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that do not hang on this machine: fewer tokens take less, fp32 takes twice as long."""

    def times(backends: dict[str, object], *_: object, **__: object) -> dict[str, dict[str, float]]:
        return {name: {"without_exits": 20.0 if name == "0" else 10.0 - int(name), "with_exits": 0.0} for name in backends}

    monkeypatch.setattr(module, "milliseconds_per_image", times)


def test_a_search_publishes_a_ladder(config: ExportConfig, tmp_path: Path) -> None:
    """Its last stage is the network as it came; balanced and fast begin at a cheaper graph and are proved."""
    said = Listener()
    directory = optimize(config, SEARCH, tmp_path / "work", said)

    manifest = ModelManifest.load(directory)
    (variant,) = manifest.variants
    assert len(manifest.entries) == len(manifest.stages) >= 2
    assert manifest.provenance["origin"].endswith("candidate version 1 (fp32)")
    assert variant.certificate is not None
    assert variant.certificate.compared_with == "the network as it came, in fp32"
    assert [point.name for point in variant.points] == ["fast"]
    assert any(exit_.threshold is not None and exit_.threshold <= 1 for exit_ in variant.exits)
    card = (directory / "MODEL_CARD.md").read_text()
    assert f"other half, {variant.certificate.images} images, proves of them" in card
    assert "Nothing was fitted on the images" in card
    assert any("the search ends here: tome leaves" in step for step in said.steps)
    assert any("balanced: candidate" in step and "times the network as it came" in step for step in said.steps)
    assert sorted(path.name for path in (tmp_path / "work" / "candidate").iterdir()) == ["1", "2", "3"]


def test_an_interrupted_search_goes_on(config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not made again, and the result is the same; another search's candidates are refused."""
    whole = optimize(config, SEARCH, tmp_path / "whole")
    ran = module.recipe.run
    made: list[str | None] = []

    def once(wanted: ExportConfig, *rest: object) -> Path:
        made.append(wanted.reduction)
        if len(made) == 2:
            raise KeyboardInterrupt
        return ran(wanted, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module.recipe, "run", once)
    again = replace(config, version=2)
    with pytest.raises(KeyboardInterrupt):
        optimize(again, SEARCH, tmp_path / "broken")
    resumed = optimize(again, SEARCH, tmp_path / "broken")

    assert made == [None, "tome:95%", "tome:95%", "tome:85%", "tome:50%", None]  # the last publishes
    mine, theirs = ModelManifest.load(resumed), ModelManifest.load(whole)
    assert (mine.stages, mine.variants) == (theirs.stages, theirs.variants)
    with pytest.raises(SourceError, match="candidates of another search"):
        optimize(replace(again, version=3, command="something else"), SEARCH, tmp_path / "broken")


def test_what_cannot_be_kept_is_refused_with_what_is_nearest(config: ExportConfig, tmp_path: Path) -> None:
    """Nothing is published then; nor is a ladder made of a network in stages."""
    config = replace(config, bound=None, exits=ExitConfig(max_accuracy_drop=-0.9), fast_drop=-0.9)
    with pytest.raises(SourceError, match=r"keeps a loss of at most -90 points; nearest is .* ms an image at .* points"):
        optimize(config, Search(shares=(0.85,)), tmp_path / "work")
    assert not (tmp_path / "repository" / "ladder" / "1").exists()
    staged = replace(config, source=replace(config.source, asked=Asked((1, 2))))  # type: ignore[type-var]
    with pytest.raises(SourceError, match="whole graphs"):
        optimize(staged, SEARCH, tmp_path / "other")


@pytest.mark.anyio
async def test_each_quality_of_a_ladder_is_served(config: ExportConfig, tmp_path: Path) -> None:
    """The full one by the network as it came alone, whatever comes before it in the version."""
    directory = optimize(config, SEARCH, tmp_path / "work")
    manifest = ModelManifest.load(directory)
    settings = make_settings(tmp_path / "repository", runtime={"variant": "auto", "instances": 1})
    async with running(settings) as served:
        for quality in ("full", "balanced", "fast"):
            answer = check_answer(await served.classify(make_jpeg(), params={"quality": quality}))
            (result,) = answer.results
            assert result.exit is not None
            assert result.timings_ms is not None
            if quality == "full":
                assert (result.exit.stage, len(result.timings_ms.stages)) == (len(manifest.stages) - 1, 1)
            else:
                assert "with 80 % confidence" in answer.bound


def test_the_command_searches(config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the options of an export; what was asked for stands in the card."""
    seen: list[tuple[ExportConfig, Search, Path]] = []

    def search(wanted: ExportConfig, tried: Search, work: Path, _: object) -> Path:
        seen.append((wanted, tried, work))
        raise SourceError("enough")

    monkeypatch.setattr("exporters.search_cli.optimize_ladder", search)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    source = config.source
    assert isinstance(source, TimmSource)
    arguments = ["optimize", "--model", "ladder", "--version", "1", "--repository", str(tmp_path / "repository")]
    arguments += ["--weights", str(tmp_path / "model.safetensors"), "--timm-config", str(tmp_path / "config.json")]
    arguments += [
        "--labels",
        str(tmp_path / "labels.txt"),
        "--shares",
        "80,60",
        "--max-drop",
        "1",
        "--work",
        str(tmp_path / "w"),
    ]
    arguments += ["--calibration", str(config.calibration_images), "--test", str(config.test_images)]

    done = CliRunner().invoke(exporter, arguments)

    assert done.exit_code == 1, done.output
    assert "enough" in done.output
    ((wanted, tried, work),) = seen
    assert (tried.shares, work) == ((0.8, 0.6), tmp_path / "w")
    assert wanted.exits.max_accuracy_drop == pytest.approx(0.01)
    assert wanted.command.startswith("python -m exporters optimize --model ladder --version 1 --max-drop 1")
    wrong = CliRunner().invoke(exporter, [*arguments, "--shares", "80,nonsense"])
    assert wrong.exit_code == 1
    assert "shares are percents" in wrong.output
