"""The session table <-> the frames of a snapshot.

Sessions come first, in a final one the least recently used before the others; then what is
remembered of those that are no more; and last the policy that is served, which may be pushed while
the others are written: no session has seen a later one. Knows nothing of when they are written.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.manifest import Array
from model.step_spec import StepSpec
from service.engine.rows import ONE, RowTable
from service.engine.sessions import Past, Session, SessionTable
from service.engine.snapshot_file import Frame, Snapshot, SnapshotError
from service.runtime.protocol import Rows, Runtime

FRAME_ROWS = 256
"""Copied at once while the event loop waits: a millisecond of the largest policies. A session of
more has a frame of its own."""
FRAME_NAMES = 4096
PARAMETER, OUTPUT = "parameters.", "output."


class Served(NamedTuple):
    """The weights that answers are made with: `parameters` by name, None for the artifact's own."""

    policy_version: str
    parameters: Mapping[str, NDArray[Any]] | None = None
    probe_error: float | None = None


class Restored(NamedTuple):
    """What a snapshot held: the policy that was served, when, and how many sessions live on."""

    served: Served
    written_at_s: float
    num_sessions: int
    num_lost: int


class KeptSessions:
    """All there is to know of the sessions in `sessions`, `rows` and `runtime`.

    `served` says what the policy is just now, `serve` has another one serve, or raises
    SnapshotError. On the event loop, as they are.
    """

    def __init__(
        self,
        sessions: SessionTable,
        rows: RowTable,
        runtime: Runtime,
        outputs: Sequence[Array],
        *,
        spec: StepSpec,
        artifact_version: str,
        max_rows: int,
        served: Callable[[], Served],
        serve: Callable[[Served], None],
        clock: Callable[[], float],
    ) -> None:
        self._sessions = sessions
        self._rows = rows
        self._runtime = runtime
        self._artifact_version = artifact_version
        # What the parameters, which name the version, do not say: which heads matter, floors.
        self._rules = spec.model_dump(mode="json", exclude={"name", "value_scale"})
        self._states = [state.name for state in spec.states]
        self._shapes = {array.name: [array.dtype, *array.shape[1:]] for array in outputs}
        self._max_rows = max_rows
        self._served = served
        self._serve = serve
        self._clock = clock

    def frames(self, *, is_final: bool) -> Iterator[Frame]:
        """A snapshot's frames, each as its sessions are when it is asked for."""
        names, num_rows = self._sessions.names(in_order=is_final), 0
        names.reverse()
        while names:
            if some := self._next_sessions(names):
                num_rows += sum(len(session.rows) for _, session in some)
                yield self._sessions_frame(some)
        past = self._sessions.past()
        for first in range(0, len(past), FRAME_NAMES):
            yield _past_frame(past[first : first + FRAME_NAMES])
        served = self._served()
        record = {
            "kind": "policy",
            "written_at_s": time.time(),
            "artifact_version": self._artifact_version,
            "policy_version": served.policy_version,
            "outputs": self._shapes,
            "rules": self._rules,
            "probe_error": served.probe_error,
            "num_rows": num_rows,
            "forgotten_starts": self._sessions.forgotten_starts,
            "is_pushed": served.parameters is not None,
        }
        parameters = served.parameters or {}
        yield Frame(record, {f"{PARAMETER}{name}": array for name, array in parameters.items()})

    def restore(self, snapshot: Snapshot) -> Restored:
        """Has the sessions of a snapshot live on here, in a table that has none yet.

        Where it is not final, those whose requests have no names are lost, and the others are
        stale. Raises SnapshotError where it is of another policy; then nothing was restored.
        """
        policy = snapshot[-1]
        served = self._checked(policy, snapshot.path)
        try:
            self._serve(served)
        except SnapshotError as error:
            raise SnapshotError(f"{snapshot.path}: {error}") from error
        num_frames, past = len(snapshot) - 1, dict[str, Past]()
        while num_frames and (frame := snapshot[num_frames - 1]).record["kind"] == "past":
            past = _past_of(frame) | past
            num_frames -= 1
        too_idle_s = inf
        if policy.record["num_rows"] > self._sessions.capacity:
            too_idle_s = self._too_idle_s(snapshot[at] for at in range(num_frames))
        live, lost = dict[str, Session](), dict[str, Past]()
        for at in range(num_frames):
            for name, session in self._restored(snapshot[at], past, too_idle_s, snapshot.is_final):
                if isinstance(session, Past):
                    lost[name] = session
                else:
                    live[name] = session
        self._sessions.restore(live, past | lost, policy.record["forgotten_starts"])
        return Restored(served, policy.record["written_at_s"], len(live), len(lost))

    def _next_sessions(self, names: list[str]) -> list[tuple[str, Session]]:
        """The last that fit in a frame, taken off; who is gone meanwhile is passed over."""
        some: list[tuple[str, Session]] = []
        num_rows = 0
        while names:
            session = self._sessions.get(names[-1])
            if session is not None:
                num_rows += len(session.rows)
                if some and num_rows > FRAME_ROWS:
                    break
                some.append((names[-1], session))
            names.pop()
        return some

    def _sessions_frame(self, some: list[tuple[str, Session]]) -> Frame:
        names, sessions = zip(*some, strict=True)
        now_s = self._clock()
        rows = np.concatenate([session.rows for session in sessions])
        record = {
            "kind": "sessions",
            "names": names,
            "runs": [session.run for session in sessions],
            "previous_runs": [session.previous_run for session in sessions],
            "policy_versions": [session.policy_version for session in sessions],
        }
        requests = b"".join([session.last_request for session in sessions])
        arrays: dict[str, NDArray[Any]] = {
            "num_rows": np.array([len(session.rows) for session in sessions]),
            "is_vector": np.array([session.is_vector for session in sessions]),
            "is_stale": np.array([session.is_stale for session in sessions]),
            "is_over": np.array([session.is_over for session in sessions]),
            "seed": np.array([session.seed for session in sessions], dtype=np.uint64),
            "next_step": np.array([session.next_step for session in sessions], dtype=np.uint64),
            "num_starts": np.array([session.num_starts for session in sessions], dtype=np.uint64),
            "last_request": np.frombuffer(requests, dtype=np.uint8).reshape(len(sessions), -1),
            "idle_s": np.array([now_s - session.last_used_s for session in sessions]),
            "episodes": np.concatenate([_episodes(session) for session in sessions]),
            "row_seed": self._rows.seed[rows],
            "row_step": self._rows.step[rows],
            **dict(zip(self._states, self._runtime.read(rows), strict=True)),
        }
        for name, array in self._rows.last(rows).arrays.items():
            arrays[f"{OUTPUT}{name}"] = array
        return Frame(record, arrays)

    def _checked(self, policy: Frame, path: Path) -> Served:
        """What was served, where it is what is served here. Raises SnapshotError."""
        record = policy.record
        version, artifact_version = record["policy_version"], record["artifact_version"]
        is_ours = self._artifact_version in (version, artifact_version)
        is_alike = record["outputs"] == self._shapes and record["rules"] == self._rules
        if not is_ours or not is_alike:
            raise SnapshotError(
                f"{path}: is of another policy, {version[:19]} of the artifact "
                f"{artifact_version[:19]}, and this artifact is {self._artifact_version[:19]}"
            )
        if not record["is_pushed"] or version == self._artifact_version:
            return Served(version)
        arrays = policy.arrays.items()
        parameters = {name.removeprefix(PARAMETER): array for name, array in arrays}
        return Served(version, parameters, record["probe_error"])

    def _too_idle_s(self, frames: Iterable[Frame]) -> float:
        """From when on there is no room for a session, where those used last are kept."""
        columns = [(frame.arrays["idle_s"], frame.arrays["num_rows"]) for frame in frames]
        idle_s, num_rows = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.argsort(idle_s)
        beyond = np.flatnonzero(np.cumsum(num_rows[order]) > self._sessions.capacity)
        return float(idle_s[order[beyond[0]]])

    def _restored(
        self, frame: Frame, past: Mapping[str, Past], too_idle_s: float, is_final: bool
    ) -> Iterator[tuple[str, Session | Past]]:
        """Those of a frame that have not ended since it was made, or what is known of who is lost.

        Fills their rows.
        """
        arrays, now_s = frame.arrays, self._clock()
        columns = {name: arrays[name].tolist() for name in _COLUMNS if name in arrays}
        stops = np.cumsum(arrays["num_rows"]).tolist()
        rows, of_rows = [], []
        for at, (name, stop) in enumerate(zip(frame.record["names"], stops, strict=True)):
            if name in past:
                continue
            of = {key: column[at] for key, column in columns.items()}
            num_rows, run = of["num_rows"], frame.record["runs"][at]
            has_room = of["idle_s"] < too_idle_s and num_rows <= self._max_rows
            if not has_room or (run is None and not is_final):
                yield name, Past(of["num_starts"], is_lost=True)
                continue
            where = slice(stop - num_rows, stop)
            session = Session(
                rows=self._rows.reserve(num_rows),
                is_vector=of["is_vector"],
                seed=of["seed"],
                run=run,
                previous_run=frame.record["previous_runs"][at],
                next_step=of["next_step"],
                num_starts=of["num_starts"],
                episodes=arrays["episodes"][where].copy() if of["is_vector"] else None,
                last_request=arrays["last_request"][at].tobytes(),
                policy_version=intern(frame.record["policy_versions"][at]),
                last_used_s=now_s - of["idle_s"],
                is_stale=of["is_stale"] or not is_final,
                is_over=of.get("is_over", False),  # which is younger than the others
            )
            rows.append(session.rows)
            of_rows.append(np.arange(where.start, where.stop))
            yield name, session
        if rows:
            self._fill(np.concatenate(rows), np.concatenate(of_rows), arrays)

    def _fill(self, rows: Rows, of: Rows, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Has rows be as those numbered `of` in a frame's arrays."""
        decided = {name: arrays[f"{OUTPUT}{name}"][of] for name in self._rows.outputs}
        self._rows.keep(rows, arrays["row_seed"][of], arrays["row_step"][of] - ONE, decided)
        self._runtime.write(rows, tuple([arrays[name][of] for name in self._states]))


_COLUMNS = (
    "num_rows",
    "is_vector",
    "is_stale",
    "is_over",
    "seed",
    "next_step",
    "num_starts",
    "idle_s",
)
"""Of what a frame has for each session, those that are arrays of numbers."""


def _episodes(session: Session) -> NDArray[np.uint64]:
    if session.episodes is None:
        return np.zeros(1, dtype=np.uint64)
    return session.episodes


def _past_frame(past: list[tuple[str, Past]]) -> Frame:
    arrays = {
        "num_starts": np.array([of.num_starts for _, of in past], dtype=np.uint64),
        "is_lost": np.array([of.is_lost for _, of in past]),
    }
    return Frame({"kind": "past", "names": [name for name, _ in past]}, arrays)


def _past_of(frame: Frame) -> dict[str, Past]:
    num_starts, is_lost = (frame.arrays[name].tolist() for name in ("num_starts", "is_lost"))
    return {
        name: Past(*of)
        for name, *of in zip(frame.record["names"], num_starts, is_lost, strict=True)
    }
