"""What cannot work is refused at start by the real process, too: one clear line, an exit status, no traceback."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.servers import MODEL, ROOT, Server
from tests.fakes import PATIENCE_S


def start(repository: Path, *arguments: str, **settings: str) -> tuple[int, str]:
    """Exit status and everything it wrote."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment |= {f"FOVEA_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "app", "serve", "--port", "0", "--repository", str(repository), *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3 * PATIENCE_S,
        check=False,
    )
    return done.returncode, done.stdout


def assert_refused(found: tuple[int, str], *words: str) -> None:
    code, text = found
    assert code == 1, text
    (line,) = text.splitlines()
    for word in words:
        assert word in line


def test_a_port_that_another_fovea_has(tiny_repository: Path, tmp_path: Path) -> None:
    """Told before any model is loaded, with the setting to change; the first one goes on."""
    with Server(tiny_repository, tmp_path / "log") as first:
        assert_refused(start(tiny_repository, "--port", str(first.port)), str(first.port), "in use", "FOVEA_HTTP__PORT")
        assert first.get("/health/ready")[0] == 200
        first.stop()


def test_a_damaged_artefact(tiny_repository: Path, tmp_path: Path) -> None:
    """A file that is not the published one."""
    shutil.copytree(tiny_repository, tmp_path / "damaged")
    file = tmp_path / "damaged" / MODEL / "1" / "fp32" / "stage_2.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(start(tmp_path / "damaged"), "error:", MODEL, "fp32/stage_2.onnx", "sha256")


def test_a_bad_setting(tiny_repository: Path) -> None:
    """By the name a stranger finds in the table of settings."""
    assert_refused(start(tiny_repository, HTTP__MAX_UPLOAD_BYTES="lots"), "settings:", "http.max_upload_bytes", "integer")


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux alone knows threads that push nobody off a core")
def test_the_loop_leaves_cores_to_instances(tiny_repository: Path, tmp_path: Path) -> None:
    """Its thread, the process's first, is scheduled as a batch job; those that compute are not."""
    with Server(tiny_repository, tmp_path / "log", RUNTIME__INSTANCES=2) as server:
        process = server.process.pid
        policies = {int(task.name): os.sched_getscheduler(int(task.name)) for task in Path(f"/proc/{process}/task").iterdir()}
        server.stop()

    assert policies.pop(process) == os.SCHED_BATCH
    assert list(policies.values()).count(os.SCHED_OTHER) >= 2


@pytest.mark.parametrize("log", ["nobody reads it", "no space"])
def test_a_log_that_cannot_be_written_stops_nothing(tiny_repository: Path, log: str) -> None:
    """A thousand lines into a pipe that nobody empties; and a start with no space for the first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment |= {"FOVEA_LOG__ACCESS": "1", "FOVEA_RUNTIME__VARIANT": "fp32"}
    command = [sys.executable, "-m", "app", "serve", "--port", str(port), "--repository", str(tiny_repository)]
    with Path("/dev/full").open("wb") as full:
        stderr = full if log == "no space" else subprocess.PIPE
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        wait_ready(process, port)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        for _ in range(1000):
            connection.request("GET", "/nothing/" + "x" * 100)
            response = connection.getresponse()
            assert (response.status, len(response.read()) > 0) == (404, True)
        connection.close()
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.communicate()


def wait_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Until a connection is accepted; the log cannot tell."""
    ends_at = time.monotonic() + 3 * PATIENCE_S
    while True:
        assert process.poll() is None
        assert time.monotonic() < ends_at
        try:
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return
