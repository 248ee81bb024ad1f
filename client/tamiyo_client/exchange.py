"""What a call does, apart from how its bytes travel.

A call is a generator: it yields what is to be done, `Send` or `Wait`, is sent what came of it, and
returns the call's result. The server takes each step exactly once, so that a call without an answer
may be sent again. `tamiyo_client.transport` drives generators, with threads or with asyncio.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import TypeVar

from tamiyo_client.errors import (
    BY_STATUS,
    BY_TYPE,
    PolicyError,
    ServerError,
    Unavailable,
    Unreachable,
)

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 2.0
ATTEMPT_SHARE = 4
"""Of a call's time the first attempt may take a quarter: an answer that is lost is asked for again.
One that ran out of it makes the next ones' twice as long."""


@dataclass(frozen=True)
class Send:
    """One request, to be answered within `timeout_s`."""

    method: str
    url: str
    headers: Mapping[str, str | bytes]
    body: bytes
    timeout_s: float


@dataclass(frozen=True)
class Wait:
    """So long nothing is done."""

    seconds: float


@dataclass(frozen=True)
class Reply:
    """What the server answered; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Broken:
    """There was no answer."""

    cause: Exception


Result = TypeVar("Result")
Call = Generator["Send | Wait", "Reply | Broken | None", Result]


@dataclass(frozen=True)
class Patience:
    """How long a call is tried: `timeout_s` in all, and at most `retries` times more than once."""

    timeout_s: float = 30.0
    retries: int = 20
    clock: Callable[[], float] = time.monotonic
    random: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < inf or self.retries < 0:
            raise ValueError(
                f"timeout_s is {self.timeout_s} and retries {self.retries}: a call is given some "
                "seconds, and is sent again that often at most"
            )

    def wait_s(self, attempt: int, reply: Reply | Broken) -> float:
        """Before the next attempt: twice as long each time, spread, and as long as is asked for."""
        longest_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt, 30))
        asked = reply.headers.get("retry-after", "") if isinstance(reply, Reply) else ""
        asked_s = float(asked) if asked.isascii() and asked.isdigit() else 0.0
        return asked_s + self.random.uniform(longest_s / 2, longest_s)


def patiently(
    method: str,
    url: str,
    headers: Mapping[str, str | bytes],
    body: bytes,
    patience: Patience,
) -> Call[Reply]:
    """Sends a request until it is answered for good. Raises what `errors` says."""
    ends_s = patience.clock() + patience.timeout_s
    attempt, left_s = 0, patience.timeout_s
    allowed_s = patience.timeout_s / min(ATTEMPT_SHARE, patience.retries + 1)
    while True:
        sent_s = patience.clock()
        reply = yield Send(method, url, headers, body, min(allowed_s, left_s))
        assert reply is not None
        error = _error(reply)
        if error is None:
            assert isinstance(reply, Reply)
            return reply
        if patience.clock() - sent_s >= allowed_s:
            # A slow server, it may be, and not a lost answer.
            allowed_s *= 2
        wait_s = patience.wait_s(attempt, reply)
        left_s = ends_s - patience.clock() - wait_s
        if not isinstance(error, Unavailable) or attempt >= patience.retries or left_s <= 0:
            raise error
        attempt += 1
        yield Wait(wait_s)


def _error(reply: Reply | Broken) -> PolicyError | None:
    """Why this is no answer, if it is none."""
    if isinstance(reply, Broken):
        cause = reply.cause
        error: PolicyError = Unreachable(
            f"no answer: {type(cause).__name__}: {cause}", error_type="unreachable"
        )
        error.__cause__ = cause
        return error
    if 200 <= reply.status < 300:
        return None
    try:
        body = json.loads(reply.body)
        sentence, error_type = str(body["error"]), str(body["error_type"])
    except (ValueError, KeyError, TypeError, RecursionError):
        sentence, error_type = f"the answer is {reply.status}, and not of a policy server", ""
    kind = BY_TYPE.get(error_type) or BY_STATUS.get(reply.status, ServerError)
    return kind(sentence, status=reply.status, error_type=error_type)
