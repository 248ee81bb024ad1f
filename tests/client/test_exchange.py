"""How long a call is tried, by a clock of the test's, and what its end says."""

import json
import random
from typing import Any

import pytest

from tamiyo_client import (
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    NotAllowed,
    NotReady,
    Overloaded,
    PolicyError,
    ServerError,
    SessionLost,
    StepConflict,
    Unavailable,
    Unreachable,
)
from tamiyo_client.exchange import Broken, Patience, Reply, Send, Wait, patiently

OK = Reply(200, {}, b"done")


def refusal(status: int, error_type: str, **headers: str) -> Reply:
    body = json.dumps({"error": f"a sentence on {error_type}", "error_type": error_type})
    return Reply(status, headers, body.encode())


class World:
    """Answers a call from a list, and lets its time pass."""

    def __init__(self, *replies: Reply | Broken, takes_s: float = 0.0, **patience: Any) -> None:
        self.now_s = 100.0
        self.waits_s: list[float] = []
        self.timeouts_s: list[float] = []
        self._replies = list(replies)
        self._takes_s = takes_s
        self._patience = Patience(clock=lambda: self.now_s, random=random.Random(1), **patience)

    def run(self) -> Reply:
        call = patiently("POST", "http://server/act", {}, b"", self._patience)
        outcome: Reply | Broken | None = None
        while True:
            try:
                effect = call.send(outcome)
            except StopIteration as end:
                reply: Reply = end.value
                return reply
            if isinstance(effect, Wait):
                self.waits_s.append(effect.seconds)
                self.now_s += effect.seconds
                outcome = None
            else:
                assert isinstance(effect, Send)
                self.timeouts_s.append(effect.timeout_s)
                self.now_s += self._takes_s
                outcome = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]


@pytest.mark.parametrize(
    "lost",
    [
        Broken(ConnectionResetError()),
        refusal(429, "overloaded"),
        refusal(503, "not_ready"),
        refusal(503, "draining"),
        refusal(504, "deadline_exceeded"),
        Reply(500, {}, b"Internal Server Error"),  # of Ray's proxy, not of the service
        Reply(502, {}, b"<html>Bad Gateway</html>"),
    ],
)
def test_what_may_pass_is_tried_again(lost: Reply | Broken) -> None:
    world = World(lost, lost, OK)
    assert world.run() is OK
    assert len(world.waits_s) == 2


@pytest.mark.parametrize(
    ("status", "error_type", "kind"),
    [
        (400, "malformed", InvalidRequest),
        (401, "unauthorized", NotAllowed),
        (403, "forbidden", NotAllowed),
        (404, "unknown_session", SessionLost),
        (409, "step_conflict", StepConflict),
        (410, "session_lost", SessionLost),
        (413, "too_large", InvalidRequest),
        (422, "invalid", InvalidRequest),
        (500, "internal", ServerError),
    ],
)
def test_what_does_not_pass_is_raised_at_once_with_the_servers_sentence(
    status: int, error_type: str, kind: type[PolicyError]
) -> None:
    world = World(refusal(status, error_type), OK)
    with pytest.raises(kind, match=f"^a sentence on {error_type}$") as raised:
        world.run()
    assert (raised.value.status, raised.value.error_type) == (status, error_type)
    assert world.waits_s == []


@pytest.mark.parametrize(
    ("lost", "kind"),
    [
        (Broken(ConnectionResetError("reset")), Unreachable),
        (refusal(429, "overloaded"), Overloaded),
        (refusal(503, "not_ready"), NotReady),
        (refusal(503, "draining"), Draining),
        (refusal(504, "deadline_exceeded"), DeadlineExceeded),
    ],
)
def test_the_last_word_of_a_server_that_stays_away_is_raised(
    lost: Reply | Broken, kind: type[Unavailable]
) -> None:
    world = World(lost, timeout_s=10.0)
    with pytest.raises(kind) as raised:
        world.run()
    assert isinstance(raised.value, Unavailable)
    assert 7.0 < world.now_s - 100.0 <= 10.0
    if isinstance(lost, Broken):
        assert raised.value.__cause__ is lost.cause


def test_waits_grow_are_spread_and_stay_within_bounds() -> None:
    world = World(Broken(ConnectionResetError()), timeout_s=60.0)
    with pytest.raises(Unreachable):
        world.run()
    longest_s = [min(2.0, 0.05 * 2**attempt) for attempt in range(len(world.waits_s))]
    assert len(world.waits_s) == 20  # `retries`
    for waited_s, at_most_s in zip(world.waits_s, longest_s, strict=True):
        assert at_most_s / 2 <= waited_s <= at_most_s
    assert len({waited / most for waited, most in zip(world.waits_s, longest_s, strict=True)}) > 9


def test_as_long_is_waited_as_the_server_asks() -> None:
    world = World(refusal(429, "overloaded", **{"retry-after": "7"}), OK)
    assert world.run() is OK
    assert 7.0 < world.waits_s[0] < 7.1


def test_but_not_past_the_end() -> None:
    world = World(refusal(429, "overloaded", **{"retry-after": "40"}), OK, timeout_s=30.0)
    with pytest.raises(Overloaded):
        world.run()
    assert world.waits_s == []


def test_an_attempt_may_take_a_quarter_and_the_next_ones_more_if_it_ran_out() -> None:
    """A server that is slow is heard in the end; an answer that is lost is asked for again."""
    world = World(Broken(TimeoutError()), timeout_s=8.0, takes_s=2.0)
    with pytest.raises(Unreachable):
        world.run()
    assert world.timeouts_s[:2] == [2.0, 4.0]
    assert world.timeouts_s[-1] < 2.0
    assert world.now_s - 100.0 <= 8.0 + world.timeouts_s[-1]
    quick = World(Broken(ConnectionResetError()), timeout_s=8.0, takes_s=0.1)
    with pytest.raises(Unreachable):
        quick.run()
    assert max(quick.timeouts_s) == 2.0


def test_a_call_that_is_sent_once_has_all_its_time() -> None:
    world = World(OK, timeout_s=8.0, retries=0)
    world.run()
    assert world.timeouts_s == [8.0]


@pytest.mark.parametrize(
    "patience", [{"timeout_s": 0}, {"timeout_s": float("inf")}, {"retries": -1}]
)
def test_no_patience_at_all_or_without_end_is_refused(patience: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a call is given some seconds"):
        Patience(**patience)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"detail": "Not Found"}'])
def test_a_stranger_who_answers_is_told_apart(body: bytes) -> None:
    with pytest.raises(ServerError, match="the answer is 404, and not of a policy server"):
        World(Reply(404, {}, body)).run()
