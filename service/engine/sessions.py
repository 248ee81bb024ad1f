"""One recurrent state per environment, and whose turn it is: the table of sessions.

Decides what a request means for its session (the next step, a retry, a conflict, a start) and
keeps the state. Knows nothing of HTTP, of batches or of the model.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from model.spec import PolicySpec
from service.errors import Overloaded, SessionLost, StepConflict, UnknownSession
from service.runtime.protocol import StepInputs, StepOutputs, extra_shapes

START = -1
"""The row of an episode that starts from zeros."""


@dataclass(slots=True)
class Session:
    """A live session: its row in the table, and where its episode stands."""

    row: int
    seed: int
    episode: str | None
    next_step: int
    starts: int
    last_request: bytes
    last_used_s: float


class Turn(NamedTuple):
    """What the model is to do for a request: step `step` from the state in `row`, or from zeros."""

    row: int
    step: int
    seed: int


class SessionTable:
    """At most `capacity` sessions with their `(h, c)` and last answer in preallocated arrays.

    `admit` decides and changes nothing; `commit` moves the session once the model has run, so that
    a step that fails leaves everything as it was. A full table gives up its least recently used
    session, never one with a request waiting; one idle for `idle_timeout_s` ends. Both are told
    apart from sessions that never were: their ids are remembered, the last `capacity` of them.
    """

    def __init__(
        self,
        spec: PolicySpec,
        *,
        capacity: int,
        idle_timeout_s: float,
        default_seed: Callable[[str, str | None, int], int],
        clock: Callable[[], float],
    ) -> None:
        shape = (capacity, spec.num_layers, spec.hidden_dim)
        self.h = np.zeros(shape, dtype=np.float32)
        self.c = np.zeros(shape, dtype=np.float32)
        self.action = np.zeros((capacity, len(spec.heads)), dtype=np.int64)
        self.log_prob = np.zeros((capacity, len(spec.heads)), dtype=np.float32)
        self.value = np.zeros(capacity, dtype=np.float32)
        self.extra = {
            name: np.zeros(shape, dtype=np.float32)
            for name, shape in extra_shapes(spec, capacity).items()
        }
        self._live: OrderedDict[str, Session] = OrderedDict()  # least recently used first
        self._num_waiting: dict[str, int] = {}
        self._lost: OrderedDict[str, None] = OrderedDict()
        self._free_rows = list(range(capacity - 1, -1, -1))
        self.capacity = capacity
        self._idle_timeout_s = idle_timeout_s
        self._default_seed = default_seed
        self._clock = clock
        self.events = dict.fromkeys(("started", "ended", "expired", "evicted"), 0)

    def __len__(self) -> int:
        return len(self._live)

    def find(self, session_id: str) -> Session | None:
        """The live session of that id."""
        self.expire_idle()
        return self._live.get(session_id)

    def expire_idle(self) -> None:
        """Gives up the sessions that were idle for too long; every look at a session does."""
        oldest = self._clock() - self._idle_timeout_s
        while self._live:
            session_id, session = next(iter(self._live.items()))
            if session.last_used_s > oldest or session_id in self._num_waiting:
                break
            self._lose(session_id, "expired")

    def hold(self, session_id: str) -> None:
        """Keeps a session from eviction until `release`: a request of it waits.

        The session may be one that is about to start.
        """
        self._num_waiting[session_id] = self._num_waiting.get(session_id, 0) + 1

    def release(self, session_id: str) -> None:
        """The request that `hold` was for waits no more."""
        left = self._num_waiting[session_id] - 1
        if left:
            self._num_waiting[session_id] = left
        else:
            del self._num_waiting[session_id]

    def admit(
        self,
        session_id: str,
        *,
        start: bool,
        episode: str | None,
        step: int | None,
        seed: int | None,
        fingerprint: bytes,
    ) -> Turn | Session:
        """The turn the model is to take, or the session itself where its last answer is the answer.

        `fingerprint` stands for the request's content: a retry has its step's fingerprint. Raises
        UnknownSession, SessionLost, or StepConflict naming the expected step.
        """
        session = self.find(session_id)
        if start and not _is_running(session, episode, step):
            starts = session.starts if session else 0
            if seed is None:
                seed = self._default_seed(session_id, episode, starts)
            return Turn(START, 0, seed)
        if session is None:
            raise self._absent(session_id, step)
        if start:
            step = 0
        if episode is not None and episode != session.episode:
            running = "an unnamed one" if session.episode is None else repr(session.episode)
            raise StepConflict(
                f"session {session_id!r} is in episode {running}, not {episode!r}; "
                f"its next step is {session.next_step}"
            )
        if seed is not None and seed != session.seed:
            raise StepConflict(
                f"session {session_id!r} was started with another seed; leave `seed` out, or "
                f"start anew; its next step is {session.next_step}"
            )
        if step is None or step == session.next_step:
            return Turn(session.row, session.next_step, session.seed)
        if step == session.next_step - 1 and fingerprint == session.last_request:
            return session
        other = " with another content" if step == session.next_step - 1 else ""
        if start:
            raise StepConflict(
                f"session {session_id!r} has already started{other}; its next step is "
                f"{session.next_step}; to start anew, name another `episode` or leave `step` out"
            )
        raise StepConflict(
            f"session {session_id!r} has already taken step {step}{other}; "
            f"its next step is {session.next_step}"
            if step < session.next_step
            else f"session {session_id!r} cannot take step {step} yet; "
            f"its next step is {session.next_step}"
        )

    def commit(
        self, session_id: str, turn: Turn, *, episode: str | None, fingerprint: bytes
    ) -> Session:
        """Moves the session past `turn`; a start makes its row. `store` then fills it.

        Raises Overloaded where a start needs a row and every session has a request waiting.
        """
        session = self._live.get(session_id)
        if session is None:
            row = self._take_row()
            session = Session(row, turn.seed, episode, 0, 0, fingerprint, 0.0)
            self._live[session_id] = session
            self.events["started"] += 1
            self._lost.pop(session_id, None)
        if turn.row == START:
            session.seed, session.episode = turn.seed, episode
            session.starts += 1
        session.next_step = turn.step + 1
        session.last_request = fingerprint
        self.touch(session_id)
        return session

    def touch(self, session_id: str) -> None:
        """A live session was used: of all, it is given up last."""
        self._live[session_id].last_used_s = self._clock()
        self._live.move_to_end(session_id)

    def load(self, rows: Sequence[int], batch: StepInputs) -> None:
        """Copies the states in `rows` into the batch's first rows; for START, any state."""
        if len(rows) == 1:
            batch.h[0], batch.c[0] = self.h[rows[0]], self.c[rows[0]]
        else:
            self.h.take(rows, axis=0, out=batch.h[: len(rows)], mode="wrap")
            self.c.take(rows, axis=0, out=batch.c[: len(rows)], mode="wrap")

    def store(self, rows: Sequence[int], decided: StepOutputs, at: Sequence[int]) -> None:
        """Keeps the batch's rows `at` as the states and last answers of the sessions in `rows`."""
        to, of = _index(rows), _index(at)
        self.h[to], self.c[to] = decided.h[of], decided.c[of]
        self.action[to], self.log_prob[to] = decided.action[of], decided.log_prob[of]
        self.value[to] = decided.value[of]
        for name, array in decided.extra.items():
            self.extra[name][to] = array[of]

    def end(self, session_id: str) -> None:
        """Forgets a session for good. Raises UnknownSession or SessionLost where there is none."""
        if self.find(session_id) is None:
            raise self._absent(session_id, None)
        self._free_rows.append(self._live.pop(session_id).row)
        self.events["ended"] += 1

    def _absent(self, session_id: str, step: int | None) -> UnknownSession | SessionLost:
        if session_id in self._lost or (step is not None and step > 0):
            return SessionLost(
                f"session {session_id!r} has no state here any more (idle, evicted, or the server "
                "restarted); start a new episode with `episode_start`: true"
            )
        return UnknownSession(
            f"session {session_id!r} was never started; send its first step with "
            "`episode_start`: true"
        )

    def _take_row(self) -> int:
        if not self._free_rows:
            for session_id in self._live:
                if session_id not in self._num_waiting:
                    self._lose(session_id, "evicted")
                    break
            else:
                raise Overloaded(f"all {self.capacity} sessions have a request waiting; retry")
        return self._free_rows.pop()

    def _lose(self, session_id: str, event: str) -> None:
        self.events[event] += 1
        self._free_rows.append(self._live.pop(session_id).row)
        self._lost[session_id] = None
        if len(self._lost) > self.capacity:
            self._lost.popitem(last=False)


def _index(rows: Sequence[int]) -> Any:
    """For NumPy: a lone row by its number, which is several times faster than as an array."""
    return rows[0] if len(rows) == 1 else np.array(rows, dtype=np.intp)


def _is_running(session: Session | None, episode: str | None, step: int | None) -> bool:
    """Whether a start names what already runs: then it is a retry or a late duplicate.

    With a name, that is the episode of that name. Without, only an explicit step 0 that was the
    last step taken can be a retry; everything else restarts.
    """
    if session is None:
        return False
    if episode is not None:
        return session.episode == episode
    return step == 0 and session.next_step == 1
