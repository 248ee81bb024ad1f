"""One trajectory of some environments on real sockets, however it is sent: the same bits.

As sessions of single environments, as one session of a vector in either form, with states that the
client carries, alone and beside each other; through cut connections, retries, duplicates and steps
out of turn. What must come is what the artifact gives each environment by itself.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.exporter import export_policy
from export.loaders.protocol import LoadedStep
from export.manifest import step_inputs, step_outputs
from model.spec import PolicySpec
from tamiyo_client.noise import gumbel_noise, row_seed
from tests.connection import Address, Answer, Connection
from tests.forms import JSON, SAFETENSORS, Arrays, Form, Told, inference
from tests.loaded_step import allocated, load_from
from tests.random_inputs import (
    packed,
    random_blueprints,
    random_masks,
    random_observations,
    random_policy,
    random_slots_by_op,
)
from tests.running_server import running_server
from tests.specs import TINY_V1, TINY_V2
from tests.traffic import run

SPECS = {
    "V1": TINY_V1,
    "V2": TINY_V2,
}
LARGEST_BATCH = {"V1": 64, "V2": 16}
MIN_STEPS, MAX_STEPS = 2, 6
FEW_ROWS = 5
MANY_ROWS = 300
MAX_BODY_BYTES = 4_000_000
TOO_LARGE = 3e38  # for this policy, not for a float32: only the model finds out
SEEDS = st.integers(0, 2**64 - 2)
MODEL = "tiny"
OIP, OIP_BINARY = (inference(MODEL, is_binary=is_binary) for is_binary in (False, True))
Json = dict[str, Any]


@dataclass
class Trajectory:
    """What some environments bring in each step, and what else happens on the way.

    Arrays are `[steps, rows, ...]`. `seed` is the run's; `seeds`, for each step, one a row, are of
    those that start. `refused` is sent before each step and must move nothing; `lost` are attempts
    at the step that come before the one whose answer counts.
    """

    spec: PolicySpec
    observations: NDArray[np.float32]
    masks: dict[str, NDArray[np.bool_]]
    more: dict[str, NDArray[Any]]
    starts: NDArray[np.bool_]
    seed: int | None
    seeds: list[NDArray[np.uint64] | None]
    deterministic: list[bool]
    refused: list[list[str]]
    lost: list[list[str]]
    episodes: NDArray[np.int64] = field(init=False)
    steps: NDArray[np.int64] = field(init=False)
    row_seeds: NDArray[np.uint64] = field(init=False)

    def __post_init__(self) -> None:
        """Where each environment is in its life: its episode, the step in it, and its seed."""
        self.num_steps, self.num_rows = self.starts.shape
        self.episodes = np.cumsum(self.starts, axis=0) - 1
        self.steps = np.zeros_like(self.episodes)
        self.row_seeds = np.zeros(self.starts.shape, dtype=np.uint64)
        for at, starts in enumerate(self.starts):
            for row in np.flatnonzero(~starts):
                self.steps[at, row] = self.steps[at - 1, row] + 1
                self.row_seeds[at, row] = self.row_seeds[at - 1, row]
            for row in np.flatnonzero(starts):
                self.row_seeds[at, row] = self._first_seed(at, row)

    def _first_seed(self, at: int, row: np.intp) -> np.uint64:
        own = self.seeds[at]
        if own is not None:
            return np.uint64(own[row])
        assert self.seed is not None
        return np.uint64(row_seed(self.seed, np.array(row), self.episodes[at, row])[()])

    def brings(self, at: int, rows: int | NDArray[np.intp]) -> Json:
        """What these of its environments bring in one step: one without rows, or several."""
        return {
            "observation": self.observations[at, rows],
            "action_mask": {head: mask[at, rows] for head, mask in self.masks.items()},
            "deterministic": self.deterministic[at],
            **{name: array[at, rows] for name, array in self.more.items()},
        }

    def of_vector(self, at: int, session_id: str) -> Json:
        """The step's request as one session of all environments."""
        which: Json = {"session_id": session_id, "run": "r", "step": at}
        if self.starts[at].any():
            which["episode_start"] = self.starts[at]
            if self.seeds[at] is not None:
                which["seed"] = self.seeds[at]
        if at == 0 and self.seeds[at] is None:
            which |= {"seed": self.seed, "episode_start": True}
        return which | self.brings(at, np.arange(self.num_rows))

    def of_one(self, at: int, row: int, session_id: str) -> Json:
        """The step's request of one environment that is a session."""
        step = int(self.steps[at, row])
        which: Json = {"session_id": session_id, "step": step}
        which["episode"] = str(self.episodes[at, row])
        if step == 0:
            which |= {"episode_start": True, "seed": int(self.row_seeds[at, row])}
        return which | self.brings(at, row)


