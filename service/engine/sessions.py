"""Whose turn it is: what a block means for its session, and where the session's rows are.

Knows nothing of HTTP, of batches or of the model.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.engine.block import Block
from service.engine.rows import RowTable
from service.errors import Invalid, Overloaded, SessionLost, StepConflict, UnknownSession
from service.runtime.protocol import Rows
from tamiyo_client.noise import row_seed


@dataclass(slots=True)
class Session:
    """A live session: its rows, and where its run stands.

    `episodes` counts, for each row of a vector, the episodes that started in this run before the
    one it is in. `is_stepping`: a turn of it was admitted, and is not settled yet. `is_stale`: it
    is as it was some time before a server was killed, and may have moved on since. `is_over`: it
    took its last step, and is kept for whoever asks for that one again.
    """

    rows: Rows
    is_vector: bool
    seed: int
    run: str | None
    previous_run: str | None
    next_step: int
    num_starts: int
    episodes: NDArray[np.uint64] | None
    last_request: bytes
    policy_version: str
    last_used_s: float
    is_stepping: bool = False
    is_stale: bool = False
    is_over: bool = False


@dataclass(slots=True)
class Turn:
    """What the model is to do for a block: step it from the states in `read_rows`.

    `session` is the one it belongs to, as it stood; with `begins` a run begins, and replaces it.
    `episodes` are the session's once the turn is taken. `fault` is the first row whose output was
    not finite.
    """

    block: Block
    session: Session | None
    begins: bool
    step: int
    seed: int
    read_rows: Rows
    write_rows: Rows
    episodes: NDArray[np.uint64] | None = None
    num_starts: int = 0
    num_reserved: int = 0
    fault: int | None = None


class Past(NamedTuple):
    """What is remembered of a session that is no more: how often it started, and why it ended."""

    num_starts: int
    is_lost: bool


class SessionTable:
    """Sessions of at most `capacity` rows in all.

    `admit` decides, and reserves the rows that the step writes to; `commit` has the session go on
    from them, `abandon` leaves it where it was. A full table gives up its least recently used
    sessions, never one with a request waiting; one idle for `idle_timeout_s` ends. Both are told
    apart from sessions that never were: the last `capacity` that are no more are remembered.
    """

    def __init__(
        self,
        rows: RowTable,
        *,
        capacity: int,
        idle_timeout_s: float,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        self.capacity = capacity
        self.num_rows = 0
        kinds = ("started", "restored", "ended", "expired", "evicted", "lost", "restarted")
        self.events = dict.fromkeys(kinds, 0)
        self._rows = rows
        self._live: OrderedDict[str, Session] = OrderedDict()  # least recently used first
        self._over: dict[str, None] = {}  # of the live, those that took their last step
        self._num_waiting: dict[str, int] = {}
        self._past: OrderedDict[str, Past] = OrderedDict()
        self.forgotten_starts = 0  # the most of any session that is not remembered any more
        self._num_reserved = 0  # rows that runs will have that are about to begin
        self._idle_timeout_s = idle_timeout_s
        self._seed = seed
        self._clock = clock

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, session_id: str) -> bool:
        self.expire_idle()
        return session_id in self._live

    def expire_idle(self) -> None:
        """Gives up the sessions that were idle for too long and have no request waiting."""
        oldest_s = self._clock() - self._idle_timeout_s
        idle: list[str] = []
        for session_id, session in self._live.items():
            if session.last_used_s > oldest_s:
                if not idle:
                    return
                break
            if session_id not in self._num_waiting:
                idle.append(session_id)
        for session_id in idle:
            self._remove(session_id, "expired")

    def hold(self, session_id: str) -> None:
        """A request of the session waits, until `release`: it is neither expired nor evicted.

        One that has been idle for too long by now is expired first.
        """
        self.expire_idle()
        self._num_waiting[session_id] = self._num_waiting.get(session_id, 0) + 1

    def release(self, session_id: str) -> None:
        """The request that `hold` was for waits no more."""
        left = self._num_waiting[session_id] - 1
        if left:
            self._num_waiting[session_id] = left
        else:
            del self._num_waiting[session_id]
            if self.num_rows > self.capacity:
                self._evict(besides=session_id)

    def admit(self, block: Block) -> Turn | Session:
        """The turn the model is to take, or the session whose last answer is the answer.

        Raises UnknownSession, SessionLost, StepConflict naming the expected step, Invalid where
        the run has another number of rows, and Overloaded where there is no room for a run.
        """
        session_id = block.session_id
        assert session_id is not None
        session = self._live.get(session_id)
        if session is not None and session.is_stale and _has_moved_on(session, block):
            self._remove(session_id, "lost")
            session = None
        if session is not None and session.is_over:
            return self._after_the_end(session_id, session, block)
        if session is not None and session.is_vector != block.is_vector:
            kinds = ("a single environment", "a vector of environments")
            raise StepConflict(
                f"session {session_id!r} is {kinds[session.is_vector]}, not "
                f"{kinds[block.is_vector]}: end it first, or name another"
            )
        if block.starts is True and not block.step and not _is_running(session, block):
            return self._begin(session_id, session, block)
        if session is None:
            raise self._absent(session_id, block.step)
        if block.num_rows != len(session.rows):
            raise Invalid(
                f"session {session_id!r} has {len(session.rows)} rows in this run, not "
                f"{block.num_rows}; to change that, begin another run"
            )
        step = block.step
        if step is None and block.starts is True and (block.run is not None or not block.is_vector):
            step = 0
        if block.run is not None or block.seed is not None:
            self._check_run(session_id, session, block)
        if step is None or step == session.next_step:
            return self._go_on(session, block)
        if step == session.next_step - 1 and block.fingerprint == session.last_request:
            return session
        raise _conflict(session_id, session, block, step)

    def commit(self, turn: Turn, policy_version: str) -> None:
        """The session goes on from the rows that were written; those it had are free."""
        block, session = turn.block, turn.session
        session_id = block.session_id
        assert session_id is not None
        if session is None or turn.begins or self._live.get(session_id) is not session:
            is_ended = self._settle(session_id, turn)
            if not turn.begins:
                self._rows.give_back(turn.write_rows)
                return
            if session is not None and not is_ended:
                self._free(session)
            self._live[session_id] = self._begun(session_id, turn, policy_version, is_ended)
            self._evict(besides=session_id)
        else:
            self._rows.give_back(session.rows)
            session.rows = turn.write_rows
            session.next_step = turn.step + 1
            session.last_request = block.fingerprint
            session.policy_version = policy_version
            session.episodes = turn.episodes
            session.is_stepping = session.is_stale = False
        self.touch(session_id)
        if block.ends:
            self._close(session_id, block)

    def abandon(self, turn: Turn) -> None:
        """The turn was not taken: everything is as it was before `admit`."""
        assert turn.block.session_id is not None
        self._settle(turn.block.session_id, turn)
        self._rows.give_back(turn.write_rows)

    def touch(self, session_id: str) -> None:
        """A live session was used: of all, it is given up last."""
        self._live[session_id].last_used_s = self._clock()
        self._live.move_to_end(session_id)

    def end(self, session_id: str) -> None:
        """Ends a session for good. Raises UnknownSession or SessionLost where there is none.

        A turn of it that is under way is still answered.
        """
        self.expire_idle()
        if session_id not in self._live:
            raise self._absent(session_id, None)
        self._remove(session_id, "ended")

    def restart(self) -> None:
        """Gives up every session. No turn of one is under way."""
        for session_id in list(self._live):
            self._remove(session_id, "restarted")

    def names(self, *, in_order: bool) -> list[str]:
        """Of the live sessions: the least recently used first, which takes ten times as long."""
        return list(self._live if in_order else dict.keys(self._live))

    def get(self, session_id: str) -> Session | None:
        return self._live.get(session_id)

    def past(self) -> list[tuple[str, Past]]:
        """What is remembered of sessions that are no more, the first to be forgotten first."""
        return list(self._past.items())

    def restore(
        self, live: Mapping[str, Session], past: Mapping[str, Past], forgotten_starts: int
    ) -> None:
        """Goes on from the sessions of a server before this one, for which there is room."""
        self._live = OrderedDict(sorted(live.items(), key=lambda item: item[1].last_used_s))
        self._over = {name: None for name, session in self._live.items() if session.is_over}
        self.num_rows = sum(len(session.rows) for session in live.values())
        self.events["restored"] = len(live)
        self._past = OrderedDict(past)
        self.forgotten_starts = forgotten_starts
        self._forget()

    def _begin(self, session_id: str, session: Session | None, block: Block) -> Turn:
        """The first turn of a run."""
        if session is not None and block.run is not None and block.run == session.previous_run:
            raise StepConflict(
                f"session {session_id!r} is in {_named(session)}, which came after {block.run!r}; "
                f"its next step is {session.next_step}"
            )
        num_starts = self._num_starts(session_id, session)
        seed = block.seed
        if seed is None:
            seed = derived_seed(self._seed, session_id, block.run, num_starts)
        num_rows = block.num_rows
        num_more = num_rows - (len(session.rows) if session is not None else 0)
        if num_more > 0:
            self._check_room(num_more, besides=session_id)
        write_rows = self._rows.reserve(num_rows)
        if session is not None:
            session.is_stepping = True
        self._num_reserved += max(0, num_more)
        self._rows.seed[write_rows] = first_seeds(block, seed)
        return Turn(
            block,
            session,
            begins=True,
            step=0,
            seed=seed,
            read_rows=self._rows.zeros(num_rows),
            write_rows=write_rows,
            episodes=np.zeros(num_rows, dtype=np.uint64) if block.is_vector else None,
            num_starts=num_starts + 1,
            num_reserved=max(0, num_more),
        )

    def _begun(self, session_id: str, turn: Turn, policy_version: str, is_ended: bool) -> Session:
        """The session as it is after the first turn of its run; `is_ended`, as it was before."""
        block, before = turn.block, turn.session
        if before is not None and before.is_over and not is_ended:
            self.events["ended"] += 1
            self._over.pop(session_id)
        if before is None or before.is_over or is_ended:
            self.events["started"] += 1
            self._past.pop(session_id, None)
        self.num_rows += block.num_rows
        return Session(
            rows=turn.write_rows,
            is_vector=block.is_vector,
            seed=turn.seed,
            run=block.run,
            previous_run=None if before is None else before.run,
            next_step=1,
            num_starts=turn.num_starts,
            episodes=turn.episodes,
            last_request=block.fingerprint,
            policy_version=policy_version,
            last_used_s=0.0,
        )

    def _go_on(self, session: Session, block: Block) -> Turn:
        """The run's next turn, in which rows of a vector may start episodes."""
        num_rows = len(session.rows)
        read_rows, episodes, starts = session.rows, session.episodes, block.starts
        write_rows = self._rows.reserve(num_rows)
        if episodes is not None and starts is not False:
            which = np.flatnonzero(np.broadcast_to(starts, num_rows))
            read_rows, episodes = read_rows.copy(), episodes.copy()
            read_rows[which] = self._rows.zero_row
            episodes[which] += np.uint64(1)
            self._rows.seed[write_rows[which]] = (
                row_seed(session.seed, which, episodes[which])
                if block.seeds is None
                else block.seeds[which]
            )
        session.is_stepping = True
        next_step, seed = session.next_step, session.seed
        return Turn(block, session, False, next_step, seed, read_rows, write_rows, episodes)

    @staticmethod
    def _check_run(session_id: str, session: Session, block: Block) -> None:
        """Raises StepConflict where the block is of another run, or of one with another seed."""
        if block.run is not None and block.run != session.run:
            raise StepConflict(
                f"session {session_id!r} is in {_named(session)}, not {block.run!r}; its next "
                f"step is {session.next_step}"
            )
        if block.seed is not None and block.seed != session.seed:
            raise StepConflict(
                f"session {session_id!r} was started with another seed; leave `seed` out, or "
                f"start anew; its next step is {session.next_step}"
            )

    def _close(self, session_id: str, block: Block) -> None:
        """After its last step: what cannot be asked for again need not be kept."""
        if block.step is None and (block.run is None or block.starts is not True):
            self._remove(session_id, "ended")
        else:
            self._live[session_id].is_over = True
            self._over[session_id] = None

    def _after_the_end(self, session_id: str, session: Session, block: Block) -> Turn | Session:
        """What `admit` gives where the session took its last step: that one again, or a new run."""
        is_first = block.starts is True and not block.step
        step = 0 if is_first and block.run is not None else block.step
        is_its_run = block.run is None or block.run == session.run
        is_its_last = step == session.next_step - 1 and block.fingerprint == session.last_request
        if is_its_run and is_its_last:
            return session
        if is_first and (block.run is None or block.run != session.run):
            return self._begin(session_id, session, block)
        raise (SessionLost if step else UnknownSession)(
            f"session {session_id!r} has taken its last step; start it anew, with "
            "`episode_start`: true"
        )

    def _settle(self, session_id: str, turn: Turn) -> bool:
        """The turn is not under way any more; whether its session was ended meanwhile."""
        self._num_reserved -= turn.num_reserved
        session = turn.session
        if session is None:
            return False
        session.is_stepping = False
        is_ended = self._live.get(session_id) is not session
        if is_ended:
            self._free(session)
        return is_ended

    def _num_starts(self, session_id: str, session: Session | None) -> int:
        if session is not None:
            return session.num_starts
        past = self._past.get(session_id)
        return self.forgotten_starts if past is None else past.num_starts

    def _absent(self, session_id: str, step: int | None) -> UnknownSession | SessionLost:
        past = self._past.get(session_id)
        if (past is not None and past.is_lost) or (step is not None and step > 0):
            return SessionLost(
                f"session {session_id!r} has no state here any more (idle, evicted, or the server "
                "restarted); start a new episode at step 0, with `episode_start`: true"
            )
        return UnknownSession(
            f"session {session_id!r} was never started; send its first step with "
            "`episode_start`: true"
        )

    def _check_room(self, num_rows: int, *, besides: str) -> None:
        """Raises Overloaded where so many rows more can't be had by evicting."""
        missing = self.num_rows + self._num_reserved + num_rows - self.capacity
        for session_id, session in self._by_need():
            if missing <= 0:
                return
            if session_id != besides and self._is_evictable(session_id, session):
                missing -= len(session.rows)
        if missing > 0:
            raise Overloaded(
                f"there is no room for {num_rows} rows more: {self.capacity} are kept at most, and "
                "no session with a request waiting is given up"
            )

    def _evict(self, *, besides: str) -> None:
        """Makes the room that was found when a run was admitted, as far as it can be made by now.

        Who came back meanwhile keeps his rows, and the next run has to find more.
        """
        excess = self.num_rows - self.capacity
        victims = []
        for session_id, session in self._by_need():
            if excess <= 0:
                break
            if session_id != besides and self._is_evictable(session_id, session):
                victims.append(session_id)
                excess -= len(session.rows)
        for session_id in victims:
            self._remove(session_id, "evicted")

    def _by_need(self) -> Iterator[tuple[str, Session]]:
        """Who is given up first: who took the last step, and then the least recently used."""
        yield from ((session_id, self._live[session_id]) for session_id in self._over)
        yield from (item for item in self._live.items() if not item[1].is_over)

    def _is_evictable(self, session_id: str, session: Session) -> bool:
        return session_id not in self._num_waiting and not session.is_stepping

    def _remove(self, session_id: str, event: str) -> None:
        session = self._live.pop(session_id)
        if session.is_over:
            event = "ended"
            del self._over[session_id]
        self.events[event] += 1
        if not session.is_stepping:
            self._free(session)
        self._past[session_id] = Past(session.num_starts, is_lost=event != "ended")
        self._forget()

    def _forget(self) -> None:
        while len(self._past) > self.capacity:
            _, forgotten = self._past.popitem(last=False)
            self.forgotten_starts = max(self.forgotten_starts, forgotten.num_starts)

    def _free(self, session: Session) -> None:
        self._rows.give_back(session.rows)
        self.num_rows -= len(session.rows)


