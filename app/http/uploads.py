"""Read a request's body under the limits, and find the images in it: raw, multipart or JSON with base64."""

from __future__ import annotations

import binascii
from functools import partial

import orjson
from pydantic import ValidationError
from starlette.types import Receive

from app.errors import InvalidImage, InvalidRequest, PayloadTooLarge
from app.http.errors import describe_validation
from app.http.multipart import iter_parts
from app.http.schemas import ClassifyFields, ClassifyJson
from app.request import Parameters, Upload
from app.scheduling.admission import Permit
from app.types import EncodedImage

MAX_FORM_FIELDS = 16  # there are three parameters
MAX_JSON_BRACKETS = 64  # an object and a list are needed
MAX_FIELD_BYTES = 2**16
MAX_PIECES = 64  # kept as they came; a byte in an object of its own takes forty
BASE64_SLICE = 2**18  # characters; a multiple of 4
FORMS = MULTIPART, JSON = "multipart/form-data", "application/json"  # any other body is one image


async def read_body(receive: Receive, announced: str, permit: Permit, max_bytes: int) -> bytes:
    """The whole body.

    Args:
        receive: the ASGI server's.
        announced: the request's Content-Length; empty where it has none.
        permit: holds the bytes while the request lives.
        max_bytes: the most that is accepted.

    Raises:
        PayloadTooLarge: as soon as it is known, before the rest is read.
        InvalidRequest: the client left before the end.
        Overloaded: too many bytes are held already.
    """
    if announced.isdecimal():
        if int(announced) > max_bytes:
            raise PayloadTooLarge(f"the body has {announced} bytes and at most {max_bytes} are accepted")
        permit.take_bytes(int(announced))
    pieces: list[bytes | bytearray] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the connection was closed before the whole body had come")
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size > max_bytes:
            raise PayloadTooLarge(f"the body has more than the {max_bytes} bytes that are accepted")
        if size > permit.num_bytes:  # no length was announced
            permit.take_bytes(size - permit.num_bytes)
        # However small the pieces are, they take hardly more memory than they are long.
        if len(pieces) < MAX_PIECES:
            pieces.append(piece)
        elif isinstance(last := pieces[-1], bytearray):
            last += piece
        else:
            pieces.append(bytearray(piece))
    return pieces[0] if len(pieces) == 1 and isinstance(pieces[0], bytes) else b"".join(pieces)


def take_apart(media_type: str, content_type: str, body: bytes, max_images: int) -> Upload:
    """The images of a body, and the parameters in it.

    Args:
        media_type: the content type without its parameters, in lower case.
        max_images: in one request.

    Raises:
        PayloadTooLarge, InvalidRequest: it has too many images, or not the form that its content type says.
    """
    if media_type == MULTIPART:
        return _from_multipart(content_type, body, max_images)
    if media_type == JSON:
        return _from_json(body, max_images)
    # Anything else is one image: what it is decides its content, not its label. curl --data-binary without a header
    # says application/x-www-form-urlencoded, for one.
    return Upload([body], Parameters(), several=False)


def _from_multipart(content_type: str, body: bytes, max_images: int) -> Upload:
    images: list[EncodedImage] = []
    fields: dict[str, str] = {}
    num_fields = 0
    for part in iter_parts(body, content_type):
        if part.is_file:
            images.append(part.content)
            if len(images) > max_images:
                raise _too_many(max_images)
            continue
        if part.name == "images":
            raise InvalidRequest('a part "images" is not a file, because it has no file name; send each image as a file part')
        num_fields += 1
        if num_fields > MAX_FORM_FIELDS:
            raise InvalidRequest(f"the multipart body has more than {MAX_FORM_FIELDS} fields")
        if len(part.content) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"a field of the multipart body has more than {MAX_FIELD_BYTES} bytes")
        fields[part.name] = part.content.decode(errors="replace")
    _check_count(len(images), max_images, "the multipart body has no file; send each image as a file part")
    try:
        return Upload(images, ClassifyFields.model_validate(fields).parameters(), several=len(images) > 1)
    except ValidationError as error:
        raise InvalidRequest(describe_validation(error.errors())) from error


def _from_json(body: bytes, max_images: int) -> Upload:
    # Base64 has no brackets, so a body of our form has a handful; a deep or wide one would hold the event loop for seconds.
    if body.count(b"[") + body.count(b"{") > MAX_JSON_BRACKETS:
        raise InvalidRequest('the JSON body is nested; it must be an object with a list "images" of base64 texts')
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest('the JSON body must be an object with a list "images"')
    # Counted before pydantic looks: it writes down every fault of every element, which may be millions.
    if len(value) > MAX_FORM_FIELDS:
        raise InvalidRequest(f"the JSON object has {len(value)} keys; there are {', '.join(ClassifyJson.model_fields)}")
    if isinstance(images := value.get("images"), list):
        _check_count(len(images), max_images, 'the list "images" is empty')
    try:
        parsed = ClassifyJson.model_validate(value)
    except ValidationError as error:
        raise InvalidRequest(describe_validation(error.errors())) from error
    images = [partial(_from_base64, text) for text in parsed.images]
    return Upload(images, parsed.parameters(), several=len(images) > 1)


def _from_base64(text: str) -> bytes:
    """For a decode thread. In slices: each is one call that holds the interpreter lock, 40 ms for 20 MB in one piece."""
    begin = text.find(",") + 1 if text.startswith("data:") else 0  # as a browser's FileReader gives it
    slices: list[bytes] = []
    try:
        for start in range(begin, len(text), BASE64_SLICE):
            if slices and len(slices[-1]) < BASE64_SLICE // 4 * 3:
                raise ValueError("Excess data after padding")
            slices.append(binascii.a2b_base64(text[start : start + BASE64_SLICE], strict_mode=True))
    except ValueError as error:  # binascii.Error is one
        raise InvalidImage(f"this is not base64: {error}") from error
    return b"".join(slices)


def _check_count(count: int, max_images: int, if_none: str) -> None:
    if not count:
        raise InvalidRequest(if_none)
    if count > max_images:
        raise _too_many(max_images)


def _too_many(max_images: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the request has more than the {max_images} images that are accepted at once")
