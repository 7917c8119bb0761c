"""The images the tests need: pulled where a registry answers, else stand-ins made from Debian's packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.containers.engine import Engine, NoEngine

ROOT = Path(__file__).resolve().parents[2]
STANDINS = Path(__file__).parent / "standins"
PULL_TIMEOUT_S = 180.0
BUILD_TIMEOUT_S = 900.0
PYTHON_STANDIN = "fovea-standin/python:3.11"
PROMETHEUS_STANDIN = "fovea-standin/prometheus:debian"
CA_VARIABLES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
# What the official image has: `python` and `pip` in /usr/local/bin, and no refusal to install there.
MMDEBSTRAP = (
    "mmdebstrap",
    "--quiet",
    "--format=tar",
    "--variant=minbase",
    "--include=python3,python3-venv,ca-certificates",
    '--aptopt=Acquire::Languages "none"',
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    '--customize-hook=chroot "$1" python3 -m venv /usr/local',
    "bookworm",
)


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is there, and what to say of it."""

    name: str
    origin: str


def named_in_dockerfile() -> str:
    """The base image that the Dockerfile asks for."""
    found = re.search(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found, "the Dockerfile names no base image"
    return found[1]


def named_in_compose(service: str) -> str:
    """The image that docker-compose.yml pins for a service."""
    found = re.search(rf"^    image: (\S*{service}\S*)$", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
    assert found, f"docker-compose.yml names no image for {service}"
    return found[1]


def pulled(engine: Engine, name: str) -> Image | None:
    """The image itself, from this engine or a registry; None where no registry answers."""
    if engine.succeeds("image", "inspect", name):
        return Image(name, "was here")
    if engine.succeeds("pull", "--quiet", name, timeout_s=PULL_TIMEOUT_S):
        return Image(name, "pulled")
    return None


def python_base(engine: Engine, directory: Path) -> Image:
    """The Dockerfile's base, or a stand-in for it.

    Raises:
        NoEngine: neither can be had here.
    """
    name = named_in_dockerfile()
    if image := pulled(engine, name):
        return image
    standin = Image(PYTHON_STANDIN, f"stand-in for {name} from Debian's packages, because no registry answers")
    if engine.succeeds("image", "inspect", PYTHON_STANDIN):
        return standin
    if shutil.which("mmdebstrap") is None or os.geteuid() != 0:
        raise NoEngine(f"{name} cannot be pulled, and a stand-in needs mmdebstrap and root")
    archive = directory / "python.tar"
    done = subprocess.run([*MMDEBSTRAP, str(archive)], capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S)
    if done.returncode:
        raise NoEngine(f"{name} cannot be pulled, and mmdebstrap could not make a stand-in: {done.stderr[-600:].strip()}")
    changes = ("ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin", "ENV LANG=C.UTF-8", 'CMD ["python3"]')
    engine.docker("import", *(part for change in changes for part in ("--change", change)), str(archive), PYTHON_STANDIN)
    archive.unlink()
    return standin


def prometheus(engine: Engine, base: Image) -> Image:
    """The compose file's Prometheus, or Debian's in its place."""
    name = named_in_compose("prometheus")
    if image := pulled(engine, name):
        return image
    if not engine.succeeds("image", "inspect", PROMETHEUS_STANDIN):
        build(engine, STANDINS / "prometheus.Dockerfile", STANDINS, PROMETHEUS_STANDIN, base)
    return Image(PROMETHEUS_STANDIN, f"stand-in for {name} from Debian's package, because no registry answers")


def build(engine: Engine, dockerfile: Path, context: Path, tag: str, base: Image) -> str:
    """Build an image and give the build's log, in plain lines.

    The machine's own bundle of certificates goes along as a build secret where its environment names one. The build uses
    the host's network, because from those of a private engine there is no way out.
    """
    bundle = next((path for name in CA_VARIABLES if (path := os.environ.get(name)) and Path(path).is_file()), None)
    command = [*engine.docker_command, "build", "--progress=plain", f"--file={dockerfile}", f"--tag={tag}"]
    command += ["--network=host", f"--build-arg=BASE={base.name}"]
    command += [f"--secret=id=ca_bundle,src={bundle}"] if bundle else []
    done = subprocess.run(
        [*command, str(context)],
        env=engine.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=BUILD_TIMEOUT_S,
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout
