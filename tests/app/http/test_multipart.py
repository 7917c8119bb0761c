"""A multipart body taken apart: what RFC 2046 allows, what is refused in words, and that nothing takes long."""

from __future__ import annotations

import os

import pytest

from app.errors import InvalidRequest
from app.http.multipart import MAX_HEAD_BYTES, MAX_PARAMETERS, Part, iter_parts
from tests.app.http.served import BOUNDARY, MULTIPART, multipart, part

HEAD = b'Content-Disposition: form-data; name="images"; filename="a.jpg"\r\n'
DELIMITER = f"\r\n--{BOUNDARY}".encode()
OPEN, CLOSE = DELIMITER[2:], DELIMITER + b"--"


def parts_of(body: bytes, content_type: str = MULTIPART) -> list[Part]:
    return list(iter_parts(body, content_type))


def with_head(head: bytes) -> bytes:
    """A body of one part with these header lines."""
    return OPEN + b"\r\n" + head + b"\r\nx" + CLOSE


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\r\n",
        b"\r\n\r\n",
        b"\n",
        b"--",
        DELIMITER[:-1],
        DELIMITER[1:],
        b"\r" + DELIMITER[:-1] + b"\r\n",
        os.urandom(100_000),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_content_comes_back_as_it_was(content: bytes) -> None:
    """Also where it looks like a line end or like most of a boundary."""
    body = multipart(part(content), part(b"3", "top_k", None), part(content))
    assert [Part("images", True, content), Part("top_k", False, b"3"), Part("images", True, content)] == parts_of(body)


@pytest.mark.parametrize(
    "body",
    [
        OPEN + b"\r\n" + HEAD + b"\r\nx" + CLOSE,
        b"\r\n" + OPEN + b"\r\n" + HEAD + b"\r\nx" + CLOSE + b"\r\n",
        b"for old programs\r\n\r\nmore" + DELIMITER + b"\r\n" + HEAD + b"\r\nx" + CLOSE + b"\r\nfor old programs" + DELIMITER,
        OPEN + b" \t \r\n" + HEAD + b"\r\nx" + CLOSE + b" \r\n",
        OPEN + b"\r\n" + b"X-More: a: b\r\ncontent-DISPOSITION:form-data;filename=a.jpg ; name=images\r\n\r\nx" + CLOSE,
    ],
    ids=["plain", "line ends around", "preamble and epilogue", "padding", "header lines"],
)
def test_what_the_standard_allows_is_read(body: bytes) -> None:
    """RFC 2046, section 5.1.1."""
    assert [Part("images", True, b"x")] == parts_of(body)


def test_a_part_may_be_empty() -> None:
    """With nothing, or with no more than the empty line, behind its header lines."""
    assert [Part("images", True, b"")] * 2 == parts_of(OPEN + b"\r\n" + HEAD + DELIMITER + b"\r\n" + HEAD + b"\r\n" + CLOSE)
    assert parts_of(OPEN + b"--") == []


@pytest.mark.parametrize(
    ("parameter", "boundary"),
    [('boundary="a b:c"', b"a b:c"), ("charset=utf-7; Boundary=x'()+_,-./:=?", b"x'()+_,-./:=?"), ("boundary=-----", b"-----")],
)
def test_any_boundary_may_be_named(parameter: str, boundary: bytes) -> None:
    """In quotes or not, and with whatever RFC 2046 allows in one."""
    body = b"--" + boundary + b"\r\n" + HEAD + b"\r\nx\r\n--" + boundary + b"--"
    assert [Part("images", True, b"x")] == parts_of(body, f"multipart/form-data; {parameter}")


def test_names_are_utf_8() -> None:
    """What is not is replaced, not guessed."""
    body = with_head('Content-Disposition: form-data; name="größe"\r\n'.encode())
    assert [Part("größe", False, b"x")] == parts_of(body)
    assert [Part("gr\ufffd", False, b"x")] == parts_of(with_head(b'Content-Disposition: form-data; name="gr\xf6"\r\n'))


@pytest.mark.parametrize("length", range(len(multipart(part(b"x"), part(b"", "top_k", None))) - 2))
def test_a_body_cut_off_anywhere_is_refused(length: int) -> None:
    """Its last part would be missing, or short, without a word."""
    body = multipart(part(b"x"), part(b"", "top_k", None))
    with pytest.raises(InvalidRequest, match=r"closing boundary|cannot be read"):
        parts_of(body[: max(0, length - 2)])


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b"", MULTIPART, "closing boundary"),
        (multipart(part(b"x")), "multipart/form-data", "names no boundary"),
        (multipart(part(b"x")), "multipart/form-data; boundary=", "names no boundary"),
        (multipart(part(b"x")), "multipart/form-data; boundary=" + "x" * MAX_HEAD_BYTES, "bytes"),
        (multipart(part(b"x")), "multipart/form-data; boundary=other", "no line of it begins with the boundary"),
        (multipart(part(b"x")).replace(b"\r\n", b"\n"), MULTIPART, "CR LF"),
        (multipart(part(b"x" + DELIMITER + b"y")), MULTIPART, "goes on"),
        (OPEN + b" " * 1000 + b"\r\n" + HEAD + b"\r\nx" + CLOSE, MULTIPART, "goes on"),
        (OPEN + b"\r\n" + HEAD + CLOSE[2:], MULTIPART, "empty line"),
        (OPEN + b"\r\n" + HEAD[:-2] + DELIMITER + b"\r\n" + HEAD + b"\r\nx" + CLOSE, MULTIPART, "empty line"),
        (with_head(b"X: " + b"y" * MAX_HEAD_BYTES + b"\r\n" + HEAD), MULTIPART, "empty line"),
        (with_head(HEAD[:-2] + b";" * MAX_PARAMETERS + b"\r\n"), MULTIPART, "parameters"),
        (with_head(b""), MULTIPART, "Content-Disposition"),
        (with_head(b"Content-Type: image/jpeg\r\n"), MULTIPART, "Content-Disposition"),
        (with_head(b"Content-Disposition: form-data; filename=a\r\n"), MULTIPART, "name"),
        (with_head(b"no header line\r\n"), MULTIPART, "form"),
        (with_head(b"Content-Disposition: form-data;\r\n name=images\r\n"), MULTIPART, "form"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(body: bytes, content_type: str, words: str) -> None:
    """A sentence that says what to mend."""
    with pytest.raises(InvalidRequest, match=words):
        parts_of(body, content_type)


def test_who_has_enough_stops() -> None:
    """The rest is not looked at: it may be millions of parts."""
    parts = iter_parts(OPEN + b"\r\n" + HEAD + b"\r\nx" + DELIMITER + b"nonsense", MULTIPART)
    assert next(parts) == Part("images", True, b"x")
    with pytest.raises(InvalidRequest):
        next(parts)
