"""Read a request's body under the limits, and find the images in it: raw, multipart or JSON with base64."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import orjson
from pydantic import ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from app.errors import InvalidImage, InvalidRequest, PayloadTooLarge, RequestError
from app.http.errors import describe_validation
from app.http.schemas import ClassifyFields, ClassifyJson
from app.scheduling.admission import Permit

MAX_FORM_FIELDS = 16  # there are three parameters


@dataclass(frozen=True, slots=True)
class Upload:
    """The images of one request, in order; an image that could not even be taken out of the body is its error."""

    images: list[bytes | RequestError]
    fields: ClassifyFields  # parameters that came in the body
    several: bool  # the request has the form of a list, so the answer gives errors beside the images


class _InMemoryParser(MultiPartParser):
    """The body is in memory already: parts are not written to disk again."""

    spool_max_size = 2**62
    complete = False  # the closing boundary came

    def on_part_begin(self) -> None:
        # Not the charset of the Content-Type, which RFC 7578 does not know: some of Python's codecs take seconds for a
        # name of some kilobytes, and fail in ways of their own.
        self._charset = "utf-8"
        super().on_part_begin()

    def on_end(self) -> None:
        self.complete = True

    @property
    def too_many_files(self) -> bool:
        return self._current_files > self.max_files


async def read_upload(request: Request, permit: Permit, *, max_bytes: int, max_images: int) -> Upload:
    """Read and take apart a body.

    Args:
        permit: holds the bytes while the request lives.
        max_bytes: of the whole body.
        max_images: in one request.

    Raises:
        PayloadTooLarge: as soon as it is known, before the rest is read.
        InvalidRequest: the body has not the form that its content type says.
        Overloaded: too many bytes are held already.
    """
    body = await _read_body(request, permit, max_bytes)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return await _from_multipart(request.headers, body, max_images)
    if media_type == "application/json":
        return _from_json(body, max_images)
    # Anything else is one image: what it is decides its content, not its label. curl --data-binary without a header
    # says application/x-www-form-urlencoded, for one.
    return Upload([body], ClassifyFields(), several=False)


async def _read_body(request: Request, permit: Permit, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal():
        if int(announced) > max_bytes:
            raise PayloadTooLarge(f"the body has {announced} bytes and at most {max_bytes} are accepted")
        permit.take_bytes(int(announced))
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                raise PayloadTooLarge(f"the body has more than the {max_bytes} bytes that are accepted")
            if size > permit.num_bytes:  # no length was announced
                permit.take_bytes(size - permit.num_bytes)
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise InvalidRequest("the connection was closed before the whole body had come") from error
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _from_multipart(headers: Headers, body: bytes, max_images: int) -> Upload:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = _InMemoryParser(headers, stream(), max_files=max_images, max_fields=MAX_FORM_FIELDS)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # KeyError: no boundary in the content type
        if parser.too_many_files:
            raise _too_many(max_images) from error
        raise InvalidRequest(f"the multipart body cannot be read: {error}") from error
    if not parser.complete:  # the last part would be missing without a word
        raise InvalidRequest("the multipart body ends before its closing boundary; send it whole")
    images: list[bytes | RequestError] = []
    fields: dict[str, str] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            images.append(value.file.read())
        else:
            fields[name] = value
    _check_count(len(images), max_images, "the multipart body has no file; send each image as a file part")
    try:
        return Upload(images, ClassifyFields.model_validate(fields), several=len(images) > 1)
    except ValidationError as error:
        raise InvalidRequest(describe_validation(error.errors())) from error


def _from_json(body: bytes, max_images: int) -> Upload:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    # Counted before pydantic looks: it writes down every fault of every element, which may be millions.
    if isinstance(value, dict):
        if len(value) > MAX_FORM_FIELDS:
            raise InvalidRequest(f"the JSON object has {len(value)} keys; there are {', '.join(ClassifyJson.model_fields)}")
        if isinstance(images := value.get("images"), list):
            _check_count(len(images), max_images, 'the list "images" is empty')
    try:
        parsed = ClassifyJson.model_validate(value)
    except ValidationError as error:
        raise InvalidRequest(describe_validation(error.errors())) from error
    fields = ClassifyFields(model=parsed.model, version=parsed.version, top_k=parsed.top_k)
    return Upload([_from_base64(text) for text in parsed.images], fields, several=len(parsed.images) > 1)


def _from_base64(text: str) -> bytes | RequestError:
    if text.startswith("data:"):  # as a browser's FileReader gives it
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return InvalidImage(f"this is not base64: {error}")


def _check_count(count: int, max_images: int, if_none: str) -> None:
    if not count:
        raise InvalidRequest(if_none)
    if count > max_images:
        raise _too_many(max_images)


def _too_many(max_images: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the request has more than the {max_images} images that are accepted at once")
