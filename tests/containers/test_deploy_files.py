"""What the deployment's files promise each other and the code, told without an engine."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import METRIC_TYPES
from pydantic import BaseModel

from app.metrics import Metrics
from app.settings import HttpSettings, Settings
from tests.containers.conftest import panel_queries, read_dashboard
from tests.containers.images import ROOT

SET_BY_THE_IMAGE = {"FOVEA_HTTP__HOST", "FOVEA_HTTP__PORT"}
SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_info")


@pytest.fixture(scope="module")
def compose() -> str:
    """The compose file's text."""
    return (ROOT / "docker-compose.yml").read_text()


def panels() -> list[dict[str, Any]]:
    """The panels of the dashboard, without the rows' headings."""
    return [panel for panel in read_dashboard()["panels"] if panel["type"] != "row"]


def variables(section: type[BaseModel], prefix: str) -> set[str]:
    """The environment variables of settings and their sections."""
    names: set[str] = set()
    for name, field in section.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        inner = field.annotation
        names |= variables(inner, f"{variable}__") if isinstance(inner, type) and issubclass(inner, BaseModel) else {variable}
    return names


def test_compose_passes_on_every_setting_that_is_the_operators(compose: str) -> None:
    """All settings but the address inside the container, and none that no longer exists."""
    passed_on = set(re.findall(r"^      (FOVEA_\w+):$", compose, re.MULTILINE))

    assert passed_on == variables(Settings, "FOVEA_") - SET_BY_THE_IMAGE


def test_compose_waits_longer_than_the_service_takes_to_stop(compose: str) -> None:
    """Else the engine would kill requests that the service still means to answer."""
    grace_s = int(re.findall(r"stop_grace_period: (\d+)s", compose)[0])
    http = HttpSettings()

    assert grace_s > http.drain_delay_s + http.shutdown_timeout_s


def test_grafana_is_provisioned_with_what_the_dashboard_names(compose: str) -> None:
    """The data source's uid, Prometheus' address, the home dashboard's path: each is said in two files."""
    provisioning = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/fovea.yml").read_text())["providers"]
    services = yaml.safe_load(compose)["services"]
    grafana = services["grafana"]
    used = {part["datasource"]["uid"] for panel in panels() for part in (panel, *panel["targets"])}
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]

    assert used == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    assert home == f"{provider['options']['path']}/fovea.json"
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    assert "./deploy/grafana/provisioning:/etc/grafana/provisioning:ro" in grafana["volumes"]


def test_prometheus_scrapes_the_port_of_the_service(compose: str) -> None:
    """The job is called as the dashboard's queries call it."""
    (job,) = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]

    assert job["job_name"] == "fovea"
    assert job["static_configs"] == [{"targets": [f"fovea:{HttpSettings().port}"]}]
    assert f":{HttpSettings().port}" in compose


def test_dashboard_shows_every_metric_of_the_service_and_no_other() -> None:
    """A metric that is renamed, added or dropped is noticed here."""
    registry = CollectorRegistry()
    Metrics(registry)
    there = {metric.name for metric in registry.collect()}
    asked = set(re.findall(r"\bfovea_\w+", " ".join(query for _, query in panel_queries(read_dashboard()))))
    shown = {name if name in there else re.sub(rf"({'|'.join(SUFFIXES)})$", "", name) for name in asked}

    assert set(METRIC_TYPES) >= {metric.type for metric in registry.collect()}
    assert shown == there


def test_panels_say_what_they_show_and_do_not_overlap() -> None:
    """Every panel has a title of its own, a description and a unit; the grid has 24 columns."""
    taken: set[tuple[int, int]] = set()
    for panel in read_dashboard()["panels"]:
        grid = panel["gridPos"]
        cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        assert not cells & taken, panel["title"]
        assert grid["x"] + grid["w"] <= 24, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["description"], panel["title"]
        unit = panel["fieldConfig"]["defaults"].get("unit") or panel["options"].get("yAxis", {}).get("unit")
        assert unit or panel["type"] in ("table", "state-timeline"), panel["title"]

    everything = read_dashboard()["panels"]
    assert len({panel["title"] for panel in everything}) == len({panel["id"] for panel in everything}) == len(everything)
