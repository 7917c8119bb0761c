"""A relay between a client and the server, to see what the client sends and over how many connections."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.fakes import PATIENCE_S


class Relay(socketserver.ThreadingTCPServer):
    """Passes on everything that comes, both ways, and keeps what the clients sent.

    Args:
        port: of the server, on this machine.
    """

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = ("127.0.0.1", port)
        self.sent: list[bytearray] = []  # on each connection, in the order in which they were opened

    @property
    def port(self) -> int:
        port: int = self.server_address[1]
        return port


class _Handler(socketserver.BaseRequestHandler):
    server: Relay
    request: socket.socket

    def handle(self) -> None:
        sent = bytearray()
        self.server.sent.append(sent)
        with socket.create_connection(self.server.upstream, timeout=PATIENCE_S) as upstream:
            self.request.settimeout(PATIENCE_S)
            back = threading.Thread(target=_pass_on, args=(upstream, self.request, bytearray()))
            back.start()
            _pass_on(self.request, upstream, sent)
            back.join()


@contextmanager
def relaying(port: int) -> Iterator[Relay]:
    """A relay that runs; afterwards all its connections are closed."""
    with Relay(port) as relay:
        thread = threading.Thread(target=relay.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield relay
        finally:
            relay.shutdown()
            thread.join()


def _pass_on(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    with suppress(OSError):  # one of the two has left
        while piece := source.recv(65536):
            kept += piece
            target.sendall(piece)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
