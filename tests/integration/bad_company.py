"""Connections that say nothing, that say half a head, and a few that send header lines as fast as they can.

`python -m tests.integration.bad_company PORT COUNT`; each is opened again when it was closed, until the process is killed.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import Awaitable, Callable

NUM_FLOODING = 5
FLOOD_BYTES = 60 * 2**20
START = b"POST /v1/classify HTTP/1.1\r\nHost: fovea\r\n"
LINES = b"X-A: aaaaaaaaaa\r\n" * 4096
Behave = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]


async def say_nothing(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()  # until it is closed


async def say_half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(START)
    await reader.read()


async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(START)
    for _ in range(FLOOD_BYTES // len(LINES)):
        writer.write(LINES)
        await writer.drain()


async def again(port: int, behave: Behave) -> None:
    """On one connection after the other."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await behave(reader, writer)
            writer.close()
        except OSError:
            pass
        await asyncio.sleep(0.1)


async def main(port: int, count: int) -> None:
    num_silent = (count - NUM_FLOODING) // 2
    ways = [flood] * NUM_FLOODING + [say_nothing] * num_silent + [say_half] * (count - NUM_FLOODING - num_silent)
    await asyncio.gather(*(again(port, behave) for behave in ways))


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
