"""One request to `POST /act` and its one answer, whatever carries them."""

import logging
from abc import ABC, abstractmethod

from pydantic_core import to_json

from service.errors import ServiceError
from service.http.codec import JSON, Codec
from service.metrics import Metrics

logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]

REPLAYED = (b"replayed", b"true")


class Exchange(ABC):
    """Somebody waits for an answer; exactly one of the methods that give one is called, once."""

    __slots__ = ("_metrics", "expects_continue", "reads", "session_header", "writes")

    reads: Codec
    """What its body is in; `writes`: what its answer will be in. Known once it was let in."""
    writes: Codec

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.session_header: bytes | None = None
        """`X-Session-Id`, by which a load balancer may have chosen this server."""
        self.expects_continue = False

    @abstractmethod
    def is_wanted(self) -> bool:
        """Whether the client still waits."""

    @abstractmethod
    def respond(
        self, status: int, headers: Headers, content: bytes, content_type: str = JSON
    ) -> None:
        """Sends the response, of which `headers` are what is particular to it."""

    def answer(self, content: bytes, *, is_replay: bool) -> None:
        """The policy's answer."""
        self._metrics.count("replayed" if is_replay else "ok")
        self.respond(200, [REPLAYED] if is_replay else [], content, self.writes.content_type)

    def refuse(self, error: ServiceError) -> None:
        """The reason why there is none."""
        self._metrics.count(error.error_type)
        headers = [(k.lower().encode(), v.encode()) for k, v in error.headers.items()]
        self.respond(error.status_code, headers, to_json(error.body()))

    def fail(self) -> None:
        """From an `except`: a bug of ours. The client gets a fixed text, the log the rest."""
        logger.exception("POST /act failed")
        self.refuse(ServiceError("internal error"))
