"""A connection that is written to and read from by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx

from tests.app.http.served import CLASSIFY, Served
from tests.fakes import PATIENCE_S

Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[Wire]:
    """A connection that is written to and read from by hand."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.client.base_url.port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield reader, writer
    finally:
        writer.close()


def request(body: bytes, *headers: str, version: str = "1.1", query: str = "", num_bytes: int | None = None) -> bytes:
    """One image as the body, as it goes over the wire."""
    lines = [f"POST {CLASSIFY}{query} HTTP/{version}", "Host: fovea", f"Content-Length: {num_bytes or len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def read_response(reader: asyncio.StreamReader) -> httpx.Response:
    """The next one on a connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    if head[0].split()[1] == "100":
        return httpx.Response(100)
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in head[1:] if line)]
    length = dict(headers).get("content-length")
    content = await (reader.read() if length is None else reader.readexactly(int(length)))
    return httpx.Response(int(head[0].split()[1]), headers=headers, content=content)


async def read_all(reader: asyncio.StreamReader) -> list[httpx.Response]:
    """Every answer until the server ends the connection."""
    responses = []
    with suppress(ConnectionResetError):
        while not reader.at_eof():
            try:
                responses.append(await read_response(reader))
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    raise
    return responses
