"""Take a multipart/form-data body (RFC 7578, RFC 2046 section 5.1) apart by searching it for its boundary.

python-multipart reads some of what a client may choose byte by byte: 20 MB of line beginnings that only look like the
boundary, or of blanks behind it, hold the event loop for seconds. A body that is in memory can be searched and sliced instead,
at the speed of `bytes.find`; the library keeps the parameters of a header line, which is the fiddly part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header

from app.errors import InvalidRequest

MAX_HEAD_BYTES = 4096  # of one part's header lines: a long file name in UTF-8, twice
MAX_PARAMETERS = 64  # of one header line, separators inside quotes included; there are two or three
MAX_PADDING_BYTES = 256  # blanks behind a boundary, which a gateway may add (RFC 2046)
UNREADABLE = "the multipart body cannot be read: "


@dataclass(frozen=True, slots=True)
class Part:
    """One part: a file where it has a file name, else a field."""

    name: str
    is_file: bool
    content: bytes


def iter_parts(body: bytes, content_type: str) -> Iterator[Part]:
    """The parts in order, each when it is asked for: who has enough of them stops.

    Raises:
        InvalidRequest: what is reached is not multipart; also where the closing boundary is missing, when the parts
            before it have been given.
    """
    delimiter = b"\r\n--" + _boundary(content_type)
    if body.startswith(delimiter[2:]):
        end = -2  # as if the line end were there
    elif (end := body.find(delimiter)) < 0:  # what is before it is a preamble, for old mail programs
        if not body:
            raise _cut_off()
        raise InvalidRequest(UNREADABLE + "no line of it begins with the boundary that its content type names")
    while (begin := _after_boundary(body, end + len(delimiter))) is not None:
        # The empty line may come at once, and the line end before the next boundary may be the empty line's own.
        head_end = body.find(b"\r\n\r\n", begin - 2, begin + MAX_HEAD_BYTES)
        end = body.find(delimiter, begin - 2 if head_end < 0 else head_end + 2)
        if end < 0:
            raise _cut_off()
        head = body[begin:head_end]
        if head_end < 0 or delimiter in head:
            raise InvalidRequest(
                UNREADABLE + f"the header lines of a part do not end with an empty line within {MAX_HEAD_BYTES} bytes"
            )
        name, is_file = _disposition(head)
        yield Part(name, is_file, body[head_end + 4 : end])


def _boundary(content_type: str) -> bytes:
    options = _options(content_type.encode("latin-1"))
    if not options.get(b"boundary"):
        raise InvalidRequest(UNREADABLE + "its content type names no boundary")
    return options[b"boundary"]


def _after_boundary(body: bytes, position: int) -> int | None:
    """Where the part behind this boundary begins; None behind the closing one."""
    if body.startswith(b"--", position):
        return None  # what follows is an epilogue, for old mail programs
    line_end = body.find(b"\r\n", position, position + MAX_PADDING_BYTES)
    if line_end >= 0 and not body[position:line_end].strip(b" \t"):
        return line_end + 2
    if len(body) <= position + 1:
        raise _cut_off()
    if body.startswith(b"\n", position):
        raise InvalidRequest(UNREADABLE + "its lines end with LF; they must end with CR LF")
    raise InvalidRequest(UNREADABLE + "a line begins with the boundary and goes on; no data may do that")


def _disposition(head: bytes) -> tuple[str, bool]:
    """The name that Content-Disposition gives a part, and whether it gives a file name."""
    options: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n") if head else ():
        key, colon, value = line.partition(b":")
        if not colon or key != key.strip():  # also a line that goes on with the one before (obs-fold)
            raise InvalidRequest(UNREADABLE + "a header line of a part is not of the form 'name: value'")
        if key.lower() == b"content-disposition":
            options = _options(value.strip())
    if b"name" not in options:
        raise InvalidRequest(UNREADABLE + "a part has no Content-Disposition header with a name")
    # UTF-8 whatever a charset says, which RFC 7578 does not know.
    return options[b"name"].decode(errors="replace"), b"filename" in options


def _options(value: bytes) -> dict[bytes, bytes]:
    if len(value) > MAX_HEAD_BYTES or value.count(b";") > MAX_PARAMETERS:  # the library's time grows with their product
        raise InvalidRequest(
            UNREADABLE + f"a header has more than the {MAX_HEAD_BYTES} bytes or {MAX_PARAMETERS} parameters that are accepted"
        )
    return parse_options_header(value)[1]


def _cut_off() -> InvalidRequest:
    # Its last part would be missing without a word.
    return InvalidRequest("the multipart body ends before its closing boundary; send it whole")
