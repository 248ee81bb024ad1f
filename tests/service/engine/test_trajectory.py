"""One trajectory of some environments, however it is sent: the same bits, and as published."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.spec import PolicySpec
from service.engine.block import Block
from service.errors import Invalid, ServiceError, StepConflict
from service.runtime.protocol import State
from tamiyo_client.noise import gumbel_noise, row_seed
from tests.service.fakes import POISON, Bench, Beside, Stepped

MAX_ROWS = 6
SEEDS = st.integers(0, 2**64 - 1)
FAULTS = ("duplicate", "early", "stale", "changed", "refused", "another run", "failing")


class Decided(NamedTuple):
    """What one environment is told."""

    action: list[int]
    log_prob: list[float]
    value: float


@dataclass
class Step:
    """What the environments bring, and what else is sent before and must move nothing.

    `xs` is `[rows]`, `allowed` `[rows, choices]`; `seeds`, one a row, are of those that start.
    """

    xs: NDArray[np.float32]
    allowed: NDArray[np.bool_]
    starts: tuple[bool, ...]
    deterministic: bool
    seeds: tuple[int, ...] | None
    faults: tuple[str, ...]


@dataclass
class Place:
    """Where an environment is in its life: its episode from 0, and the step in it; its seed."""

    episode: int
    step: int
    seed: int


@dataclass
class Trajectory:
    spec: PolicySpec
    seed: int | None
    steps: list[Step]
    places: list[list[Place]] = field(init=False)

    def __post_init__(self) -> None:
        self.num_rows = len(self.steps[0].starts)
        self.places = []
        for step in self.steps:
            before = self.places[-1] if self.places else None
            self.places.append([self.place(step, row, before) for row in range(self.num_rows)])

    def place(self, step: Step, row: int, before: list[Place] | None) -> Place:
        if not step.starts[row]:
            assert before is not None
            return Place(before[row].episode, before[row].step + 1, before[row].seed)
        episode = 0 if before is None else before[row].episode + 1
        if step.seeds is not None:
            return Place(episode, 0, step.seeds[row])
        assert self.seed is not None
        return Place(episode, 0, int(row_seed(self.seed, np.array(row), np.array(episode))))

    def block(
        self, brings: Step, rows: Sequence[int], *, poison: Sequence[int] = (), **fields: Any
    ) -> Block:
        """What these of its environments bring in one step."""
        observation = np.zeros((len(rows), self.spec.observation_dim), dtype=np.float32)
        observation[:, 0] = brings.xs[list(rows)]
        observation[list(poison), -1] = POISON
        given = observation, brings.allowed[list(rows)]
        return Block(given, deterministic=brings.deterministic, **fields)


@st.composite
def trajectories(draw: st.DrawFn, spec: PolicySpec) -> Trajectory:
    num_rows, num_steps = draw(st.integers(1, MAX_ROWS)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    seed = draw(st.none() | SEEDS)
    ends = np.cumsum(spec.head_sizes)
    steps = []
    for number in range(num_steps):
        allowed = rng.random((num_rows, spec.num_choices)) < 0.6
        for start, end in zip(ends - spec.head_sizes, ends, strict=True):
            allowed[range(num_rows), rng.integers(start, end, num_rows)] = True
        rows = st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)
        starts = tuple(draw(rows)) if number else (True,) * num_rows
        seeds = None
        if any(starts) and (seed is None or (number and draw(st.booleans()))):
            seeds = tuple(draw(st.lists(SEEDS, min_size=num_rows, max_size=num_rows)))
        steps.append(
            Step(
                rng.integers(-9, 9, num_rows).astype(np.float32),
                allowed,
                starts,
                deterministic=draw(st.booleans()),
                seeds=seeds,
                faults=tuple(draw(st.lists(st.sampled_from(FAULTS), max_size=2))),
            )
        )
    return Trajectory(spec, seed, steps)


def by_hand(trajectory: Trajectory) -> list[list[Decided]]:
    """What the fake policy gives for sums kept here, and for the published noise."""
    spec = trajectory.spec
    ends = np.cumsum(spec.head_sizes)[:-1]
    sums = np.zeros(trajectory.num_rows)
    told = []
    for step, places in zip(trajectory.steps, trajectory.places, strict=True):
        sums = np.where(step.starts, 0.0, sums) + step.xs
        of_step = []
        for row, place in enumerate(places):
            seeds, steps = np.array([place.seed], np.uint64), np.array([place.step], np.uint64)
            (noise,) = gumbel_noise(seeds, steps, spec.num_choices)
            noise = np.where(step.allowed[row], noise * (not step.deterministic), -np.inf)
            heads = np.split(noise, ends)
            action, log_prob = [int(h.argmax()) for h in heads], [float(h.max()) for h in heads]
            of_step.append(Decided(action, log_prob, float(sums[row])))
        told.append(of_step)
    return told


def decided(answer: Stepped | ServiceError) -> list[Decided]:
    """What each row of an answer is told."""
    assert isinstance(answer, Stepped), answer
    rows = zip(answer.action, answer.log_prob, answer.value, strict=True)
    return [Decided(*row) for row in rows]


def send_faults(
    bench: Bench, faults: Sequence[str], make: Callable[..., Block], last: Block, next_step: int
) -> None:
    """What must move nothing: `make` makes the session's next block, but for what is given."""
    refused: dict[str, tuple[dict[str, Any], type[ServiceError]]] = {
        "early": ({"step": next_step + 1}, StepConflict),
        "stale": ({"step": max(0, next_step - 2), "poison": [0]}, StepConflict),
        "changed": ({"step": next_step - 1, "poison": [0]}, StepConflict),
        "refused": ({"step": next_step, "poison": [0]}, Invalid),
        "another run": ({"step": next_step, "run": "another"}, StepConflict),
        "failing": ({"step": next_step}, ServiceError),
    }
    for fault in faults:
        if fault == "duplicate":
            assert bench.only(last).is_replay
            continue
        fields, error = refused[fault]
        bench.loaded.failure = RuntimeError("broken") if fault == "failing" else None
        (answer,) = bench.take(make(**fields))
        bench.loaded.failure = None
        assert type(answer) is error, fault


