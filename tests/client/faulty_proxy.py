"""A proxy that loses requests and answers, for clients that speak HTTP by themselves."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

FAULTS = {
    "none": 60,
    "cut before the request is through": 8,
    "cut before the answer": 8,
    "cut in the answer": 8,
    "sent twice": 8,
    "overloaded": 4,
    "draining": 4,
}


def _refusal(status_line: str, error_type: str) -> bytes:
    body = b'{"error": "not now", "error_type": "%b"}' % error_type.encode()
    head = f"HTTP/1.1 {status_line}\r\nContent-Type: application/json\r\nRetry-After: 0\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


REFUSALS = {
    "overloaded": _refusal("429 Too Many Requests", "overloaded"),
    "draining": _refusal("503 Service Unavailable", "draining"),
}


class FaultyProxy:
    """Passes requests on to `host` and `port`, each through one of `FAULTS`; `seen` counts them.

    They come as in `faults`, and afterwards by chance.
    """

    def __init__(self, host: str, port: int, faults: Iterable[str] = ()) -> None:
        self.seen: Counter[str] = Counter()
        self._server = (host, port)
        self._random = random.Random(4)
        self._faults = iter(faults)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._pass_on(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection goes on."""
        request = await _message(reader)
        (by_chance,) = self._random.choices(list(FAULTS), list(FAULTS.values()))
        fault = next(self._faults, by_chance)
        self.seen[fault] += 1
        if fault in REFUSALS:
            writer.write(REFUSALS[fault])
            return True
        if fault == "cut before the request is through":
            await self._ask(request[: self._random.randrange(len(request))], is_heard=False)
            return False
        if fault == "cut before the answer":
            await self._ask(request, is_heard=False)
            return False
        if fault == "sent twice":
            answer, again = await asyncio.gather(self._ask(request), self._ask(request))
            assert answer.partition(b"\r\n\r\n")[2] == again.partition(b"\r\n\r\n")[2]
        else:
            answer = await self._ask(request)
        if fault == "cut in the answer":
            writer.write(answer[: self._random.randrange(1, len(answer))])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            return False
        writer.write(answer)
        await writer.drain()
        return True

    async def _ask(self, request: bytes, *, is_heard: bool = True) -> bytes:
        reader, writer = await asyncio.open_connection(*self._server)
        try:
            writer.write(request)
            await writer.drain()
            return await _message(reader) if is_heard else b""
        finally:
            writer.close()


async def _message(reader: asyncio.StreamReader) -> bytes:
    """A head, and as much of a body as it announces."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return head + await reader.readexactly(int(value))
    return head


@contextmanager
def faulty_proxy(
    host: str, port: int, faults: Iterable[str] = ()
) -> Iterator[tuple[str, Counter[str]]]:
    """Its URL and what it has done, while it runs on a thread of its own."""
    proxy = FaultyProxy(host, port, faults)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(proxy, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", proxy.seen
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
