"""The image as built and the compose file as brought up: a real engine, the real service, the real Prometheus."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image as PillowImage

from tests.containers import images
from tests.containers.conftest import filled_in, free_ports, panel_queries, read_dashboard, wait_until
from tests.containers.images import ROOT, Image

if TYPE_CHECKING:
    from tests.containers.conftest import Checked, Stack
    from tests.containers.engine import Engine

pytestmark = [pytest.mark.container, pytest.mark.slow]

LOAD_THREADS = 4
STOP_TIMEOUT_S = 40  # as docker-compose.yml has it
BUILD_CONTEXT = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "Dockerfile", ".dockerignore", "app", "models")

PROBE = """
import importlib.util as find, json, os, pathlib
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
def writable(path):
    try:
        pathlib.Path(path).write_text("x")
    except OSError:
        return False
    return True
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(),
    "found": [name for name in ("torch", "pip", "setuptools", "exporters", "models.training") if find.find_spec(name)],
    "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16), "no_new_privileges": int(status["NoNewPrivs"]),
    "written": [path for path in ("/x", "/opt/venv/x", "/etc/x", "/var/tmp/x", "/tmp/x") if writable(path)],
    "secrets": [path for path in ("/run/secrets/ca_bundle", "/run/secrets/pip_conf") if os.path.exists(path)],
    "telemetry_disabled": os.environ.get("ORT_DISABLE_TELEMETRY"),
    "variables": sorted(name for name in os.environ if name.startswith("PIP_") or "CERT" in name or "CA_BUNDLE" in name),
}))
"""


# The image


def test_image_runs_as_an_ordinary_user_and_holds_what_serves_and_no_more(engine: Engine, image: str, checked: Checked) -> None:
    """Uid 10001; neither torch nor pip nor the exporting side; no trace of the build's certificates."""
    seen = json.loads(engine.docker("run", "--rm", "--network=none", image, "python", "-c", PROBE))

    assert (seen["uid"], seen["gid"]) == (10001, 10001)
    assert seen["found"] == []
    assert seen["secrets"] == []
    assert seen["variables"] == []
    assert seen["telemetry_disabled"] == "1"  # ONNX Runtime reports to its maker since 1.29
    assert sorted(seen["written"]) == ["/tmp/x", "/var/tmp/x"]  # noqa: S108 - and nothing of its own, even unhardened
    checked("image: uid 10001; no torch, pip, setuptools, exporters; no certificates, secrets or pip settings of the build")


def test_change_of_the_sources_installs_nothing_anew(
    engine: Engine, image: str, base: Image, tmp_path: Path, checked: Checked
) -> None:
    """The dependencies are a layer of their own, made before the sources come in."""
    del image  # was built, so its layers are there
    for name in BUILD_CONTEXT:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, tmp_path / name)
    with (tmp_path / "app" / "__init__.py").open("a") as module:
        module.write(f"# changed by {os.getpid()}\n")
    tag = f"fovea-test:changed-{os.getpid()}"
    before = time.monotonic()
    try:
        log = images.build(engine, tmp_path / "Dockerfile", tmp_path, tag, base)
    finally:
        engine.succeeds("image", "rm", "--force", tag)

    steps = {line.split(" ")[0] for line in log.splitlines() if "--requirement requirements.txt" in line}
    assert len(steps) == 1, log
    assert f"{steps.pop()} CACHED" in log.splitlines()
    checked(f"a change of the sources rebuilds in {time.monotonic() - before:.0f} s, with the dependencies from the cache")


def test_unknown_target_is_refused_by_the_build(engine: Engine, base: Image, checked: Checked) -> None:
    """A typing mistake in TARGET ends the build with the names that there are."""
    build = ["build", "--progress=plain", "--build-arg=TARGET=gpu", f"--build-arg=BASE={base.name}", str(ROOT)]

    with pytest.raises(AssertionError, match="TARGET is cpu, cuda or openvino, not gpu"):
        engine.docker(*build)

    checked("build with TARGET=gpu: refused, with the names that there are")


