"""The log: one form for everything, on standard error, with the request's id on every line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from typing import Any, Literal

import pytest
import structlog

from app.log import configure, get_logger, request_id

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
