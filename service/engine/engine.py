"""A batch of validated requests -> their answers: the recurrent half of the service.

Gathers each session's state, makes the noise, runs the exported step once, scatters the new state.
Knows nothing of HTTP, JSON or of how batches form.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.loaders.protocol import LoadedStep
from model.spec import PolicySpec
from service.engine.noise_ahead import NoiseAhead
from service.engine.sessions import START, Session, SessionTable, Turn
from service.errors import Invalid, ServiceError
from service.runtime.protocol import StepInputs, StepOutputs

HiddenState = tuple[NDArray[np.float32], NDArray[np.float32]]
"""`(h, c)` of one environment, each `[layers, hidden]`."""

_Row = tuple["StepRequest", Turn]

GIVEN = ("observation", "action_mask", "blueprint_index", "slot_by_op_mask")
"""The step's inputs that a request brings, the last two where its policy reads them."""


@dataclass(slots=True)
class StepRequest:
    """One step of one environment, fully validated. No `session_id` means stateless.

    `fingerprint` stands for what decides the answer: a retry has it, another body has not.
    """

    observation: NDArray[np.float32]
    action_mask: NDArray[np.bool_]
    deterministic: bool = False
    session_id: str | None = None
    episode: str | None = None
    step: int | None = None
    episode_start: bool = False
    seed: int | None = None
    state: HiddenState | None = None
    blueprint_index: NDArray[np.int64] | None = None
    slot_by_op_mask: NDArray[np.bool_] | None = None
    fingerprint: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = blake2b(self.observation.tobytes(), digest_size=16)
        digest.update(self.action_mask.tobytes())
        if self.blueprint_index is not None:
            digest.update(self.blueprint_index.tobytes())
        if self.slot_by_op_mask is not None:
            digest.update(self.slot_by_op_mask.tobytes())
        digest.update(b"\1" if self.deterministic else b"\0")
        self.fingerprint = digest.digest()


class StepAnswer(NamedTuple):
    """What the policy decided; `state` only for a stateless request, which carries it itself."""

    action: list[int]
    log_prob: list[float]
    value: float
    step: int
    state: HiddenState | None = None
    is_replay: bool = False
    extra: Mapping[str, float | list[float]] = {}


