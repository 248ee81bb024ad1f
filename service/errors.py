"""What can go wrong with a request, each with its status; turned into a response in one place.

    ServiceError                500 internal
        Malformed               400 malformed
        Unauthorized            401 unauthorized
        Forbidden               403 forbidden
        UnknownSession          404 unknown_session
        UnknownModel            404 unknown_model
        RequestTimeout          408 request_timeout
        StepConflict            409 step_conflict
        PushConflict            409 push_conflict
        NoPreviousVersion       409 no_previous_version
        SessionLost             410 session_lost
        VersionMismatch         412 version_mismatch
        TooLarge                413 too_large
        UnsupportedContentType  415 unsupported_content_type
        Invalid                 422 invalid
        Overloaded              429 overloaded
        HeadersTooLarge         431 headers_too_large
        NotReady                503 not_ready
        Draining                503 draining
        DeadlineExceeded        504 deadline_exceeded
        Disconnected            499 disconnected; sent to nobody

The message is for the client: what, which one, what to do. Anything else that is raised is a bug of
ours: the client gets a fixed sentence, the log gets the rest.
"""

from math import ceil

LONGEST_NAME = 80


class ServiceError(Exception):
    """The server failed; the log says how."""

    status_code = 500
    error_type = "internal"
    headers: dict[str, str] = {}  # noqa: RUF012 - read only, overridden by subclasses

    def body(self) -> dict[str, str]:
        return {"error": str(self), "error_type": self.error_type}


class Malformed(ServiceError):
    """The body is not JSON, or not of the request's form."""

    status_code, error_type = 400, "malformed"


class Unauthorized(ServiceError):
    """The request has no key, or none of this server's."""

    status_code, error_type = 401, "unauthorized"
    headers = {"WWW-Authenticate": "Bearer"}  # noqa: RUF012


class Forbidden(ServiceError):
    """The route is not open to this key, or not to requests from elsewhere."""

    status_code, error_type = 403, "forbidden"


class UnknownSession(ServiceError):
    """The session was never started here."""

    status_code, error_type = 404, "unknown_session"


class UnknownModel(ServiceError):
    """The server serves one policy, and not under this name."""

    status_code, error_type = 404, "unknown_model"


class RequestTimeout(ServiceError):
    """The request has not arrived in the time allowed for it."""

    status_code, error_type = 408, "request_timeout"


class StepConflict(ServiceError):
    """The request is not the session's next step, nor a retry of its last one."""

    status_code, error_type = 409, "step_conflict"


class PushConflict(ServiceError):
    """Other weights are being checked."""

    status_code, error_type = 409, "push_conflict"


class NoPreviousVersion(ServiceError):
    """There are no weights to go back to."""

    status_code, error_type = 409, "no_previous_version"


class VersionMismatch(ServiceError):
    """The version that serves is not the one the request was made for."""

    status_code, error_type = 412, "version_mismatch"


class SessionLost(ServiceError):
    """The session was here and its state is gone; the episode must start anew."""

    status_code, error_type = 410, "session_lost"


class TooLarge(ServiceError):
    """The body is larger than any request of this policy can be."""

    status_code, error_type = 413, "too_large"


class UnsupportedContentType(ServiceError):
    """The body is of a kind, or encoded in a way, that this server does not read."""

    status_code, error_type = 415, "unsupported_content_type"


class Invalid(ServiceError):
    """The request is well formed, and its values are not the policy's: shape, NaN, empty mask."""

    status_code, error_type = 422, "invalid"


class Overloaded(ServiceError):
    """As many requests wait, or sessions live, as the server takes; back off and retry."""

    status_code, error_type = 429, "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.headers = {"Retry-After": str(max(1, ceil(retry_after_s)))}


class HeadersTooLarge(ServiceError):
    """The request line and headers are larger than any client of ours needs."""

    status_code, error_type = 431, "headers_too_large"


class NotReady(ServiceError):
    """The runtime is still warming up."""

    status_code, error_type = 503, "not_ready"
    headers = {"Retry-After": "1"}  # noqa: RUF012


class Draining(ServiceError):
    """The server is shutting down and takes no new work."""

    status_code, error_type = 503, "draining"


class DeadlineExceeded(ServiceError):
    """The request's time ran out before the model saw it; its session has not moved."""

    status_code, error_type = 504, "deadline_exceeded"


class Disconnected(ServiceError):
    """The client hung up before the model saw its request; its session has not moved."""

    status_code, error_type = 499, "disconnected"


def short(name: str) -> str:
    """A client's own name, as far as a sentence needs it, and on one line."""
    shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in shown)