@st.composite
def trajectories(draw: st.DrawFn, spec: PolicySpec, max_rows: int) -> Trajectory:
    num_rows, num_steps = draw(st.integers(1, max_rows)), draw(st.integers(MIN_STEPS, MAX_STEPS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = num_steps, num_rows
    masks = random_masks(spec, rng, *shape)
    starts = rng.random(shape) < draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    starts[0] = True
    seed = draw(st.none() | SEEDS)
    seeds = [
        rng.integers(2**64, size=num_rows, dtype=np.uint64)
        if starts[at].any() and (seed is None or (at and draw(st.booleans())))
        else None
        for at in range(num_steps)
    ]
    more: Arrays = {}
    if spec.has_slot_by_op:
        more["slot_by_op_mask"] = random_slots_by_op(spec, rng, masks["op"])
        more["blueprint_index"] = random_blueprints(spec, rng, *shape)

    def some(kinds: Sequence[str]) -> list[list[str]]:
        of_step = st.lists(st.sampled_from(kinds), max_size=2)
        return draw(st.lists(of_step, min_size=num_steps, max_size=num_steps))

    return Trajectory(
        spec,
        random_observations(spec, rng, *shape),
        masks,
        more,
        starts,
        seed,
        seeds,
        deterministic=draw(st.lists(st.booleans(), min_size=num_steps, max_size=num_steps)),
        refused=some([*REFUSED]),
        lost=some(LOST),
    )


def alone(trajectory: Trajectory, step: LoadedStep) -> list[Arrays]:
    """What the artifact gives each environment by itself, in batches of one."""
    spec = trajectory.spec
    inputs, outputs = allocated(step_inputs(spec), 1), allocated(step_outputs(spec), 1)
    given: Arrays = {
        "observation": trajectory.observations,
        "action_mask": packed(spec, trajectory.masks),
        **trajectory.more,
    }
    states = {"state_h_in": "state_h_out", "state_c_in": "state_c_out"}
    step_once = step.bind(inputs, outputs)
    told: list[list[Arrays]] = [[] for _ in range(trajectory.num_steps)]
    for row in range(trajectory.num_rows):
        noise = gumbel_noise(
            trajectory.row_seeds[:, row],
            trajectory.steps[:, row].astype(np.uint64),
            spec.num_choices,
        )
        for at, of_step in enumerate(told):
            for name, array in given.items():
                inputs[name][0] = array[at, row]
            inputs["noise"][0] = 0.0 if trajectory.deterministic[at] else noise[at]
            for before, after in states.items():
                inputs[before][:] = 0.0 if trajectory.starts[at, row] else outputs[after]
            step_once()
            kept = {n: a[0].copy() for n, a in outputs.items() if n not in states.values()}
            of_step.append(kept)
    return [stacked(of_step) for of_step in told]


def stacked(rows: Sequence[Mapping[str, NDArray[Any]]]) -> Arrays:
    """What environments were told one by one, as if they were a vector."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def with_middle_row(array: NDArray[Any], value: object) -> NDArray[Any]:
    """A copy whose middle row, or all of it where there are none, is all `value`."""
    changed = array.copy()
    rows = np.atleast_2d(changed)
    rows[len(rows) // 2] = value
    return changed


def observed(body: Json, value: float) -> Json:
    return body | {"observation": with_middle_row(body["observation"], value)}


def nothing_allowed(body: Json) -> Json:
    masks = body["action_mask"]
    return body | {"action_mask": masks | {"op": with_middle_row(masks["op"], False)}}


def twice_the_rows(body: Json) -> Json:
    return {
        name: twice_the_rows(value)
        if isinstance(value, dict)
        else (np.concatenate([value, value]) if isinstance(value, np.ndarray) else value)
        for name, value in body.items()
    }


def another_run(body: Json) -> Json:
    return body | {"run" if "run" in body else "episode": "another"}


class Wrong(NamedTuple):
    """How a request that is refused is made of the run's so far: the last is the next to come.

    There are to be `num_requests` of them.
    """

    status: int
    num_requests: int
    make: Callable[[Sequence[Json]], Json]
    names_row: bool = False


REFUSED = {
    "not finite": Wrong(422, 1, lambda run: observed(run[-1], float("nan")), names_row=True),
    "not finite once run": Wrong(422, 1, lambda run: observed(run[-1], TOO_LARGE), names_row=True),
    "nothing allowed": Wrong(422, 1, lambda run: nothing_allowed(run[-1]), names_row=True),
    "other rows": Wrong(422, 2, lambda run: twice_the_rows(run[-1])),
    "early": Wrong(409, 2, lambda run: run[-1] | {"step": run[-1]["step"] + 1}),
    "stale": Wrong(409, 3, lambda run: run[-3]),
    "another content": Wrong(409, 2, lambda run: observed(run[-2], 0.5)),
    "another run": Wrong(409, 2, lambda run: another_run(run[-1])),
    "another seed": Wrong(409, 2, lambda run: run[-1] | {"seed": 2**64 - 1}),
}
LOST = ("cut in the body", "cut before the answer", "cut in the answer", "sent twice", "answered")


class Session:
    """One session's requests, each sent through its faults until it has its answer."""

    def __init__(self, address: Address, form: Form, bodies: Sequence[Json]) -> None:
        self._connection, self._other = Connection(*address), Connection(*address)
        self._form = form
        self._bodies = bodies

    async def told(self, refused: Sequence[list[str]], lost: Sequence[list[str]]) -> list[Told]:
        told = []
        for at, body in enumerate(self._bodies):
            of_run = self._bodies[at - body["step"] : at + 1]
            for fault in refused[at]:
                if len(of_run) >= REFUSED[fault].num_requests:
                    await self._refused(REFUSED[fault], of_run)
            received = [part for fault in lost[at] for part in await self._lost(fault, body)]
            answer = await self._ask(body)
            assert answer.status == 200, answer
            assert answer.is_replay or not received
            assert all(answer.content.startswith(part) for part in received)
            told.append(self._form.told(answer))
            assert told[-1].step == body["step"]
        self._connection.cut()
        self._other.cut()
        return told

    async def _refused(self, wrong: Wrong, of_run: Sequence[Json]) -> None:
        answer = await self._ask(wrong.make(of_run))
        assert answer.status == wrong.status, answer
        if wrong.names_row and "run" in of_run[-1]:
            row = len(of_run[-1]["observation"]) // 2
            sentence = answer.content.decode()
            assert f"row {row}" in sentence or f"[{row}]" in sentence, answer

    async def _lost(self, fault: str, body: Json) -> list[bytes]:
        """Sends the step in vain; what was received of its answers."""
        if fault == "answered":
            return [(await self._ask(body)).content]
        if fault == "sent twice":
            await asyncio.gather(self._send(body), self._send(body, self._other))
            answers = await asyncio.gather(self._connection.receive(), self._other.receive())
            assert any(answer.is_replay for answer in answers)
            return [answer.content for answer in answers]
        await self._send(body, share=0.5 if fault == "cut in the body" else 1.0)
        received = []
        if fault == "cut in the answer":
            await self._connection.begin_to_receive()
            received.append(b"")
        self._connection.cut()
        return received

    async def _ask(self, body: Json) -> Answer:
        await self._send(body)
        return await self._connection.receive()

    async def _send(
        self, body: Json, connection: Connection | None = None, share: float = 1.0
    ) -> None:
        await (connection or self._connection).send(self._form.request(body), share)


async def as_single_sessions(address: Address, trajectory: Trajectory, name: str) -> list[Arrays]:
    """Each environment a session of its own, whose episodes bring their seeds."""
    steps = range(trajectory.num_steps)
    by_row = await asyncio.gather(
        *(
            Session(
                address, JSON, [trajectory.of_one(at, row, f"{name}-{row}") for at in steps]
            ).told(trajectory.refused, trajectory.lost)
            for row in range(trajectory.num_rows)
        )
    )
    return [stacked([told[at].outputs for told in by_row]) for at in steps]


async def as_vector(
    address: Address, trajectory: Trajectory, name: str, form: Form
) -> list[Arrays]:
    """All environments one session."""
    bodies = [trajectory.of_vector(at, name) for at in range(trajectory.num_steps)]
    told = await Session(address, form, bodies).told(trajectory.refused, trajectory.lost)
    return [outputs for _, outputs, _ in told]


async def carried(
    address: Address,
    trajectory: Trajectory,
    form: Form,
    grouped: Callable[[NDArray[np.int64]], Sequence[int | NDArray[np.intp]]],
) -> list[Arrays]:
    """Without sessions: the environments of a group, at one step of theirs, send their states."""
    outputs = allocated(step_outputs(trajectory.spec), trajectory.num_rows)
    states = {"h": outputs.pop("state_h_out"), "c": outputs.pop("state_c_out")}

    async def step(at: int, rows: int | NDArray[np.intp]) -> None:
        body = {
            "step": int(np.max(trajectory.steps[at, rows])),
            "seed": trajectory.row_seeds[at, rows],
            **trajectory.brings(at, rows),
        }
        if body["step"]:
            body["state"] = {half: state[rows] for half, state in states.items()}
        connection = Connection(*address)
        await connection.send(form.request(body))
        answer = await connection.receive()
        connection.cut()
        assert answer.status == 200, answer
        told = form.told(answer)
        assert told.state is not None
        for arrays, of_rows in ((outputs, told.outputs), (states, told.state)):
            for name, array in arrays.items():
                array[rows] = of_rows[name]

    told = []
    for at, steps in enumerate(trajectory.steps):
        await asyncio.gather(*(step(at, rows) for rows in grouped(steps)))
        told.append({name: array.copy() for name, array in outputs.items()})
    return told


def by_step(steps: NDArray[np.int64]) -> list[NDArray[np.intp]]:
    return [np.flatnonzero(steps == step) for step in np.unique(steps)]


Way = Callable[[Address, Trajectory, str], Coroutine[Any, Any, list[Arrays]]]
VECTOR_WAYS: dict[str, Way] = {
    "vector in JSON": lambda address, t, name: as_vector(address, t, name, JSON),
    "vector in safetensors": lambda address, t, name: as_vector(address, t, name, SAFETENSORS),
    "vector by OIP": lambda address, t, name: as_vector(address, t, name, OIP),
    "vector by OIP in binary": lambda address, t, name: as_vector(address, t, name, OIP_BINARY),
    "carried in JSON": lambda address, t, _: carried(address, t, JSON, by_step),
    "carried in safetensors": lambda address, t, _: carried(address, t, SAFETENSORS, by_step),
    "carried by OIP in binary": lambda address, t, _: carried(address, t, OIP_BINARY, by_step),
}
WAYS_OF_FEW: dict[str, Way] = {
    "single sessions": as_single_sessions,
    "carried one by one": lambda address, t, _: carried(
        address, t, JSON, lambda steps: range(len(steps))
    ),
}
WAYS = {**VECTOR_WAYS, **WAYS_OF_FEW}
NUMBERS = count()
"""Of trajectories, so that no two are one session's."""
on_sockets = settings(max_examples=8, phases=(Phase.explicit, Phase.generate))
"""No failure is made smaller: it takes minutes, and on sockets no order of events comes again."""


class Served(NamedTuple):
    """A policy behind a socket, and the artifact's step."""

    spec: PolicySpec
    address: Address
    step: LoadedStep


@pytest.fixture(scope="module", params=SPECS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    spec, output = SPECS[request.param], tmp_path_factory.mktemp("vectors") / "tiny"
    export_policy(
        random_policy(spec),
        None,
        output,
        name=MODEL,
        formats=("onnx",),
        max_batch_size=LARGEST_BATCH[request.param],
    )
    with running_server(output, "--max-body-bytes", str(MAX_BODY_BYTES)) as server:
        yield Served(spec, server.host_and_port, load_from(output, "onnx"))
        assert server.stop() == 0
        assert "Traceback" not in server.log()


def check(trajectory: Trajectory, told: Mapping[str, Sequence[Arrays]], step: LoadedStep) -> None:
    """Whatever the way, it is to the bit what the artifact gives."""
    expected = alone(trajectory, step)
    for way, of_steps in told.items():
        for at, (got, arrays) in enumerate(zip(of_steps, expected, strict=True)):
            assert got.keys() == arrays.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(got[name], array, f"{way}, step {at}: {name}")


@pytest.mark.parametrize("way", WAYS)
@given(data=st.data())
@on_sockets
def test_environments_are_told_the_same_bits_however_they_are_sent(
    served: Served, way: str, data: st.DataObject
) -> None:
    max_rows = FEW_ROWS if way in WAYS_OF_FEW else MANY_ROWS
    trajectory = data.draw(trajectories(served.spec, max_rows))
    told = run(WAYS[way](served.address, trajectory, f"t-{next(NUMBERS)}"))
    check(trajectory, {way: told}, served.step)


@given(data=st.data())
@on_sockets
def test_environments_are_told_the_same_bits_beside_each_other(
    served: Served, data: st.DataObject
) -> None:
    """A few in every way and many in every way that vectors have, all at once."""
    few = data.draw(trajectories(served.spec, FEW_ROWS))
    many = data.draw(trajectories(served.spec, MANY_ROWS))

    async def sent(trajectory: Trajectory, ways: Mapping[str, Way]) -> dict[str, list[Arrays]]:
        name = f"t-{next(NUMBERS)}"
        told = [each(served.address, trajectory, f"{name} {way}") for way, each in ways.items()]
        return dict(zip(ways, await asyncio.gather(*told), strict=True))

    async def both() -> Sequence[dict[str, list[Arrays]]]:
        return await asyncio.gather(sent(few, WAYS), sent(many, VECTOR_WAYS))

    for trajectory, told in zip((few, many), run(both()), strict=True):
        check(trajectory, told, served.step)
