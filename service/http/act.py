"""`POST /act`, whatever carries its bytes: opened by its headers, read, run, answered."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping

from pydantic_core import to_json

from export.manifest import Manifest
from service.engine.block import Answer
from service.engine.engine import Engine
from service.errors import Malformed, ServiceError, UnsupportedContentType, short
from service.http.accept import quality
from service.http.body import check_announced, check_encoding
from service.http.codec import JSON, Codec
from service.http.json_codec import JsonCodec
from service.http.keys import Keys
from service.http.safetensors_codec import SafetensorsCodec
from service.metrics import Metrics
from service.settings import Settings

logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]

REPLAYED = (b"replayed", b"true")
OF_TWO_SESSIONS = "`X-Session-Id` is given twice, with two names"

HEEDED = {
    *(b"content-type", b"content-length", b"content-encoding", b"transfer-encoding"),
    *(b"accept", b"authorization", b"expect", b"x-session-id"),
}
"""Headers, of which a request has many more."""


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
        logger.exception("a request for a step failed")
        self.refuse(ServiceError("internal error"))


class Act:
    """The one way from a request's headers and body to the engine and back, for one policy."""

    def __init__(self, engine: Engine, manifest: Manifest, settings: Settings, keys: Keys) -> None:
        self._engine = engine
        self._keys = keys
        self._timeout_ms = settings.timeout_ms
        spec = manifest.spec
        codecs = (
            JsonCodec(spec, max_rows=engine.max_rows, max_body_bytes=settings.max_body_bytes),
            SafetensorsCodec(spec, max_rows=engine.max_rows),
        )
        self._json = codecs[0]
        self.max_body_bytes = {codec.content_type: codec.max_body_bytes for codec in codecs}
        """Of a request in each form."""
        self._codecs: Mapping[bytes, Codec] = {
            codec.content_type.encode(): codec for codec in codecs
        }

    def open(self, exchange: Exchange, headers: Headers) -> None:
        """Raises why a request with these headers, names in lower case, need not be read."""
        content_type = content_length = accept = authorization = None
        encodings: Headers = []
        is_of_two_sessions = False
        for name, value in headers:
            if name not in HEEDED:
                continue
            if name == b"content-type":
                content_type = value
            elif name == b"content-length":
                content_length = value
            elif name == b"accept":
                accept = value if accept is None else b"%b,%b" % (accept, value)
            elif name == b"x-session-id":
                is_of_two_sessions |= exchange.session_header not in (None, value)
                exchange.session_header = value
            elif name in (b"content-encoding", b"transfer-encoding"):
                encodings.append((name, value))
            elif name == b"expect":
                exchange.expects_continue = value.lower() == b"100-continue"
            else:  # given twice it is no key: none has a space in it
                authorization = (
                    value if authorization is None else b"%b, %b" % (authorization, value)
                )
        if self._keys.are_needed_to_act:
            self._keys.check_act(authorization)
        if is_of_two_sessions:
            raise Malformed(OF_TWO_SESSIONS)
        for name, value in encodings:
            check_encoding(name, value)
        if content_type == b"application/json":
            exchange.reads = self._json
        else:
            exchange.reads = self._codec(content_type)
        exchange.writes = exchange.reads
        if accept is not None and accept != b"*/*":
            exchange.writes = self._preferred(accept.decode("latin-1"), exchange.reads)
        if content_length is not None:
            check_announced(content_length, exchange.reads.max_body_bytes)
        self._engine.check_open()

    def run(self, body: bytes | bytearray, exchange: Exchange) -> None:
        """Has `exchange`, which was let in, answered or refused: now, or when its batch has run."""
        try:
            block, timeout_ms = exchange.reads.parse(body)
            if exchange.session_header is not None:
                _check_session(exchange.session_header, block.session_id)

            def settle(answer: Answer | ServiceError) -> None:
                if isinstance(answer, ServiceError):
                    exchange.refuse(answer)
                    return
                try:
                    content = exchange.writes.write(block, answer)
                except Exception:
                    exchange.fail()
                else:
                    exchange.answer(content, is_replay=answer.is_replay)

            self._engine.submit(
                block,
                settle,
                is_wanted=exchange.is_wanted,
                timeout_s=(timeout_ms or self._timeout_ms) / 1000,
            )
        except ServiceError as error:
            exchange.refuse(error)
        except Exception:
            exchange.fail()

    def _codec(self, given: bytes | None) -> Codec:
        forms = " or ".join(codec.content_type for codec in self._codecs.values())
        if given is None:
            raise UnsupportedContentType(f"there is no Content-Type; send {forms}")
        content_type = given.decode("latin-1").partition(";")[0].strip().lower()
        codec = self._codecs.get(content_type.encode())
        if codec is None:
            raise UnsupportedContentType(
                f"the content type is {short(content_type)!r}; send {forms}"
            )
        return codec

    def _preferred(self, accept: str, reads: Codec) -> Codec:
        """The form the client would rather have; where it does not say, that of its request."""
        codecs = sorted(self._codecs.values(), key=lambda codec: codec is not reads)
        return max(codecs, key=lambda codec: quality(accept, codec.content_type))


def _check_session(header: bytes, session_id: str | None) -> None:
    """Raises Malformed where a balancer that went by the header may have come to the wrong server.

    What is not ASCII comes as UTF-8 or as Latin-1, as clients have it.
    """
    if session_id is None or (
        header != session_id.encode() and header.decode("latin-1") != session_id
    ):
        raise Malformed("`X-Session-Id` does not name the session of the request")
