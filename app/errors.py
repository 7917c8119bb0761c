"""What can go wrong, as one tree. A class has a stable `code`; HTTP numbers live in `app.http.errors` alone.

ServiceError
├── RequestError            the caller's fault
│   ├── InvalidRequest      a parameter or the body's form
│   ├── PayloadTooLarge     more bytes or images than accepted
│   ├── ImageTooLarge       more pixels, or memory for them, than accepted; told from the header
│   ├── UnsupportedImage    not one of the accepted formats
│   └── InvalidImage        the right format, but broken
├── ModelNotFound           no such model or version here
├── ModelNotReady           known, but not loaded (yet)
├── Overloaded              no permit left, or too late because of those in front; try again after `retry_after_s`
├── QuotaExceeded           this client has sent too much; try again after `retry_after_s`
├── DeadlineExceeded        the time budget ended first
├── InferenceFailed         the model or the machine; nothing the caller can mend
├── ModelInvalid            a published version is damaged or does not compute as exported
└── StartupError            a setting cannot work on this machine; the service does not start
"""

from __future__ import annotations


class ServiceError(Exception):
    """Base of all; `str(error)` is a sentence for the caller."""

    code = "service_error"


class RequestError(ServiceError):
    code = "request_error"


class InvalidRequest(RequestError):
    code = "invalid_request"


class PayloadTooLarge(RequestError):
    code = "payload_too_large"


class ImageTooLarge(RequestError):
    code = "image_too_large"


class UnsupportedImage(RequestError):
    code = "unsupported_image"


class InvalidImage(RequestError):
    code = "invalid_image"


class ModelNotFound(ServiceError):
    code = "model_not_found"


class ModelNotReady(ServiceError):
    code = "model_not_ready"


class Overloaded(ServiceError):
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceeded(ServiceError):
    code = "quota_exceeded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(ServiceError):
    code = "deadline_exceeded"


class InferenceFailed(ServiceError):
    code = "inference_failed"


class ModelInvalid(ServiceError):
    code = "model_invalid"


class StartupError(ServiceError):
    code = "startup_error"