def vector_block(trajectory: Trajectory, number: int, session_id: str, **fields: Any) -> Block:
    step = trajectory.steps[number]
    uniform = all(step.starts) or not any(step.starts)
    fields = {
        "step": number,
        "starts": step.starts[0] if uniform else np.array(step.starts),
        "seeds": None if step.seeds is None else np.array(step.seeds, dtype=np.uint64),
        "seed": None if step.seeds is not None else trajectory.seed,
        "run": "p",
        **fields,
    }
    rows = range(trajectory.num_rows)
    return trajectory.block(step, rows, is_vector=True, session_id=session_id, **fields)


def single_block(trajectory: Trajectory, number: int, row: int, **fields: Any) -> Block:
    place = trajectory.places[number][row]
    fields = {
        "step": place.step,
        "starts": place.step == 0,
        "seed": place.seed,
        "run": f"{place.episode}",
        **fields,
    }
    return trajectory.block(trajectory.steps[number], [row], session_id=f"row {row}", **fields)


def as_single_sessions(trajectory: Trajectory) -> list[list[Decided]]:
    """Each environment a session of its own, whose episodes bring their seeds."""
    bench = Bench(trajectory.spec)
    told = []
    for number, step in enumerate(trajectory.steps):
        for row, place in enumerate(trajectory.places[number]):
            if place.step:
                make = partial(single_block, trajectory, number, row)
                last = single_block(trajectory, number - 1, row)
                send_faults(bench, step.faults, make, last, place.step)
        rows = range(trajectory.num_rows)
        answers = bench.take(*[single_block(trajectory, number, row) for row in rows])
        told.append([decided(answer)[0] for answer in answers])
    bench.check_rows()
    return told


def as_one_vector_session(trajectory: Trajectory) -> list[list[Decided]]:
    return in_vector_session(Bench(trajectory.spec), trajectory, lambda number: ([], []))


