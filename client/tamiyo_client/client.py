"""What every client is: a session's calls, and how they are driven, blocking or awaited."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tamiyo_client.calls import VectorCalls
from tamiyo_client.errors import PolicyError

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Self


class Client(ABC):
    """What all kinds of client keep, and do without the server."""

    def __init__(self, calls: VectorCalls, ssl_context: ssl.SSLContext | None) -> None:
        self._calls = calls
        self._connect(ssl_context)

    @abstractmethod
    def _connect(self, ssl_context: ssl.SSLContext | None) -> None:
        """Makes the transport."""

    @property
    def session_id(self) -> str:
        """The session's name on the server, and in `X-Session-Id`."""
        return self._calls.session.name

    @property
    def url(self) -> str:
        """Of the server that keeps the session."""
        return self._calls.session.url

    def restart(self) -> None:
        """Begins anew, with every row from zeros: after `SessionLost`, or a call given up."""
        self._calls.restart()


class Blocking(Client):
    """A client whose calls return when they are answered. Not to be shared by threads."""

    def _connect(self, ssl_context: ssl.SSLContext | None) -> None:
        from tamiyo_client.transport import Transport  # which takes long to import

        self._transport = Transport(ssl_context)

    def policy(self) -> dict[str, Any]:
        """What `GET /policy` says: heads, dimensions, version, limits."""
        return self._transport.run(self._calls.policy())

    def close(self) -> None:
        """Ends the session on the server, where that can be reached, and the connection.

        In a process that was forked it does nothing: both are its parent's.
        """
        if self._transport.is_ours():
            with suppress(PolicyError):
                self._transport.run(self._calls.session.end())
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Awaiting(Client):
    """The same for asyncio: one call at a time, any number of clients."""

    def _connect(self, ssl_context: ssl.SSLContext | None) -> None:
        from tamiyo_client.transport import AsyncTransport  # as above

        self._transport = AsyncTransport(ssl_context)

    async def policy(self) -> dict[str, Any]:
        """As `Blocking.policy`."""
        return await self._transport.run(self._calls.policy())

    async def close(self) -> None:
        """As `Blocking.close`."""
        if self._transport.is_ours():
            with suppress(PolicyError):
                await self._transport.run(self._calls.session.end())
            await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
