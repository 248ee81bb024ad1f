"""What the service's tests put in place of a model, of time and of a client.

A fake policy whose state is a running sum, so that a step taken twice or lost shows in its value;
a clock that is set by hand; and a synchronous face on the application.
"""

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from copy import copy
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from weakref import ref

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from export.loaders.protocol import RenewableStep
from export.manifest import (
    File,
    Manifest,
    Parameter,
    Parity,
    Source,
    step_inputs,
    step_outputs,
)
from export.parameters import Parameters
from model.sb3.spec import SB3Spec
from model.spec import PolicySpec
from model.step_spec import StepSpec
from service.engine import kept_sessions
from service.engine.batcher import Batcher
from service.engine.block import Answer, Block
from service.engine.engine import Engine
from service.engine.kept_sessions import KeptSessions
from service.engine.rows import RowTable
from service.engine.sessions import SessionTable
from service.engine.snapshot_file import Draft, Snapshot
from service.engine.stepper import Stepper
from service.errors import Overloaded, ServiceError
from service.http.app import create_app
from service.http.keys import Keys
from service.metrics import Metrics
from service.runtime.arrays import decisions
from service.runtime.host import HostRuntime, HostStates, _Lane
from service.runtime.protocol import Outputs, Rows, State
from service.settings import Settings

Arrays = Mapping[str, NDArray[Any]]
Result = TypeVar("Result")

TIMEOUT_S = 20.0
"""No test's event loop runs longer than this."""
POISON = 1e30
"""In an observation's last column: the fake policy's output for that row is not a number."""
SERVER_SEED = 7
VERSION = "sha256:0"


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