def first_seeds(block: Block, seed: int) -> int | NDArray[np.uint64]:
    """The seeds of a block's first episodes, where the block's own or a default is `seed`."""
    if block.seeds is not None:
        return block.seeds
    rows = np.arange(block.num_rows)
    return row_seed(seed, rows, np.zeros_like(rows)) if block.is_vector else seed


def derived_seed(server_seed: int, session_id: str, run: str | None, num_starts: int) -> int:
    """The seed of a run that brings none: from the server's seed and the run's identity.

    An unnamed one counts by how often its session has started, so that the episodes of one
    environment differ; a run without seeds repeats when its requests do.
    """
    which = f"#{num_starts}" if run is None else f"={run}"
    identity = f"{server_seed}/{session_id}/{which}".encode()
    return int.from_bytes(blake2b(identity, digest_size=8).digest(), "little")


def _is_running(session: Session | None, block: Block) -> bool:
    """Whether a start of all rows is within the run there is, and begins no other.

    With a name, that is the run of that name. Without, a first step can be the retry of the last
    one, and else begins a run; a vector's rows that start together go on in theirs.
    """
    if session is None:
        return False
    if block.run is not None:
        return block.run == session.run
    if session.is_stale:  # whose run has a name
        return False
    if block.step is not None:
        return session.next_step == 1
    return block.is_vector


