"""The real process beside a thousand connections that mean no good, and a log that nobody reads."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.app.http.served import CLASSIFY, check_answer
from tests.app.http.wire import read_response
from tests.e2e.servers import ROOT, Server
from tests.fakes import PATIENCE_S
from tests.images import make_jpeg, photo

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

JPEG = make_jpeg(photo(seed=5))
GOOD = f"POST {CLASSIFY} HTTP/1.1\r\nHost: fovea\r\nContent-Length: {len(JPEG)}\r\n\r\n".encode() + JPEG
LIVE = b"GET /health/live HTTP/1.1\r\nHost: fovea\r\n\r\n"
NUM_BAD = 1000
HEAD_TIMEOUT_S = 4
MAX_GROWTH_MIB = 64


def memory_mib(server: Server) -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


@contextmanager
def bad_company(port: int) -> Iterator[None]:
    """`tests.integration.bad_company`, in a process of its own."""
    command = [sys.executable, "-m", "tests.integration.bad_company", str(port), str(NUM_BAD)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            yield
            assert process.poll() is None
        finally:
            process.kill()


async def classify(port: int, count: int) -> None:
    """So many requests on connections of their own, one after the other."""
    for _ in range(count):
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GOOD)
            check_answer(await read_response(reader))
            writer.close()


@pytest.mark.parametrize("max_files", [512, None], ids=["512 files", "files enough"])
async def test_good_requests_are_answered_beside_a_thousand_bad_connections(
    tiny_repository: Path, tmp_path: Path, max_files: int | None
) -> None:
    """On new connections and on one that stays; memory stays, and so do descriptors."""
    settings = {"HTTP__HEAD_TIMEOUT_S": HEAD_TIMEOUT_S, "RUNTIME__INSTANCES": 1}
    with Server(tiny_repository, tmp_path / "log", max_files=max_files, **settings) as server:
        await classify(server.port, 20)
        before = memory_mib(server)
        with bad_company(server.port):
            await asyncio.sleep(HEAD_TIMEOUT_S)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            for _ in range(40):
                await classify(server.port, 1)
                writer.write(GOOD)
                check_answer(await read_response(reader))
            writer.close()
            assert memory_mib(server) - before < MAX_GROWTH_MIB
        ended = server.samples("fovea_connections_closed_total")
        assert ended[(("reason", "head_bytes"),)] > 0
        assert ended[(("reason", "head_timeout" if max_files is None else "evicted"),)] > 0
        server.wait_idle()
        server.stop()
        assert len(server.written().splitlines()) < 100  # however many connections were ended


async def test_many_requests_at_once_on_one_connection(tiny_repository: Path, tmp_path: Path) -> None:
    """Two hundred images and twenty thousand looks at the health, all sent before the first answer is read."""
    with Server(tiny_repository, tmp_path / "log") as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        sending = asyncio.ensure_future(_send(writer, GOOD * 200))
        for _ in range(200):
            check_answer(await read_response(reader))
        await sending
        sending = asyncio.ensure_future(_send(writer, LIVE * 20_000))
        num_answers, tail = 0, b""
        while num_answers < 20_000:
            async with asyncio.timeout(PATIENCE_S):
                tail += await reader.read(2**16)
            num_answers += tail.count(b'{"live":true}')
            tail = tail[tail.rfind(b"}") + 1 :]
        await sending
        assert (num_answers, tail) == (20_000, b"")
        writer.close()
        server.wait_idle()
        server.stop()


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    for start in range(0, len(data), 2**16):
        writer.write(data[start : start + 2**16])
        await writer.drain()