def as_one_vector_session_beside_the_loop(trajectory: Trajectory) -> list[list[Decided]]:
    """And others with it, in batches smaller than the block."""
    buckets = range(1, 2 + trajectory.num_rows // 2)
    bench = Bench(trajectory.spec, capacity=4 * MAX_ROWS, buckets=buckets, host=Beside)

    def company(number: int) -> tuple[list[Block], list[Block]]:
        before, behind = (vector_block(trajectory, number, name) for name in "wx")
        return [before], [behind]

    return in_vector_session(bench, trajectory, company)


def in_vector_session(
    bench: Bench,
    trajectory: Trajectory,
    company: Callable[[int], tuple[list[Block], list[Block]]],
) -> list[list[Decided]]:
    """The session's blocks, with company before and behind each."""
    told: list[list[Decided]] = []
    for number, step in enumerate(trajectory.steps):
        if number:
            make = partial(vector_block, trajectory, number, "v")
            send_faults(bench, step.faults, make, vector_block(trajectory, number - 1, "v"), number)
        before, behind = company(number)
        answers = bench.take(*before, vector_block(trajectory, number, "v"), *behind)
        told.append(decided(answers.pop(len(before))))
        for answer in answers:
            assert decided(answer) == told[-1]
    bench.check_rows()
    return told


def in_parts_beside_others(trajectory: Trajectory) -> list[list[Decided]]:
    """In batches smaller than the block, on a device, between another trajectory's blocks."""
    max_batch_size = 1 + trajectory.num_rows // 2
    bench = Bench(
        trajectory.spec, capacity=4 * MAX_ROWS, buckets=range(1, max_batch_size + 1), turns=1
    )

    def company(number: int) -> tuple[list[Block], list[Block]]:
        before, between, behind = (vector_block(trajectory, number, name) for name in "wxy")
        return [before], [between, behind]

    return in_vector_session(bench, trajectory, company)


def stateless_one_by_one(trajectory: Trajectory) -> list[list[Decided]]:
    """Each environment carries its own state."""
    return stateless(trajectory, lambda places: [[row] for row in range(len(places))])


def stateless_together(trajectory: Trajectory) -> list[list[Decided]]:
    """Those that are at the same step of their episodes go together, and carry their states."""

    def by_step(places: list[Place]) -> list[list[int]]:
        steps = {place.step for place in places}
        return [[row for row, p in enumerate(places) if p.step == step] for step in steps]

    return stateless(trajectory, by_step)


def stateless(
    trajectory: Trajectory, grouped: Callable[[list[Place]], list[list[int]]]
) -> list[list[Decided]]:
    bench = Bench(trajectory.spec)
    states: list[State | None] = [None] * trajectory.num_rows
    told = []
    for step, places in zip(trajectory.steps, trajectory.places, strict=True):
        groups = grouped(places)
        blocks = []
        for rows in groups:
            carried = [state for row in rows if (state := states[row]) and places[row].step]
            h, c = ([state[half] for state in carried] for half in (0, 1))
            fields: dict[str, Any] = {
                "is_vector": True,
                "seeds": np.array([places[row].seed for row in rows], dtype=np.uint64),
                "step": places[rows[0]].step,
                "state": (np.concatenate(h), np.concatenate(c)) if carried else None,
            }
            if "refused" in step.faults:
                (answer,) = bench.take(trajectory.block(step, rows, poison=[0], **fields))
                assert type(answer) is Invalid
            blocks.append(trajectory.block(step, rows, **fields))
        of_row: dict[int, Decided] = {}
        for rows, answer in zip(groups, bench.take(*blocks), strict=True):
            assert isinstance(answer, Stepped)
            assert answer.state is not None
            of_row |= zip(rows, decided(answer), strict=True)
            for at, row in enumerate(rows):
                states[row] = answer.state[0][at : at + 1], answer.state[1][at : at + 1]
        told.append([of_row[row] for row in range(trajectory.num_rows)])
    bench.check_rows()
    return told


WAYS = (
    as_single_sessions,
    as_one_vector_session,
    as_one_vector_session_beside_the_loop,
    in_parts_beside_others,
    stateless_one_by_one,
    stateless_together,
)


@pytest.mark.parametrize("way", WAYS)
@given(data=st.data())
@settings(max_examples=40)
def test_a_trajectory_is_told_the_same_bits_however_it_is_sent(
    spec: PolicySpec,
    way: Callable[[Trajectory], list[list[Decided]]],
    data: st.DataObject,
) -> None:
    trajectory = data.draw(trajectories(spec))
    assert way(trajectory) == by_hand(trajectory)
