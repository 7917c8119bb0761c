"""The log: one form for everything, on standard error, with the request's id on every line."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pytest
import structlog

from app.log import BackgroundStream, configure, get_logger, request_id

Configure = Callable[[str, Literal["auto", "console", "json"]], StringIO]


@pytest.fixture
def configured() -> Iterator[Configure]:
    """Configures logging into a buffer; everything is put back afterwards."""
    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()

    def start(level: str, form: Literal["auto", "console", "json"]) -> StringIO:
        stream = StringIO()
        with redirect_stderr(stream):
            configure(level, form)
        return stream

    yield start
    root.handlers, root.level = handlers, level
    structlog.configure(**config)


def lines(stream: StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_what_happened_where_and_when(configured: Configure) -> None:
    """As one JSON object; values that JSON does not know are written as text."""
    stream = configured("info", "json")
    get_logger("app.somewhere").info("model loaded", model="m", seconds=0.5, path=StringIO)
    (line,) = lines(stream)
    assert tuple(line[key] for key in ("event", "level", "logger", "model", "seconds")) == (
        "model loaded",
        "info",
        "app.somewhere",
        "m",
        0.5,
    )
    assert line["timestamp"].endswith("Z")
    assert "StringIO" in line["path"]
    assert "request_id" not in line


def test_a_line_carries_the_id_of_its_request(configured: Configure) -> None:
    """Also one of the standard library's, from deep below."""
    stream = configured("info", "json")
    token = request_id.set("abc")
    get_logger("ours").info("one")
    logging.getLogger("theirs").warning("two %s", 2)
    request_id.reset(token)
    get_logger("ours").info("three")
    assert [(line["event"], line.get("request_id")) for line in lines(stream)] == [
        ("one", "abc"),
        ("two 2", "abc"),
        ("three", None),
    ]


def test_below_the_level_nothing_is_written(configured: Configure) -> None:
    """Ours and theirs."""
    stream = configured("warning", "json")
    get_logger("ours").info("no")
    logging.getLogger("theirs").info("no")
    get_logger("ours").warning("yes")
    logging.getLogger("theirs").error("yes")
    assert [line["event"] for line in lines(stream)] == ["yes", "yes"]


def test_the_servers_lines_have_the_same_form_and_its_start_is_silent(configured: Configure) -> None:
    """uvicorn brings handlers of its own, and says at its start what ours says better."""
    logging.getLogger("uvicorn").handlers = [logging.StreamHandler(StringIO())]
    stream = configured("info", "json")
    logging.getLogger("uvicorn.error").info("Started server process [1]")
    logging.getLogger("uvicorn.error").error("trouble")
    assert [line["event"] for line in lines(stream)] == ["trouble"]
    assert logging.getLogger("uvicorn").handlers == []


@pytest.mark.parametrize("form", ["json", "console"])
def test_an_exception_is_written_whole_but_without_its_variables(
    configured: Configure, form: Literal["console", "json"]
) -> None:
    """Which may be images, or whole models."""
    stream = configured("info", form)
    secret_of_a_variable = "very " * 3 + "secret"
    try:
        raise KeyError(len(secret_of_a_variable))
    except KeyError:
        get_logger("ours").exception("it broke")
    text = stream.getvalue()
    assert "Traceback (most recent call last)" in text
    assert "KeyError: 21" in text
    assert "very very" not in text
    if form == "json":
        assert len(lines(stream)) == 1


def test_auto_is_json_where_nobody_watches(configured: Configure) -> None:
    """A terminal gets lines for people."""
    stream = configured("info", "auto")
    get_logger("ours").info("one", key="value")
    assert lines(stream)[0]["key"] == "value"

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with redirect_stderr(terminal):
        configure("info", "auto")
    get_logger("ours").info("two", key="value")
    assert "two" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")


def test_a_line_break_in_a_value_forges_no_line(configured: Configure) -> None:
    """A client chooses the path of its request, for one."""
    stream = configured("info", "json")
    get_logger("ours").info("request", path='/a\n{"event": "forged"}')
    assert [line["event"] for line in lines(stream)] == ["request"]
    stream = configured("info", "console")
    get_logger("ours").info("request", path="/a\n2026 [info] forged")
    assert len(stream.getvalue().splitlines()) == 1


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of one page, which nobody reads."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    yield read_end, write_end
    os.close(write_end)


def test_a_log_that_nobody_reads_stops_nobody(pipe: tuple[int, int]) -> None:
    """What does not fit is dropped and counted; when it is read again, the log says how much is missing."""
    read_end, write_end = pipe
    dropped: list[int] = []
    stream = BackgroundStream(write_end, dropped.append, max_lines=10)
    line = "x" * 1000 + "\n"
    for _ in range(100):
        stream.write(line)
    assert 80 <= len(dropped) <= 90
    with os.fdopen(read_end, "rb") as reader:
        assert reader.readline() == line.encode()
        written = 1
        while written < 100 - len(dropped):
            assert reader.readline() == line.encode()
            written += 1
        stream.write("again\n")
        assert reader.readline() == b"again\n"
        stream.close()


def test_lines_that_were_lost_are_told_in_the_log(configured: Configure, pipe: tuple[int, int]) -> None:
    """In the form of the other lines."""
    read_end, write_end = pipe
    stream = BackgroundStream(write_end, lambda _: None, max_lines=1)
    configure("info", "json", stream)
    for number in range(200):
        get_logger("ours").info("x" * 200, number=number)
    with os.fdopen(read_end, "rb") as reader:
        lost = 0
        while lost < 100:
            lost += json.loads(reader.readline()).get("lines", 0)
            get_logger("ours").info("another")
        stream.close()
    assert 100 <= lost <= 400


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_stops_nobody() -> None:
    """Each line is dropped and counted."""
    dropped: list[int] = []
    descriptor = os.open("/dev/full", os.O_WRONLY)
    stream = BackgroundStream(descriptor, dropped.append)
    for _ in range(3):
        stream.write("a line\n")
    stream.close()
    os.close(descriptor)
    assert sum(dropped) == 3


def test_what_waits_is_written_at_the_end() -> None:
    """In order, and whole."""
    read_end, write_end = os.pipe()
    stream = BackgroundStream(write_end, lambda _: None)
    for number in range(100):
        stream.write(f"{number} ä\n")
    stream.close()
    os.close(write_end)
    with os.fdopen(read_end, "rb") as reader:
        assert [f"{number} ä" for number in range(100)] == reader.read().decode().splitlines()


def test_the_same_rubbish_is_logged_once_a_second(configured: Configure) -> None:
    """And an `Upgrade` that is ignored, as it may be, not at all."""
    stream = configured("info", "json")
    logger = logging.getLogger("uvicorn.error")
    for _ in range(1000):
        logger.warning("Invalid HTTP request received.")
        logger.warning("Unsupported upgrade request.")
    logger.error("trouble")
    assert [line["event"] for line in lines(stream)] == ["Invalid HTTP request received.", "trouble"]