def test_docker_stop_ends_the_service_with_zero(engine: Engine, image: str, client: httpx.Client, checked: Checked) -> None:
    """SIGTERM reaches the service, process 1 here, which drains and ends by itself: no kill, no error."""
    (port,) = free_ports(1)
    container = engine.docker(
        "run", "--detach", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", f"--publish=127.0.0.1:{port}:8000", image
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(
            lambda: client.get(f"{url}/health/ready").status_code == 200,
            "the service is ready",
            timeout_s=120,
            hopeless=lambda: engine.docker("inspect", "--format={{.State.Running}}", container) != "true",
            otherwise=lambda: engine.logs(container),
        )
        before = time.monotonic()
        engine.docker("stop", f"--time={STOP_TIMEOUT_S}", container)
        took_s = time.monotonic() - before
        state = json.loads(engine.docker("container", "inspect", container))[0]["State"]

        assert state["ExitCode"] == 0, engine.logs(container)
        assert not state["OOMKilled"]
        assert took_s < STOP_TIMEOUT_S
        checked(f"docker stop: exit code 0 after {took_s:.1f} s")
    finally:
        engine.succeeds("rm", "--force", container)


# The compose file


def test_compose_file_is_accepted(engine: Engine, checked: Checked) -> None:
    """By the compose that is installed here, version 1 or 2."""
    engine.compose(f"--file={ROOT / 'docker-compose.yml'}", "config", "--quiet", env={})

    version = engine.compose("version", "--short", env={})
    checked(f"compose config: accepted by compose {version}")


def test_container_is_hardened(stack: Stack, checked: Checked) -> None:
    """A read-only root, no capability, no way to new privileges, limits on memory and processes."""
    host = stack.inspect("fovea")["HostConfig"]
    seen = json.loads(stack.engine.docker("exec", stack.container("fovea"), "python", "-c", PROBE))

    assert (host["ReadonlyRootfs"], host["CapDrop"]) == (True, ["ALL"])
    assert host["Memory"] > 0
    assert host["PidsLimit"] > 0
    assert (seen["capabilities"], seen["no_new_privileges"]) == (0, 1)
    assert seen["written"] == ["/tmp/x"]  # noqa: S108
    checked(
        f"hardening: read-only root, only /tmp to write to, no capabilities, no new privileges, "
        f"{host['Memory'] / 2**20:.0f} MiB of memory, {host['PidsLimit']} processes"
    )


def test_ports_are_published_on_the_loopback_only(stack: Stack, checked: Checked) -> None:
    """Nothing is reachable from outside before the operator says so."""
    for service in ("fovea", "prometheus", *(["grafana"] if stack.grafana_url else [])):
        bindings = stack.inspect(service)["HostConfig"]["PortBindings"]
        assert {"127.0.0.1"} == {binding["HostIp"] for bound in bindings.values() for binding in bound}, service
    checked("ports: published on 127.0.0.1 only")


def test_photo_is_classified_and_a_broken_one_is_refused(stack: Stack, client: httpx.Client, checked: Checked) -> None:
    """The embedded model answers in the container as it does outside."""
    good, bad = jpegs(1)[0], b"\xff\xd8\xff not a JPEG"

    answer = post(client, stack.service_url, good)
    refusal = post(client, stack.service_url, bad)

    assert answer.status_code == 200, answer.text
    predictions = answer.json()["results"][0]["predictions"]
    assert all(isinstance(line["label"], str) and line["label"] for line in predictions)
    assert math.isclose(1.0, sum(line["probability"] for line in predictions), abs_tol=1.0)
    assert 400 <= refusal.status_code < 500, refusal.text
    top = predictions[0]
    checked(
        f"POST /v1/classify: 200, {len(predictions)} labels, the first {top['label']!r} at {top['probability']:.2f}; "
        f"a broken image: {refusal.status_code} {refusal.json().get('code')}"
    )


def test_killed_service_comes_back(stack: Stack, client: httpx.Client, checked: Checked) -> None:
    """The engine restarts a service that died, and it gets healthy by itself."""
    kill = (
        "import os, pathlib, signal\n"
        "for entry in pathlib.Path('/proc').glob('[0-9]*'):\n"
        "    if b'fovea\\0serve' in (entry / 'cmdline').read_bytes():\n"
        "        os.kill(int(entry.name), signal.SIGKILL)\n"
    )
    before = time.monotonic()
    stack.engine.succeeds("exec", stack.container("fovea"), "python", "-c", kill)
    wait_until(lambda: stack.inspect("fovea")["RestartCount"] == 1, "the container is restarted", timeout_s=30)
    wait_until(
        lambda: client.get(f"{stack.service_url}/health/ready").status_code == 200, "the service is ready", timeout_s=120
    )
    checked(f"killed with SIGKILL: restarted and ready after {time.monotonic() - before:.1f} s")


# Monitoring


@pytest.fixture(scope="module")
def load(stack: Stack, client: httpx.Client) -> Iterator[None]:
    """Photos, and now and then a broken one, for as long as the tests of the monitoring run."""
    photos = [*jpegs(12), b"\xff\xd8\xff not a JPEG"]
    stopped = threading.Event()

    def send(start: int) -> None:
        for turn in range(start, 2**31):
            if stopped.is_set():
                return
            with contextlib.suppress(httpx.HTTPError):
                post(client, stack.service_url, photos[turn % len(photos)])

    threads = [threading.Thread(target=send, args=(3 * index,)) for index in range(LOAD_THREADS)]
    for thread in threads:
        thread.start()
    yield
    stopped.set()
    for thread in threads:
        thread.join()


def test_prometheus_scrapes_the_service(stack: Stack, client: httpx.Client, checked: Checked) -> None:
    """By the name of the service, over the project's own network."""

    def up() -> bool:
        targets = client.get(f"{stack.prometheus_url}/api/v1/targets").json()["data"]["activeTargets"]
        return [(target["labels"]["job"], target["health"]) for target in targets] == [("fovea", "up")]

    wait_until(
        up,
        "the target is up",
        timeout_s=60,
        otherwise=lambda: client.get(f"{stack.prometheus_url}/api/v1/targets").text,
    )
    checked("Prometheus: the target fovea is up")


@pytest.mark.usefixtures("load")
def test_every_query_of_the_dashboard_gives_data_under_load(stack: Stack, client: httpx.Client, checked: Checked) -> None:
    """No panel stays empty because of a metric that was renamed, a label that is not there, or a mistake in PromQL."""
    queries = panel_queries(read_dashboard())
    missing = list(queries)

    def none_missing() -> bool:
        missing[:] = [(title, query) for title, query in missing if not values(client, stack.prometheus_url, query)]
        return not missing

    wait_until(
        none_missing,
        "every query gives data",
        timeout_s=90,
        step_s=2.0,
        otherwise=lambda: "\n".join(f"no data: {title}: {query}" for title, query in missing),
    )
    for title, query in queries:
        found = values(client, stack.prometheus_url, query)
        checked(f"dashboard: {title}: {len(found)} series, {min(found):.4g} to {max(found):.4g}")
    checked(f"dashboard: all {len(queries)} queries of {len({title for title, _ in queries})} panels give data under load")


@pytest.mark.usefixtures("load")
def test_quantities_of_the_dashboard_make_sense_together(stack: Stack, client: httpx.Client, checked: Checked) -> None:
    """Shares are shares, outcomes add up to the total, and means lie between the least and the most there can be."""
    by_title: dict[str, list[float]] = {}
    for title, query in panel_queries(read_dashboard()):
        by_title.setdefault(title, []).extend(values(client, stack.prometheus_url, query))

    assert by_title["Ready"] == [1.0]
    assert by_title["Requests"][0] > 0
    assert 0 < by_title["Share of requests that went wrong"][0] < 0.5  # client_error: one in thirteen was broken
    assert math.isclose(1.0, sum(by_title["Exits: share of images that leave after each stage"]), abs_tol=1e-6)
    # Two counters, read while batches are on their way: some images are in the one and not yet in the other.
    assert 0.9 < by_title["Stages per image"][0] < len(by_title["Executions by stage"]) + 0.1
    assert all(1 <= size <= LOAD_THREADS for size in by_title["Mean batch size by stage"])
    p50, p90, p99 = by_title["Request duration"]
    assert p50 <= p90 <= p99
    checked(
        f"under load: {by_title['Requests'][0]:.0f} requests/s, p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms, "
        f"{by_title['Stages per image'][0]:.2f} stages per image"
    )


@pytest.mark.usefixtures("load")
def test_variables_and_annotations_of_the_dashboard_are_answered(stack: Stack, client: httpx.Client, checked: Checked) -> None:
    """The choices of the dashboard's menus come from labels that are there."""
    dashboard = read_dashboard()
    offered = {}
    for variable in dashboard["templating"]["list"]:
        selector, label = variable["query"]["query"].removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
        answer = client.get(
            f"{stack.prometheus_url}/api/v1/label/{label}/values", params={"match[]": filled_in(selector)}
        ).json()
        offered[variable["name"]] = answer["data"]
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation:
            query(client, stack.prometheus_url, filled_in(annotation["expr"]))

    assert all(offered.values()), offered
    checked(f"dashboard: its menus offer {offered}")


@pytest.mark.usefixtures("load")
def test_grafana_opens_on_the_dashboard_without_a_login(stack: Stack, client: httpx.Client, checked: Checked) -> None:
    """Provisioned as the files say: home dashboard, data source, and a query through it, all as an anonymous viewer."""
    if stack.grafana_url is None:
        reason = "Grafana itself was not run: its image cannot be pulled here, and Debian has no package of it"
        checked(reason)
        pytest.skip(reason)
    url = stack.grafana_url
    wait_until(
        lambda: client.get(f"{url}/api/health").status_code == 200,
        "Grafana is up",
        timeout_s=120,
        otherwise=lambda: stack.compose("logs", "--no-color", "grafana"),
    )
    home = client.get(f"{url}/api/dashboards/home").json()
    uid = read_dashboard()["panels"][1]["datasource"]["uid"]
    answer = client.get(f"{url}/api/datasources/proxy/uid/{uid}/api/v1/query", params={"query": "fovea_ready"})

    assert read_dashboard()["title"] == home["dashboard"]["title"]
    assert client.get(f"{url}/api/dashboards/uid/{read_dashboard()['uid']}").status_code == 200
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"]["result"][0]["value"][1] == "1"
    assert client.get(f"{url}/api/admin/settings").status_code in (401, 403)
    checked("Grafana: home is the dashboard, its data source answers, and a viewer may not administer")


def test_stopped_service_ends_with_zero_and_the_dashboard_says_so(stack: Stack, client: httpx.Client, checked: Checked) -> None:
    """Comes last. `docker compose stop` is a clean end, is not undone by the restart policy, and shows as not ready."""
    ready = next(query for title, query in panel_queries(read_dashboard()) if title == "Ready")
    before = time.monotonic()
    stack.compose("stop", "fovea")
    took_s = time.monotonic() - before

    state = stack.inspect("fovea")["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0), stack.compose("logs", "--no-color", "fovea")
    wait_until(lambda: values(client, stack.prometheus_url, ready) == [0.0], "the dashboard says not ready", timeout_s=30)
    checked(f"compose stop: exit code 0 after {took_s:.1f} s; the dashboard's Ready turns to no")


def jpegs(count: int) -> list[bytes]:
    """Seeded pictures of several sizes, from nearly plain to nearly noise, so that they leave at different exits."""
    generator = np.random.default_rng(0)
    made = []
    for index in range(count):
        side = 2 + 3 * index
        small = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        picture = PillowImage.fromarray(small).resize((240 + 40 * index, 320), PillowImage.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        made.append(buffer.getvalue())
    return made


def post(client: httpx.Client, url: str, image: bytes) -> httpx.Response:
    """Ask for a classification of one image, sent as the body."""
    return client.post(f"{url}/v1/classify", content=image, headers={"Content-Type": "image/jpeg"})


def query(client: httpx.Client, url: str, promql: str) -> list[dict[str, Any]]:
    """What Prometheus answers to an instant query."""
    answer = client.post(f"{url}/api/v1/query", data={"query": promql})
    assert answer.status_code == 200, f"{promql}\n{answer.text}"
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def values(client: httpx.Client, url: str, promql: str) -> list[float]:
    """The numbers of an instant query, without those that are none."""
    numbers = [float(series["value"][1]) for series in query(client, url, promql)]
    return [number for number in numbers if not math.isnan(number)]