def _has_moved_on(session: Session, block: Block) -> bool:
    """Whether a stale session's client has, or may have: the block is no start, and not a request
    of the same run whose step is no later than the next.
    """
    if block.is_vector != session.is_vector:
        return True
    if block.starts is True and not block.step:
        return False
    if block.run is None or block.run != session.run or block.step is None:
        return True
    if block.step == session.next_step:
        return block.seed is not None and block.seed != session.seed  # another run of that name
    return block.step > session.next_step


def _conflict(session_id: str, session: Session, block: Block, step: int) -> StepConflict:
    next_step = session.next_step
    other = " with another content" if step == next_step - 1 else ""
    if block.starts is True and step == 0:
        name = "run" if block.is_vector else "episode"
        advice = f"name another `{name}`"
        if block.run is None and not block.is_vector:
            advice += " or leave `step` out"
        return StepConflict(
            f"session {session_id!r} has already started{other}; its next step is {next_step}; to "
            f"start anew, {advice}"
        )
    if step < next_step:
        return StepConflict(
            f"session {session_id!r} has already taken step {step}{other}; its next step is "
            f"{next_step}"
        )
    return StepConflict(
        f"session {session_id!r} cannot take step {step} yet; its next step is {next_step}"
    )


def _named(session: Session) -> str:
    kind = "run" if session.is_vector else "episode"
    return f"an unnamed {kind}" if session.run is None else f"{kind} {session.run!r}"
