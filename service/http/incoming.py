"""A request as a connection has it: on the short way to the policy, or on uvicorn's to FastAPI.

`start` is called when the requests before it are answered; `feed` with each piece of its body and
`finish` when all of it is here, both maybe before its start; `hang_up` when its client is gone.
"""

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl

from service.errors import Disconnected, Draining, ServiceError, TooLarge
from service.http.act import Exchange, Headers
from service.http.body import check_length
from service.http.codec import JSON

if TYPE_CHECKING:
    from service.http.connection import Connection

logger = logging.getLogger(__name__)


class DirectRequest(Exchange):
    """One `POST /act`: no task, no ASGI scope, and the answer in one write."""

    __slots__ = (
        "_connection",
        "_headers",
        "_is_submitted",
        "_may_continue",
        "body",
        "keep_alive",
        "more_body",
        "response_complete",
    )

    def __init__(
        self, connection: "Connection", headers: Headers, *, keep_alive: bool, version: str
    ) -> None:
        super().__init__(connection.shared.metrics)
        self._connection = connection
        self._headers = headers
        self._is_submitted = False
        self._may_continue = version != "1.0"  # whose clients know no answer before the answer
        self.body: bytes | bytearray = b""
        self.more_body = True
        self.keep_alive = keep_alive
        self.response_complete = False

    def start(self) -> None:
        connection = self._connection
        try:
            connection.shared.act.open(self, self._headers)
            check_length(len(self.body), self.reads.max_body_bytes)
        except ServiceError as error:
            self.refuse(error)
            return
        if not self.more_body:
            self._submit()
        elif self.expects_continue and self._may_continue:
            connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def feed(self, body: bytes) -> None:
        if not self.body:
            self.body = body
        else:
            if isinstance(self.body, bytes):  # one in a thousand pieces is not copied so often
                self.body = bytearray(self.body)
            self.body += body
        if self._connection.current is self:
            try:
                check_length(len(self.body), self.reads.max_body_bytes)
            except TooLarge as error:
                self.refuse(error)

    def finish(self) -> None:
        if self._connection.current is self:
            self._submit()

    def _submit(self) -> None:
        self._is_submitted = True
        self._connection.shared.act.run(self.body, self)

    def hang_up(self) -> None:
        if not self._is_submitted:  # or the batcher finds it is not wanted, and says so
            self.refuse(Disconnected("the client hung up"))

    def is_wanted(self) -> bool:
        return not self._connection.transport.is_closing()

    def respond(
        self, status: int, headers: Headers, content: bytes, content_type: str = JSON
    ) -> None:
        self.response_complete = True
        if status == Disconnected.status_code or self._connection.transport.is_closing():
            return
        if status == TooLarge.status_code or (self.more_body and self.expects_continue):
            # The rest is more than anybody wants to read, or may never come.
            self.keep_alive = False
        if not self.keep_alive:
            headers.append((b"connection", b"close"))
        self._connection.write(status, headers, content, content_type)
        self._connection.on_response_complete()


class AsgiRequest(RequestResponseCycle):
    """Any other request, as uvicorn has it."""

    def __init__(
        self,
        connection: "Connection",
        method: str,
        target: dict[str, str | bytes],
        version: str,
        *,
        keep_alive: bool,
    ) -> None:
        transport, headers = connection.transport, connection.headers
        scope: Any = {
            "type": "http",
            "asgi": {"version": connection.config.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": get_local_addr(transport),
            "client": get_remote_addr(transport),
            "scheme": "https" if is_ssl(transport) else "http",
            "method": method,
            "root_path": "",
            **target,
            "headers": headers,
            "state": connection.app_state.copy(),
        }
        super().__init__(
            scope=scope,
            transport=_Ending(connection),  # type: ignore[arg-type]
            flow=connection.flow,
            logger=logger,
            access_logger=logger,
            access_log=False,
            default_headers=connection.server.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=version != "1.0" and (b"expect", b"100-continue") in headers,
            keep_alive=keep_alive,
            on_response=connection.on_response_complete,
        )
        self._connection = connection

    def start(self) -> None:
        connection = self._connection
        task = connection.loop.create_task(self.run_asgi(self._answered))
        task.add_done_callback(connection.server.tasks.discard)
        connection.server.tasks.add(task)

    async def _answered(self, *of_asgi: Any) -> None:
        """The application, which uvicorn cancels once its patience with the end is over."""
        try:
            await self._connection.config.loaded_app(*of_asgi)
        except asyncio.CancelledError:
            self.refuse(Draining("the server is shutting down"))

    async def send_500_response(self) -> None:
        self.refuse(ServiceError("internal error"))

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start" and (
            message["status"] == TooLarge.status_code
            or (self.more_body and self.waiting_for_100_continue)
        ):
            self.keep_alive = False
        await super().send(message)

    def feed(self, body: bytes) -> None:
        self.body += body
        if len(self.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.message_event.set()

    def finish(self) -> None:
        self.message_event.set()

    def hang_up(self) -> None:
        self.disconnected = True
        self.message_event.set()

    def refuse(self, error: ServiceError) -> None:
        """The answer in the application's stead, which is told that the client hung up."""
        if self.disconnected:
            return
        if self.response_started:
            self._connection.transport.abort()
            return
        self.hang_up()
        self.response_complete = True
        self._connection.write_refusal(error)


class _Ending:
    """What uvicorn takes for the transport: to close it is to end the connection, in good order."""

    def __init__(self, connection: "Connection") -> None:
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing
        self.close = connection.end
