"""The HTTP clients that people use, each with its default settings, against the real server process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.app.http.served import CLASSIFY
from tests.e2e.servers import Server
from tests.images import make_jpeg, photo
from tests.integration.conftest import Reference, labels_in
from tests.integration.relay import relaying
from tests.integration.tools import require_package, require_program

pytestmark = pytest.mark.integration

PROGRAMS = Path(__file__).parent / "clients"
FORMS = ["raw", "multipart", "json"]
TIMEOUT_S = 300.0  # the first time, Go compiles its library
JPEGS = {"small": make_jpeg(), "large": make_jpeg(photo(1200, 900), quality=95)}  # in one packet, and in many
GO_OFFLINE = {"GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "GOPROXY": "off", "CGO_ENABLED": "0"}  # nor does it need gcc


@dataclass(frozen=True, slots=True)
class Client:
    """A program in `clients` that posts a photo in each form.

    Args:
        command: without the address and the photo, which come next.
        options: come last.
        require: ends the test where what the program needs is missing.
        asks_for_h2c: it offers with its requests to go on in HTTP/2.
        max_connections: that it opens for its three requests.
    """

    name: str
    command: tuple[str, ...]
    require: Callable[[], None]
    options: tuple[str, ...] = ()
    asks_for_h2c: bool = False
    max_connections: int = 1

    def __str__(self) -> str:
        return self.name

    def post(self, port: int, jpeg: Path) -> list[tuple[str, int, object]]:
        """Run it: form, status and body of each answer."""
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        url = f"http://127.0.0.1:{port}{CLASSIFY}"
        done = subprocess.run(
            [*self.command, url, jpeg, *self.options],
            cwd=PROGRAMS,
            env=environment | GO_OFFLINE,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        return [(answer["form"], answer["status"], answer["body"]) for answer in answers]


def _python(module: str, program: str | None = None) -> Client:
    name = program or module
    return Client(name, (sys.executable, f"post_{name}.py"), partial(require_package, module))


CLIENTS = [
    Client("java", ("java", "Post.java"), partial(require_program, "javac"), asks_for_h2c=True),
    # Node may give an answer before it has given back the answer's connection.
    Client("node", ("node", "post.mjs"), partial(require_program, "node"), max_connections=2),
    Client("go", ("go", "run", "post.go"), partial(require_program, "go")),
    Client("curl", ("bash", "post.sh"), partial(require_program, "curl")),
    Client("curl --http2", ("bash", "post.sh"), partial(require_program, "curl"), ("--http2",), asks_for_h2c=True),
    _python("requests"),
    _python("httpx"),
    _python("httpx", "httpx_async"),
    _python("aiohttp"),
]


@pytest.fixture(params=CLIENTS, ids=str)
def client(request: pytest.FixtureRequest) -> Client:
    """Each of them, where it is installed."""
    client: Client = request.param
    client.require()
    return client


@pytest.fixture(params=JPEGS)
def jpeg(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A photo in a file."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(JPEGS[request.param])
    return path


def test_a_client_gets_the_same_answer_whatever_form_it_uses(
    server: Server, reference: Reference, client: Client, jpeg: Path
) -> None:
    """A raw body, a multipart file and base64 in JSON, each with what the client adds to a request unasked."""
    answers = client.post(server.port, jpeg)

    assert [(form, 200) for form in FORMS] == [(form, status) for form, status, _ in answers], answers
    assert [reference(jpeg.read_bytes())] * len(FORMS) == [labels_in(body) for *_, body in answers]


@pytest.mark.parametrize("jpeg", ["small"], indirect=True)
def test_a_client_can_use_its_connection_again(server: Server, client: Client, jpeg: Path) -> None:
    """The server keeps it open, also where it was asked for another protocol that it does not speak."""
    with relaying(server.port) as relay:
        answers = client.post(relay.port, jpeg)

    sent = b"".join(relay.sent).lower()
    assert [200] * len(FORMS) == [status for _, status, _ in answers], answers
    assert len(FORMS) == sent.count(f"post {CLASSIFY} http/1.1\r\n".encode())
    assert client.asks_for_h2c == (b"\r\nupgrade: h2c\r\n" in sent)
    assert len(relay.sent) <= client.max_connections
