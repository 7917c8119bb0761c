"""The server process, and its answer by the plainest client there is, for all others to be compared with."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.http.schemas import ClassifyResponse
from tests.app.http.served import CLASSIFY, labels_of
from tests.e2e.servers import Server
from tests.fakes import PATIENCE_S

Labels = list[tuple[str, float]]
Reference = Callable[[bytes], Labels]


@pytest.fixture(scope="session")
def server(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests here; nothing may stay in flight, and nothing may go wrong inside."""
    with Server(tiny_repository, tmp_path_factory.mktemp("integration") / "log") as server:
        yield server
        server.wait_idle()
        server.stop()
        assert "Traceback" not in server.written()


@pytest.fixture(scope="session")
def reference(server: Server) -> Reference:
    """Gives the labels and probabilities of an image, posted as the body by http.client."""

    def ask(image: bytes) -> Labels:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        try:
            connection.request("POST", CLASSIFY, image)
            response = connection.getresponse()
            assert response.status == 200
            return labels_in(json.loads(response.read()))
        finally:
            connection.close()

    return ask


def labels_in(body: object) -> Labels:
    """Labels and probabilities of an answer with one result."""
    answer = ClassifyResponse.model_validate(body)
    assert len(answer.results) == 1
    return labels_of(answer)
