"""The metrics follow Prometheus' rules, and their labels cannot grow without bound."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from app.metrics import DURATION_BUCKETS, OUTCOMES, PHASES, SIZE_BUCKETS, Metrics, create_registry

BOUNDED = {
    "model",
    "version",
    "target",
    "variant",
    "outcome",
    "phase",
    "stage",
    "part",
    "quality",
    "reason",
}  # by the repository or by a tuple of ours


def touch(metrics: Metrics) -> None:
    """Give every metric a series, as traffic does."""
    for metric in vars(metrics).values():
        if not isinstance(metric, MetricWrapperBase):
            continue
        series = metric.labels(*("0" for _ in metric._labelnames)) if metric._labelnames else metric
        for action, arguments in (("inc", ()), ("set", (1,)), ("observe", (0.1,)), ("info", ({},))):
            if hasattr(series, action):
                getattr(series, action)(*arguments)
                break


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_promtool_finds_nothing_to_say(used: bool) -> None:
    """Names, units, types and help texts of everything on /metrics."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH: install Prometheus to hold the metrics to its rules")
    metrics = Metrics(create_registry())
    if used:
        touch(metrics)

    checked = subprocess.run(
        [promtool, "check", "metrics"], input=generate_latest(metrics.registry), capture_output=True, check=False
    )

    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_every_metric_is_ours_and_explained(metrics: Metrics) -> None:
    """The prefix, a help text that is a sentence, and no name twice."""
    families = list(metrics.registry.collect())

    assert len({family.name for family in families}) == len(families) >= 14
    for family in families:
        assert family.name.startswith("fovea_")
        assert family.documentation.endswith("."), family.name


def test_labels_are_bounded(metrics: Metrics) -> None:
    """No label takes its values from what clients send."""
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            assert set(metric._labelnames) <= BOUNDED


def test_the_process_is_on_the_registry() -> None:
    """Memory, CPU and garbage collection stand beside our own metrics, and no series has a `_created` twin."""
    metrics = Metrics(create_registry())
    touch(metrics)
    text = generate_latest(metrics.registry).decode()

    assert "process_resident_memory_bytes" in text
    assert "python_gc_collections_total" in text
    assert "fovea_requests_total" in text
    assert "_created" not in text


def test_registries_are_independent() -> None:
    """Two services in one process, as in tests, do not share counters."""
    first, second = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    first.ready.set(1)

    assert first.registry.get_sample_value("fovea_ready") == 1
    assert second.registry.get_sample_value("fovea_ready") == 0


@pytest.mark.parametrize("buckets", [DURATION_BUCKETS, SIZE_BUCKETS])
def test_buckets_are_geometric(buckets: tuple[float, ...]) -> None:
    """A factor of two each, so that a quantile read off them is at most a factor of two wide."""
    assert {larger / smaller for smaller, larger in itertools.pairwise(buckets)} == {2.0}


def test_buckets_cover_what_the_settings_allow() -> None:
    """From half a millisecond to beyond any answer of use, and from one image to 256."""
    assert (DURATION_BUCKETS[0], DURATION_BUCKETS[-1]) == (0.0005, pytest.approx(16.384))
    assert (SIZE_BUCKETS[0], SIZE_BUCKETS[-1]) == (1, 256)


def test_outcomes_and_phases_are_the_words_of_the_help_texts(metrics: Metrics) -> None:
    """What a person reads there is what the label says."""
    help_of = {family.name: family.documentation for family in metrics.registry.collect()}

    assert all(outcome in help_of["fovea_requests"] for outcome in OUTCOMES)
    assert all(phase in help_of["fovea_phase_duration_seconds"] for phase in PHASES)
