"""The engine, the images and the running stack that the container tests share, and a summary of what was checked."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.containers import images
from tests.containers.engine import Engine, NoEngine
from tests.containers.engine import engine as any_engine
from tests.containers.images import ROOT, Image

HEALTHY_TIMEOUT_S = 120.0
CHECKS = pytest.StashKey[list[str]]()

Checked = Callable[[str], None]


@pytest.fixture(scope="session")
def checked(request: pytest.FixtureRequest) -> Checked:
    """Notes one thing that was seen to hold, with its numbers, for the summary at the end of the run."""
    lines = request.config.stash.setdefault(CHECKS, [])
    started = time.monotonic()

    def note(line: str) -> None:
        lines.append(f"{time.monotonic() - started:6.1f} s  {line}")

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the container tests saw, so that it can be quoted."""
    if lines := config.stash.get(CHECKS, []):
        terminalreporter.section("containers: what was checked")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def engine(checked: Checked) -> Iterator[Engine]:
    """The engine that runs here, else a private one; skips in plain words when there is neither."""
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(any_engine())
        except NoEngine as error:
            pytest.skip(f"containers were not tested: {error}")
        version = found.docker("version", "--format", "{{.Server.Version}}")
        checked(f"engine: {'a private dockerd' if found.private else 'the one that runs here'}, {version}")
        yield found
    if found.private:
        checked("the private dockerd, its mounts, its bridge and its data are gone")


@pytest.fixture(scope="session")
def base(engine: Engine, tmp_path_factory: pytest.TempPathFactory, checked: Checked) -> Image:
    """The base image of the Dockerfile."""
    try:
        image = images.python_base(engine, tmp_path_factory.mktemp("base"))
    except NoEngine as error:
        pytest.skip(f"containers were not tested: {error}")
    checked(f"base image: {image.name}, {image.origin}")
    return image


@pytest.fixture(scope="session")
def image(engine: Engine, base: Image, checked: Checked) -> Iterator[str]:
    """The project's own image, built from the Dockerfile."""
    tag = f"fovea-test:{os.getpid()}"
    before = time.monotonic()
    images.build(engine, ROOT / "Dockerfile", ROOT, tag, base)
    megabytes = int(engine.docker("image", "inspect", "--format", "{{.Size}}", tag)) / 1e6
    base_megabytes = int(engine.docker("image", "inspect", "--format", "{{.Size}}", base.name)) / 1e6
    checked(
        f"docker build: {time.monotonic() - before:.0f} s; the image has {megabytes:.0f} MB, "
        f"{base_megabytes:.0f} MB of them the base image's"
    )
    yield tag
    engine.succeeds("image", "rm", "--force", tag)


@dataclass(frozen=True, slots=True)
class Stack:
    """The compose project as it runs."""

    engine: Engine
    arguments: tuple[str, ...]
    env: dict[str, str]
    service_url: str
    prometheus_url: str
    grafana_url: str | None  # None: its image could not be had

    def compose(self, *arguments: str) -> str:
        """Run a compose command on this project."""
        return self.engine.compose(*self.arguments, *arguments, env=self.env)

    def container(self, service: str) -> str:
        """The id of a service's container."""
        found = self.compose("ps", "--all", "--quiet", service)
        assert found, f"{service} has no container"
        return found.split()[0]

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine says of a service's container."""
        found: dict[str, Any] = json.loads(self.engine.docker("container", "inspect", self.container(service)))[0]
        return found


@pytest.fixture(scope="session")
def stack(
    engine: Engine, base: Image, image: str, tmp_path_factory: pytest.TempPathFactory, checked: Checked
) -> Iterator[Stack]:
    """The services of docker-compose.yml, up and healthy; only the images and the ports differ."""
    prometheus = images.prometheus(engine, base)
    checked(f"Prometheus: {prometheus.name}, {prometheus.origin}")
    grafana = images.pulled(engine, images.named_in_compose("grafana"))
    checked(f"Grafana: {f'{grafana.name}, {grafana.origin}' if grafana else 'not run, because no registry answers'}")
    services = ["fovea", "prometheus", *(["grafana"] if grafana else [])]

    directory = tmp_path_factory.mktemp("compose")
    override = directory / "images.yml"  # JSON, which is YAML too
    override.write_text(json.dumps({"services": {"fovea": {"image": image}, "prometheus": {"image": prometheus.name}}}))
    env_file = directory / "empty.env"  # or compose would read the developer's own
    env_file.touch()
    ports = [str(port) for port in free_ports(3)]
    arguments = (
        f"--project-name=fovea-test-{os.getpid()}",
        f"--project-directory={ROOT}",
        f"--env-file={env_file}",
        f"--file={ROOT / 'docker-compose.yml'}",
        f"--file={override}",
    )
    env = {"FOVEA_PORT": ports[0], "PROMETHEUS_PORT": ports[1], "GRAFANA_PORT": ports[2]}
    running = Stack(
        engine,
        arguments,
        env,
        service_url=f"http://127.0.0.1:{ports[0]}",
        prometheus_url=f"http://127.0.0.1:{ports[1]}",
        grafana_url=f"http://127.0.0.1:{ports[2]}" if grafana else None,
    )
    before = time.monotonic()
    try:
        running.compose("up", "--detach", "--no-build", *services)
        wait_until(
            lambda: running.inspect("fovea")["State"]["Health"]["Status"] == "healthy",
            "the service is healthy",
            timeout_s=HEALTHY_TIMEOUT_S,
            hopeless=lambda: running.inspect("fovea")["RestartCount"] > 0,
            otherwise=lambda: running.compose("logs", "--no-color", "fovea"),
        )
        checked(f"compose up: {', '.join(services)}; the service was healthy after {time.monotonic() - before:.0f} s")
        yield running
    finally:
        running.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")
        checked("compose down: containers, network and volumes removed")


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    """An HTTP client that goes past any proxy."""
    with httpx.Client(trust_env=False, timeout=30.0) as made:
        yield made


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for taken in sockets:
            taken.bind(("127.0.0.1", 0))
        return [taken.getsockname()[1] for taken in sockets]


def wait_until(
    holds: Callable[[], bool],
    what: str,
    *,
    timeout_s: float,
    hopeless: Callable[[], bool] = lambda: False,
    otherwise: Callable[[], str] = lambda: "",
    step_s: float = 0.5,
) -> None:
    """Wait for something that another process brings about; fails with what `otherwise` says, at once when hopeless."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if holds():
                return
        if hopeless() or time.monotonic() > deadline:
            pytest.fail(f"not to be had, or not within {timeout_s:g} s: {what}\n{otherwise()}")
        time.sleep(step_s)


def read_dashboard() -> dict[str, Any]:
    """The Grafana dashboard as provisioned."""
    found: dict[str, Any] = json.loads((ROOT / "deploy/grafana/dashboards/fovea.json").read_text())
    return found


def panel_queries(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """Title of the panel and PromQL, for every query of every panel, as Grafana would send it for all models."""
    return [(panel["title"], filled_in(target["expr"])) for panel in dashboard["panels"] for target in panel.get("targets", [])]


def filled_in(expression: str) -> str:
    """PromQL with Grafana's variables replaced; the interval is four scrapes, as Grafana has it at least."""
    return expression.replace("$__rate_interval", "20s").replace("$model", ".*").replace("$stage", ".*")
