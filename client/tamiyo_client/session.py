"""One session on the server: its name, its run, its next step. Knows nothing of sockets."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt

from tamiyo_client import wire
from tamiyo_client.errors import Draining, NotReady, Unreachable
from tamiyo_client.exchange import Call, Patience, Reply, patiently


class Session:
    """`num_rows` environments that step together, as one of the servers at `urls` keeps them.

    Steps are numbered within a run, which begins with the first step after `restart`; the server
    takes each number once, whatever is sent again. `failover`: where a server cannot be reached,
    begin anew at the next one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        num_rows: int,
        *,
        name: str | None,
        api_key: str | None,
        patience: Patience,
        failover: bool,
    ) -> None:
        self.name = f"client-{uuid.uuid4().hex}" if name is None else name
        self.num_rows = num_rows
        self.step = 0
        self._failover = failover
        self._urls = by_preference([checked_url(url) for url in urls], self.name)
        shares = len(self._urls) if failover else 1
        self._patience = replace(patience, timeout_s=patience.timeout_s / shares)
        self._at = 0
        if not self.name or not self.name.isprintable() or self.name != self.name.strip():
            raise ValueError(f"{self.name!r} is no session's name: that has printable letters")
        self._headers: dict[str, str | bytes] = {"X-Session-Id": self.name.encode()}
        if api_key is not None:
            self._headers["Authorization"] = bearer(api_key)
        self.run = uuid.uuid4().hex

    @property
    def url(self) -> str:
        """Of the server that keeps the session."""
        return self._urls[self._at]

    def restart(self) -> None:
        """The next step begins a run, with every row from zeros."""
        self.step = 0
        self.run = uuid.uuid4().hex

    def act(
        self,
        tensors: Mapping[str, wire.Array],
        starts: npt.NDArray[np.bool_],
        *,
        seed: int | None,
        deterministic: bool,
    ) -> Call[wire.VectorAct]:
        """The run's next step. `seed` is the run's, and heeded by its first."""
        before = self._at, self.run, self.step
        num_left = len(self._urls) - 1 if self._failover else 0
        while True:
            try:
                return (yield from self._act(tensors, starts, seed, deterministic))
            except (Unreachable, Draining, NotReady):
                if not num_left:  # none is there: the same call again begins where this one did
                    self._at, self.run, self.step = before
                    raise
            num_left -= 1
            self._at = (self._at + 1) % len(self._urls)
            self.restart()
            starts = np.ones(self.num_rows, dtype=np.bool_)

    def _act(
        self,
        tensors: Mapping[str, wire.Array],
        starts: npt.NDArray[np.bool_],
        seed: int | None,
        deterministic: bool,
    ) -> Call[wire.VectorAct]:
        scalars = {"session_id": self.name, "run": self.run, "step": str(self.step)}
        if seed is not None and self.step == 0:
            scalars["seed"] = str(seed)
        if deterministic:
            scalars["deterministic"] = "true"
        reply = yield from self._post({**tensors, "episode_start": starts}, scalars, self._headers)
        act = wire.answer(reply.body, starts)
        self.step += 1
        return act

    def stateless(
        self,
        tensors: Mapping[str, wire.Array],
        *,
        step: int,
        deterministic: bool,
    ) -> Call[wire.VectorAct]:
        """A step of nobody's session, from the state in `tensors` or from zeros."""
        scalars = {"step": str(step)}
        if deterministic:
            scalars["deterministic"] = "true"
        headers = {k: v for k, v in self._headers.items() if k != "X-Session-Id"}
        reply = yield from self._post(tensors, scalars, headers)
        num_rows = len(tensors["observation"])
        return wire.answer(reply.body, np.full(num_rows, step == 0))

    def policy(self) -> Call[bytes]:
        """What `GET /policy` says."""
        reply = yield from patiently(
            "GET", f"{self.url}/policy", self._headers, b"", self._patience
        )
        return reply.body

    def end(self) -> Call[None]:
        """Has the server forget the session, if it is there to be told."""
        path = f"/sessions/{quote(self.name, safe='')}"
        once = Patience(timeout_s=min(2.0, self._patience.timeout_s), retries=0)
        yield from patiently("DELETE", self.url + path, self._headers, b"", once)

    def _post(
        self,
        tensors: Mapping[str, wire.Array],
        scalars: Mapping[str, str],
        headers: Mapping[str, str | bytes],
    ) -> Call[Reply]:
        body = wire.request(tensors, scalars)
        headers = {**headers, "Content-Type": wire.SAFETENSORS}
        return (yield from patiently("POST", f"{self.url}/act", headers, body, self._patience))


def bearer(api_key: str) -> str:
    """The header's value that shows a key. Raises ValueError for what can be none."""
    if not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise ValueError("the key is not of printable ASCII letters")
    return f"Bearer {api_key}"


def checked_url(url: str) -> str:
    """Raises ValueError for what is no server's."""
    with suppress(ValueError):  # of what can be no host, or no port
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https")
        if is_http and parts.hostname and parts.port != 0 and url.isascii():
            return url
    raise ValueError(f"{url!r} is no server's URL, as http://127.0.0.1:8000 is")


def by_preference(urls: Sequence[str], session_name: str) -> list[str]:
    """The servers in the order in which this session goes to them.

    Highest random weight (Thaler and Ravishankar, 1998): every client comes to the same order, and
    where a server is added or gone, only its sessions move.
    """
    if not urls:
        raise ValueError("there is no URL to go to")

    def weight(url: str) -> bytes:
        return blake2b(f"{url}\0{session_name}".encode(), digest_size=8).digest()

    return sorted((url.rstrip("/") for url in urls), key=weight, reverse=True)
