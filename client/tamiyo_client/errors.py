"""What can go wrong with a call, in the words of the server's `error_type`.

PolicyError               whatever it is; `status` and `error_type` say what the server did
    InvalidRequest        400, 408, 413, 415, 422, 431: what was sent; nothing has moved
    NotAllowed            401, 403: the key
    StepConflict          409: another client uses the session, or a call whose answer was lost
                          was followed by a call with something else
    SessionLost           404, 410: the session's state is gone; `restart` begins anew
    Unavailable           not before the deadline, after every retry; nothing or one step moved
        Overloaded        429
        NotReady          503
        Draining          503
        DeadlineExceeded  504
        Unreachable       no answer at all, or a proxy's 500, 502; the cause is the network's error
    ServerError           500, or an answer that is no policy's
"""

from __future__ import annotations


class PolicyError(Exception):
    """A call failed; the text is the server's sentence where there was one."""

    def __init__(self, message: str, *, status: int | None = None, error_type: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type


class InvalidRequest(PolicyError):
    """What was sent is not what the policy reads."""


class NotAllowed(PolicyError):
    """The server wants another key, or one at all."""


class StepConflict(PolicyError):
    """The session is not where this client left it."""


class SessionLost(PolicyError):
    """The server does not have the session's state any more: idle, evicted, or restarted."""


class VersionMismatch(PolicyError):
    """The version that serves is not the one that a push was to replace."""


class Unavailable(PolicyError):
    """The server did not answer in time, however often it was asked.

    Whether the step was taken is not known: the same call again finds out, `restart` forgets it.
    """


class Overloaded(Unavailable):
    """As many requests wait as the server takes."""


class NotReady(Unavailable):
    """The server is still warming up."""


class Draining(Unavailable):
    """The server is shutting down."""


class PushConflict(Unavailable):
    """The server was checking other weights all the time."""


class DeadlineExceeded(Unavailable):
    """The policy was not free in time."""


class Unreachable(Unavailable):
    """There was no answer."""


class ServerError(PolicyError):
    """The server failed, or something between here and there answered in its stead."""


BY_TYPE: dict[str, type[PolicyError]] = {
    "unknown_session": SessionLost,
    "session_lost": SessionLost,
    "step_conflict": StepConflict,
    "push_conflict": PushConflict,
    "version_mismatch": VersionMismatch,
    "overloaded": Overloaded,
    "not_ready": NotReady,
    "draining": Draining,
    "deadline_exceeded": DeadlineExceeded,
    "internal": ServerError,
}
BY_STATUS: dict[int, type[PolicyError]] = {
    **dict.fromkeys((400, 408, 413, 415, 422, 431), InvalidRequest),
    **dict.fromkeys((401, 403), NotAllowed),
    409: StepConflict,
    410: SessionLost,
    412: VersionMismatch,
    429: Overloaded,
    500: Unreachable,  # of Ray Serve, when a replica dies
    502: Unreachable,
    503: NotReady,
    504: DeadlineExceeded,
}
"""For what a proxy answers, which knows no `error_type`."""