def submitted(
    batcher: Batcher,
    block: Block,
    *,
    is_wanted: Callable[[], bool] | None = None,
    **options: Any,
) -> "asyncio.Future[Answer]":
    """A future of the block's answer; cancelling it is not wanting it any more."""
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def settle(result: Answer | ServiceError) -> None:
        assert not future.done() or future.cancelled()
        if future.cancelled():
            return
        if isinstance(result, ServiceError):
            future.set_exception(result)
        else:
            future.set_result(result)

    wanted = is_wanted or (lambda: not future.cancelled())
    batcher.submit(block, settle, is_wanted=wanted, **options)
    return future


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class SummingRuntime:
    """A policy in NumPy: `h` is the sum of `observation[0]` so far, `c` how often it stepped.

    A critic's own are twice as much. The value is the sum, and without a state `observation[0]`;
    each head takes its allowed choice with the most noise and gives that noise as its log-prob.
    Every row depends on that row alone.

    `failure` is raised where it is set; `gate` must be set before a call returns; `spoil` may
    write to the outputs.
    """

    name = "summing"
    device = "cpu"

    def __init__(self, spec: StepSpec) -> None:
        self.spec = spec
        self.batch_sizes: list[int] = []
        self.failure: Exception | None = None
        self.gate: threading.Event | None = None
        self.spoil: Callable[[Arrays], None] = lambda decided: None
        self.scale = np.ones(1, dtype=np.float32)

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        def run() -> None:
            self.batch_sizes.append(len(inputs["observation"]))
            if self.gate is not None:
                assert self.gate.wait(TIMEOUT_S)
            if self.failure is not None:
                raise self.failure
            self._step(inputs, outputs)
            self.spoil(outputs)

        return run

    def with_parameters(self, parameters: Parameters) -> "SummingRuntime":
        """One whose value is the sum times its one parameter, `scale`."""
        other = copy(self)
        other.scale = parameters["scale"]
        return other

    def _step(self, inputs: Arrays, outputs: Arrays) -> None:
        observation = inputs["observation"]
        total = observation[:, 0]
        for at, state in enumerate(self.spec.states):
            more = np.float32(1) if at % 2 else observation[:, :1, None]
            outputs[state.output][:] = inputs[state.input] + more * np.float32(at // 2 + 1)
            if at == 0:
                total = outputs[state.output][:, 0, 0]
        is_poison = observation[:, -1] == np.float32(POISON)
        outputs["value"][:] = np.where(is_poison, np.nan, total) * self.scale
        masked = np.where(inputs["action_mask"], inputs["noise"], -np.inf)
        heads = np.split(masked, np.cumsum(self.spec.head_sizes)[:-1], axis=1)
        outputs["action"][:] = np.stack([head.argmax(1) for head in heads], axis=1)
        outputs["log_prob"][:] = np.stack([head.max(1) for head in heads], axis=1)


def single(
    spec: StepSpec,
    x: float = 1.0,
    session_id: str | None = None,
    *,
    is_poison: bool = False,
    forbid: Sequence[int] = (),
    more: Sequence[NDArray[Any]] = (),
    **fields: Any,
) -> Block:
    """One environment that adds `x` to the fake policy's sum; columns in `forbid` are not allowed.

    `more` are the inputs that only some policies read.
    """
    block = vector(spec, [x], session_id, poison=[0] if is_poison else [], **fields)
    block.given[1][0, list(forbid)] = False
    return Block((*block.given, *more), session_id=session_id, **fields)


def vector(
    spec: StepSpec,
    xs: Sequence[float],
    session_id: str | None = None,
    *,
    poison: Sequence[int] = (),
    **fields: Any,
) -> Block:
    """As many environments as `xs`, of which each adds its own; rows in `poison` are spoilt."""
    observation = np.zeros((len(xs), spec.observation_dim), dtype=np.float32)
    observation[:, 0] = xs
    observation[list(poison), -1] = POISON
    action_mask = np.ones((len(xs), spec.num_choices), dtype=np.bool_)
    fields.setdefault("is_vector", True)
    return Block((observation, action_mask), session_id=session_id, **fields)


class Stepped(NamedTuple):
    """An answer, copied out of its batch."""

    action: list[list[int]]
    log_prob: list[list[float]]
    value: list[float]
    step: int
    state: State | None
    is_replay: bool
    policy_version: str

    @classmethod
    def copy(cls, answer: Answer) -> "Stepped":
        action, log_prob, value = (
            answer.array(name).tolist() for name in ("action", "log_prob", "value")
        )
        return cls(
            action,
            log_prob,
            value,
            answer.step,
            answer.state,
            answer.is_replay,
            answer.policy_version,
        )


class Beside(HostRuntime):
    """A runtime whose steps all run on another thread, however short they are."""

    def launch(self, read_rows: Rows, write_rows: Rows, *, beside_s: float = inf) -> None:
        super().launch(read_rows, write_rows, beside_s=0.0)


class Device(HostRuntime):
    """A runtime that works on each batch for `turns` turns of the loop, or until `finish`.

    It reads its inputs and the states last of all: who writes to them meanwhile spoils the batch.
    `beside_s` is what the last launch was told.
    """

    turns: float = 0
    beside_s: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._queue: deque[tuple[_Lane, Rows, Rows]] = deque()
        self._num_done = 0

    def launch(self, read_rows: Rows, write_rows: Rows, *, beside_s: float = inf) -> None:
        self.beside_s = beside_s
        self._queue.append((self._lanes[0], read_rows.copy(), write_rows.copy()))
        self._lanes.rotate()
        if len(self._queue) == 1:
            self._work(self.turns)

    def _work(self, turns: float) -> None:
        if turns == 0:
            self.finish()
        elif turns < inf:
            asyncio.get_running_loop().call_soon(self._work, turns - 1)

    def is_done(self) -> bool:
        return self._num_done > 0

    def collect(self) -> Outputs:
        lane, read_rows, write_rows = self._queue.popleft()
        self._num_done -= 1
        lanes, self._lanes = self._lanes, deque([lane])
        try:
            super().launch(read_rows, write_rows)
        finally:
            self._lanes = lanes
            if self._queue:
                self._work(self.turns)
        return super().collect()

    def finish(self) -> None:
        self._num_done += 1
        self.when_done()


class Bench:
    """A stepper, its sessions and batchers over the fake policy or another, without HTTP.

    It runs on a `device` that works for so many turns of the loop, or, with none, on the host; then
    `over` which step, and by which `host`.
    `observed` are the rows of each batch, `settled` the blocks in the order of their answers.
    """

    def __init__(
        self,
        spec: StepSpec,
        *,
        capacity: int = 8,
        idle_timeout_s: float = 60.0,
        buckets: Sequence[int] = (1, 2, 4, 8),
        turns: float | None = None,
        over: RenewableStep | None = None,
        host: type[HostRuntime] = HostRuntime,
        largest: int = 64,
        spare_rows: int = 64,
        max_waiting: int = 1000,
    ) -> None:
        self.spec = spec
        self._options: dict[str, Any] = {
            "capacity": capacity,
            "idle_timeout_s": idle_timeout_s,
            "buckets": buckets,
            "turns": turns,
            "over": over,
            "host": host,
        }
        self.clock = FakeClock()
        self.observed = observed = list[int]()
        self.settled: list[Block] = []
        self.loaded = SummingRuntime(spec)
        self.num_rows = capacity + spare_rows
        self.states = HostStates(spec, self.num_rows)
        make_runtime = host if turns is None else Device
        self.runtime = make_runtime(
            over or self.loaded,
            self.states,
            inputs=step_inputs(spec),
            outputs=step_outputs(spec),
            batch_sizes=buckets,
        )
        if isinstance(self.runtime, Device) and turns is not None:
            self.runtime.turns = turns
        self.rows = RowTable(self.num_rows, decisions(spec), largest=largest)
        self.sessions = SessionTable(
            self.rows,
            capacity=capacity,
            idle_timeout_s=idle_timeout_s,
            seed=SERVER_SEED,
            clock=self.clock,
        )
        self.max_batch_size = max(buckets)
        self.max_waiting = max_waiting
        self.stepper = Stepper(
            self.runtime,
            self.rows,
            self.sessions,
            spec,
            policy_version=VERSION,
            seed=SERVER_SEED,
            observe=lambda num_rows, seconds: observed.append(num_rows),
        )

    def kept(
        self,
        version: str = VERSION,
        *,
        max_rows: int = 64,
        served: kept_sessions.Served | None = None,
    ) -> KeptSessions:
        """The sessions, as snapshots of an artifact of this version have them."""
        return KeptSessions(
            self.sessions,
            self.rows,
            self.runtime,
            step_outputs(self.spec),
            spec=self.spec,
            artifact_version=version,
            max_rows=max_rows,
            served=lambda: served or kept_sessions.Served(version),
            serve=lambda served: None,
            clock=self.clock,
        )

    def write(self, path: Path, *, is_final: bool = True) -> None:
        """A snapshot of it as it is."""
        with Draft(path) as draft:
            for frame in self.kept().frames(is_final=is_final):
                draft.add(frame)
            draft.publish(is_final=is_final)

    def restarted(self, path: Path, *, is_final: bool = True, **options: Any) -> "Bench":
        """Another, with the same options or others, that goes on from a snapshot of this one."""
        self.write(path, is_final=is_final)
        return self.after(path, **options)

    def after(self, path: Path, **options: Any) -> "Bench":
        """Another, that goes on from the snapshot at `path`."""
        bench = Bench(self.spec, **(self._options | options))
        bench.clock.now_s = self.clock.now_s + 5000.0  # where a clock begins, nobody knows
        with Snapshot(path) as snapshot:
            bench.kept().restore(snapshot)
        return bench

    @property
    def device(self) -> Device:
        assert isinstance(self.runtime, Device)
        return self.runtime

    def batcher(self) -> Batcher:
        batcher = Batcher(
            self.stepper,
            max_batch_size=self.max_batch_size,
            max_waiting=self.max_waiting,
            clock=self.clock,
        )
        self._batcher = batcher  # which nobody else may keep, while the runtime works for it
        loop, weak = asyncio.get_running_loop(), ref(batcher)

        def wake() -> None:
            if (waiting := weak()) is not None:
                with suppress(RuntimeError):  # the batch was collected, and the loop has ended
                    loop.call_soon_threadsafe(waiting.wake)

        self.runtime.when_done = wake
        return batcher

    def submit(
        self, batcher: Batcher, block: Block, *, timeout_s: float = inf
    ) -> "asyncio.Future[Stepped | ServiceError]":
        """A future of what the block is answered, or why not."""
        future: asyncio.Future[Stepped | ServiceError] = asyncio.get_running_loop().create_future()

        def settle(answer: Answer | ServiceError) -> None:
            self.settled.append(block)
            future.set_result(Stepped.copy(answer) if isinstance(answer, Answer) else answer)

        batcher.submit(block, settle, is_wanted=lambda: True, timeout_s=timeout_s)
        return future

    def take(self, *blocks: Block) -> list[Stepped | ServiceError]:
        """Submits the blocks at once; what each is answered, in order."""
        (answers,) = self.take_waves([blocks])
        return answers

    def take_waves(self, waves: Sequence[Sequence[Block]]) -> list[list[Stepped | ServiceError]]:
        """Submits each wave's blocks at once, when those before are answered."""

        async def take() -> list[list[Stepped | ServiceError]]:
            batcher = self.batcher()
            return [
                await asyncio.gather(*[self.submit(batcher, block) for block in wave])
                for wave in waves
            ]

        return run(take())

    def values(self, *blocks: Block) -> list[list[float]]:
        """The same, where each is answered: the values."""
        answers = self.take(*blocks)
        assert all(isinstance(answer, Stepped) for answer in answers), answers
        return [answer.value for answer in answers if isinstance(answer, Stepped)]

    def check_rows(self) -> None:
        """With nothing under way, every row is free once, but for those of live sessions."""
        num_free = self.num_rows - self.sessions.num_rows
        free = self.rows.reserve(num_free)
        with pytest.raises(Overloaded):
            self.rows.reserve(1)
        assert len(np.unique(free)) == num_free
        self.rows.give_back(free)

    def step(self, x: float = 1.0, session_id: str | None = "a", **fields: Any) -> Stepped:
        """One environment's request by itself; its error is raised."""
        return self.only(single(self.spec, x, session_id, **fields))

    def start(self, x: float = 1.0, session_id: str = "a", **fields: Any) -> Stepped:
        return self.step(x, session_id, starts=True, **fields)

    def only(self, block: Block) -> Stepped:
        """One block by itself; its error is raised."""
        (answer,) = self.take(block)
        if isinstance(answer, ServiceError):
            raise answer
        return answer


def manifest_of(spec: PolicySpec | SB3Spec, name: str = "tiny") -> Manifest:
    """Of an artifact that has no formats: what is served of it is a fake's."""
    nothing = File(file="policy.safetensors", sha256="0" * 64, bytes=0)
    return Manifest(
        schema_version=2,
        name=name,
        spec=spec,
        precision="fp32",
        device="cpu",
        has_normalizer=False,
        max_batch_size=64,
        inputs=step_inputs(spec),
        outputs=step_outputs(spec),
        parameters=(Parameter(name="scale", dtype="float32", shape=(1,)),),
        parameters_sha256="0" * 64,
        weights=nothing,
        formats={},
        reports=(),
        parity=Parity(
            atol=1e-5, rtol=1e-5, min_greedy_agreement=0.0, batch_sizes=(1,), steps=1, formats={}
        ),
        source=Source(kind="preset", name=name),
        versions={},
    )


class Served(NamedTuple):
    """An engine, and what its HTTP face is made with."""

    engine: Engine
    manifest: Manifest
    settings: Settings
    metrics: Metrics
    keys: Keys

    @classmethod
    def make(cls, manifest: Manifest, loaded: RenewableStep, settings: Settings) -> "Served":
        """As `service.server` does."""
        metrics = Metrics()
        observe = metrics.observe_batch, metrics.observe_change
        keys = Keys(settings.act_keys, settings.admin_keys)
        return cls(Engine(manifest, loaded, settings, *observe), manifest, settings, metrics, keys)


class AppClient:
    """A synchronous client of the application, with no socket between.

    `with AppClient(served) as client:` runs the application's lifespan and waits for its warm-up;
    `is_warm=False` leaves both out.
    """

    def __init__(self, served: Served, *, is_warm: bool = True) -> None:
        self.served = served
        self.engine = served.engine
        self.app = create_app(*served)
        self._is_warm = is_warm
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()

    def __enter__(self) -> Self:
        self.run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.run(self._stack.aclose())
        finally:
            self._runner.close()

    async def _open(self) -> None:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = await self._stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://test")
        )
        if self._is_warm:
            await self._stack.enter_async_context(self.app.router.lifespan_context(self.app))
            assert self.engine.warm_up.done is not None
            await self.engine.warm_up.done

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self._runner.run(asyncio.wait_for(coroutine, TIMEOUT_S))

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.run(self.http.request(method, path, **options))

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def act(self, body: Any) -> httpx.Response:
        """Posts a JSON value, or bytes as they are."""
        return self.run(self.post(body))

    def act_at_once(self, bodies: Sequence[Any]) -> list[httpx.Response]:
        async def all_of_them() -> list[httpx.Response]:
            return await asyncio.gather(*map(self.post, bodies))

        return self.run(all_of_them())

    async def post(self, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.http.post(
            "/act", content=content, headers={"Content-Type": "application/json"}
        )
