"""A container engine for the tests: the one that runs here, else a private one that leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

LAST_WITH_OWN_BUILDKIT = 22  # later command lines need the buildx plug-in for it
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class NoEngine(Exception):
    """Why there is no engine, in words for the one who reads that the tests were skipped."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How to talk to one engine."""

    docker_command: tuple[str, ...]
    compose_command: tuple[str, ...]
    private: bool
    env: Mapping[str, str] = field(repr=False)

    def docker(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """Run `docker` and give what it printed.

        Raises:
            AssertionError: with everything it said, when it failed.
        """
        return _run([*self.docker_command, *arguments], self.env, timeout_s)

    def succeeds(self, *arguments: str, timeout_s: float = 120.0) -> bool:
        """Whether `docker` with these arguments ends with 0, in time."""
        try:
            self.docker(*arguments, timeout_s=timeout_s)
        except (AssertionError, subprocess.TimeoutExpired):
            return False
        return True

    def logs(self, container: str) -> str:
        """What a container wrote, to standard error too."""
        command = [*self.docker_command, "logs", container]
        done = subprocess.run(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=30
        )
        return done.stdout

    def compose(self, *arguments: str, env: Mapping[str, str], timeout_s: float = 180.0) -> str:
        """Run `docker compose` (or `docker-compose`) and give what it printed."""
        return _run([*self.compose_command, *arguments], {**self.env, **env}, timeout_s)


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """An engine for as long as the context lasts.

    Raises:
        NoEngine: none runs, and none can be started.
    """
    docker = (_docker_that_builds(),)
    env = {**os.environ, "DOCKER_BUILDKIT": "1"}
    compose = _compose(docker, env)
    if _answers(docker, env):
        yield Engine(docker, compose, private=False, env=env)
        return
    with _private_dockerd(docker, env) as host:
        yield Engine(docker, compose, private=True, env={**env, "DOCKER_HOST": host})


def _docker_that_builds() -> str:
    """The first `docker` that can build with BuildKit; one of version 23 or later cannot without buildx."""
    for candidate in (shutil.which("docker"), "/usr/bin/docker"):
        if candidate is None or not Path(candidate).exists():
            continue
        version = _output([candidate, "version", "--format", "{{.Client.Version}}"])
        major = version.split(".")[0]
        if _succeeds([candidate, "buildx", "version"]) or (major.isdigit() and int(major) <= LAST_WITH_OWN_BUILDKIT):
            return candidate
    raise NoEngine("no `docker` command with BuildKit is installed")


def _compose(docker: tuple[str, ...], env: Mapping[str, str]) -> tuple[str, ...]:
    if _succeeds([*docker, "compose", "version"], env):
        return (*docker, "compose")
    if found := shutil.which("docker-compose"):
        return (found,)
    raise NoEngine("neither `docker compose` nor `docker-compose` is installed")


def _answers(docker: tuple[str, ...], env: Mapping[str, str]) -> bool:
    return _succeeds([*docker, "info"], env)


@contextlib.contextmanager
def _private_dockerd(docker: tuple[str, ...], env: Mapping[str, str]) -> Iterator[str]:
    """A dockerd with a socket and data of its own; the host's firewall and forwarding stay as they are."""
    program = shutil.which("dockerd", path=SEARCH_PATH)
    if program is None:
        raise NoEngine("no engine runs here, and dockerd is not installed")
    if os.geteuid() != 0:
        raise NoEngine("no engine runs here, and only root can start one")
    home = Path(tempfile.mkdtemp(prefix="fovea-engine-"))
    host = f"unix://{home}/docker.sock"
    had_bridge = Path("/sys/class/net/docker0").exists()
    log = home / "dockerd.log"
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            [
                program,
                f"--data-root={home}/data",
                f"--exec-root={home}/exec",
                f"--pidfile={home}/dockerd.pid",
                f"--host={host}",
                "--iptables=false",
                "--ip6tables=false",
                "--ip-forward=false",
                "--ip-masq=false",
                "--log-level=warn",
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**env, "PATH": SEARCH_PATH},
            start_new_session=True,  # an interrupt at the keyboard must not take it away before the containers are stopped
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(docker, {**env, "DOCKER_HOST": host}):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise NoEngine(f"a private dockerd did not start: {log.read_text(errors='replace')[-600:].strip()}")
            time.sleep(0.2)
        yield host
    finally:
        daemon.terminate()
        try:
            daemon.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        _remove(home, bridge=not had_bridge)


def _remove(home: Path, *, bridge: bool) -> None:
    """Leave no mount, no bridge and no data behind."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if Path(m).is_relative_to(home)), reverse=True):
        _succeeds(["umount", "--lazy", mount])
    if bridge and Path("/sys/class/net/docker0").exists():
        _succeeds(["ip", "link", "delete", "docker0"])
    shutil.rmtree(home, ignore_errors=True)


def _run(command: list[str], env: Mapping[str, str], timeout_s: float) -> str:
    done = subprocess.run(command, env=env, timeout=timeout_s, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()


def _succeeds(command: list[str], env: Mapping[str, str] | None = None) -> bool:
    try:
        return subprocess.run(command, env=env, capture_output=True, check=False, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