class Engine:
    """Steps batches of at most `max_batch_size` requests, one per session."""

    def __init__(
        self,
        runtime: LoadedStep,
        sessions: SessionTable,
        spec: PolicySpec,
        *,
        buckets: Sequence[int],
        seed: int,
    ) -> None:
        self._runtime = runtime
        self._sessions = sessions
        self._spec = spec
        self._buckets = tuple(sorted(buckets))
        self._seed = seed
        self._num_stateless = 0
        self._inputs = StepInputs.allocate(spec, self._buckets[-1])
        self._given: list[tuple[Callable[[StepRequest], Any], NDArray[Any]]] = [
            (attrgetter(name), array)
            for name in GIVEN
            if (array := getattr(self._inputs, name)) is not None
        ]
        self._steps = {bucket: self._bind(bucket) for bucket in self._buckets}
        self._noise_ahead = NoiseAhead(spec.num_choices, sessions.capacity)

    def _bind(self, bucket: int) -> tuple[Callable[[], None], StepOutputs]:
        outputs = StepOutputs.allocate(self._spec, bucket)
        given = self._inputs.first(bucket).by_name()
        return self._runtime.bind(given, outputs.by_name()), outputs

    @property
    def max_batch_size(self) -> int:
        return self._buckets[-1]

    def warm_up(self, times: int = 3, *, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Runs every bucket, so that no request pays for a first run; until it is not wanted."""
        for bucket in self._buckets:
            for _ in range(times):
                if is_wanted():
                    self._run(bucket)

    def step(self, requests: Sequence[StepRequest]) -> list[StepAnswer | ServiceError]:
        """Answers each request, or says why not, in order; one request's error is its own."""
        answers: list[StepAnswer | ServiceError | None] = []
        rows: list[_Row] = []
        for request in requests:
            answer: StepAnswer | ServiceError | None = None  # until the model has run
            try:
                admitted = self._admit(request)
            except ServiceError as error:
                answer = error
            else:
                if isinstance(admitted, Turn):
                    rows.append((request, admitted))
                else:
                    answer = self._replay(request, admitted)
            answers.append(answer)
        advanced = iter(self._advance(rows) if rows else ())
        return [next(advanced) if answer is None else answer for answer in answers]

    def _admit(self, request: StepRequest) -> Turn | Session:
        if request.session_id is not None:
            return self._sessions.admit(
                request.session_id,
                start=request.episode_start,
                episode=request.episode,
                step=request.step,
                seed=request.seed,
                fingerprint=request.fingerprint,
            )
        seed = request.seed
        if seed is None:
            self._num_stateless += 1
            seed = derived_seed(self._seed, "", None, self._num_stateless)
        return Turn(START, request.step or 0, seed)

    def _replay(self, request: StepRequest, session: Session) -> StepAnswer:
        table, row = self._sessions, session.row
        assert request.session_id is not None
        table.touch(request.session_id)
        return StepAnswer(
            table.action[row].tolist(),
            table.log_prob[row].tolist(),
            float(table.value[row]),
            session.next_step - 1,
            is_replay=True,
            extra={name: array[row].tolist() for name, array in table.extra.items()},
        )

    def _advance(self, rows: list[_Row]) -> list[StepAnswer | ServiceError]:
        requests = [request for request, _ in rows]
        turns = [turn for _, turn in rows]
        num = len(rows)
        self._gather(requests, turns)
        self._make_noise(requests, turns)
        decided = self._run(next(size for size in self._buckets if size >= num))
        finite = _finite_rows(decided, num)
        answers: list[StepAnswer | ServiceError] = []
        moved_at: list[int] = []
        moved_to: list[int] = []
        actions, log_probs = decided.action.tolist(), decided.log_prob.tolist()
        values = decided.value.tolist()
        for at, (request, turn) in enumerate(rows):
            if not finite[at]:
                answers.append(
                    Invalid(
                        "the policy's output for this observation is not finite; the session has "
                        "not moved"
                    )
                )
                continue
            state = None
            if request.session_id is None:
                state = (decided.h[at].copy(), decided.c[at].copy())
            else:
                try:
                    session = self._sessions.commit(
                        request.session_id,
                        turn,
                        episode=request.episode,
                        fingerprint=request.fingerprint,
                    )
                except ServiceError as error:
                    answers.append(error)
                    continue
                moved_at.append(at)
                moved_to.append(session.row)
            answer = StepAnswer(actions[at], log_probs[at], values[at], turn.step, state)
            if decided.extra:
                extra = {name: array[at].tolist() for name, array in decided.extra.items()}
                answer = answer._replace(extra=extra)
            answers.append(answer)
        self._sessions.store(moved_to, decided, moved_at)
        return answers

    def _gather(self, requests: list[StepRequest], turns: list[Turn]) -> None:
        """Copies what the requests bring, and the states, into the preallocated batch."""
        num, batch = len(requests), self._inputs
        for of_request, array in self._given:
            rows = array[:num].reshape(-1, *array.shape[2:])
            np.concatenate(list(map(of_request, requests)), out=rows)
        self._sessions.load([turn.row for turn in turns], batch)
        for at, (request, turn) in enumerate(zip(requests, turns, strict=True)):
            if turn.row == START:
                batch.h[at], batch.c[at] = request.state or (0.0, 0.0)

    def _make_noise(self, requests: list[StepRequest], turns: list[Turn]) -> None:
        num = len(requests)
        sampled = [at for at, request in enumerate(requests) if not request.deterministic]
        if len(sampled) == num:
            self._noise_ahead.take(turns, self._inputs.noise)
            return
        self._inputs.noise[:num] = 0.0
        if sampled:
            noise = np.empty((len(sampled), self._spec.num_choices), dtype=np.float32)
            self._noise_ahead.take([turns[at] for at in sampled], noise)
            self._inputs.noise[sampled] = noise

    def _run(self, bucket: int) -> StepOutputs:
        """One step of what has been gathered; its arrays are the next step's too."""
        step, outputs = self._steps[bucket]
        step()
        return outputs


def _finite_rows(decided: StepOutputs, num: int) -> list[bool]:
    """Which of the first `num` rows have finite outputs only; as a rule all of them."""
    if np.isfinite(decided.floats).all():
        return [True] * num
    floats = (decided.value, decided.log_prob, decided.h, decided.c, *decided.extra.values())
    finite = [np.isfinite(array[:num]).reshape(num, -1).all(1) for array in floats]
    return [bool(row) for row in np.logical_and.reduce(finite)]


def derived_seed(server_seed: int, session_id: str, episode: str | None, starts: int) -> int:
    """The seed of an episode that brings none: from the server's seed and the episode's identity.

    An unnamed episode counts by how often its session has started, so that the episodes of one
    environment differ; a run without seeds repeats when its requests do.
    """
    which = f"#{starts}" if episode is None else f"={episode}"
    identity = f"{server_seed}/{session_id}/{which}".encode()
    return int.from_bytes(blake2b(identity, digest_size=8).digest(), "little")
