"""What the service's tests put in place of a model, of time and of a client.

A fake policy whose state is a running sum, so that a step taken twice or lost shows in its value;
a clock that is set by hand; and a synchronous face on the application.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Self, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from model.spec import PolicySpec
from service.engine.batcher import Batcher
from service.engine.engine import Engine, StepAnswer, StepRequest, derived_seed
from service.engine.sessions import SessionTable
from service.errors import ServiceError
from service.http.app import create_app
from service.policy_service import PolicyService

Arrays = Mapping[str, NDArray[Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")

TIMEOUT_S = 20.0
"""No test's event loop runs longer than this."""
POISON = 1e30
"""In an observation's last column: the fake policy's output for that row is not a number."""
SERVER_SEED = 7


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


def submitted(
    batcher: Batcher[Item, Result],
    item: Item,
    *,
    is_wanted: Callable[[], bool] | None = None,
    **options: Any,
) -> "asyncio.Future[Result]":
    """A future of the item's result; cancelling it is not wanting it any more."""
    future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

    def settle(result: Result | ServiceError) -> None:
        assert not future.done() or future.cancelled()
        if future.cancelled():
            return
        if isinstance(result, ServiceError):
            future.set_exception(result)
        else:
            future.set_result(result)

    batcher.submit(item, settle, is_wanted=is_wanted or (lambda: not future.cancelled()), **options)
    return future


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class SummingRuntime:
    """A policy in NumPy: `h` is the sum of `observation[0]` so far, `c` how often it stepped.

    The value is the sum; each head takes its allowed choice with the most noise and gives that
    noise as its log-prob. Every row depends on that row alone.

    `failure` is raised where it is set; `gate` must be set before a call returns; `spoil` may
    write to the outputs.
    """

    name = "summing"
    device = "cpu"

    def __init__(self, spec: PolicySpec) -> None:
        self.spec = spec
        self.batch_sizes: list[int] = []
        self.failure: Exception | None = None
        self.gate: threading.Event | None = None
        self.spoil: Callable[[Arrays], None] = lambda decided: None

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

    def _step(self, inputs: Arrays, outputs: Arrays) -> None:
        observation = inputs["observation"]
        h, c = outputs["state_h_out"], outputs["state_c_out"]
        h[:] = inputs["state_h_in"] + observation[:, :1, None]
        c[:] = inputs["state_c_in"] + np.float32(1)
        is_poison = observation[:, -1] == np.float32(POISON)
        outputs["value"][:] = np.where(is_poison, np.nan, h[:, 0, 0])
        masked = np.where(inputs["action_mask"], inputs["noise"], -np.inf)
        heads = np.split(masked, np.cumsum(self.spec.head_sizes)[:-1], axis=1)
        outputs["action"][:] = np.stack([head.argmax(1) for head in heads], axis=1)
        outputs["log_prob"][:] = np.stack([head.max(1) for head in heads], axis=1)


def step_request(
    spec: PolicySpec,
    x: float = 1.0,
    session_id: str | None = None,
    *,
    is_poison: bool = False,
    forbid: Sequence[int] = (),
    **fields: Any,
) -> StepRequest:
    """A request that adds `x` to the fake policy's sum; columns in `forbid` are not allowed."""
    observation = np.zeros(spec.observation_dim, dtype=np.float32)
    observation[0] = x
    if is_poison:
        observation[-1] = POISON
    action_mask = np.ones(spec.num_choices, dtype=np.bool_)
    action_mask[list(forbid)] = False
    return StepRequest(observation, action_mask, session_id=session_id, **fields)


class Bench:
    """An engine and its sessions over the fake policy, without HTTP or batcher."""

    def __init__(
        self,
        spec: PolicySpec,
        *,
        capacity: int = 8,
        idle_timeout_s: float = 60.0,
        buckets: Sequence[int] = (1, 2, 4, 8),
    ) -> None:
        self.spec = spec
        self.clock = FakeClock()
        self.runtime = SummingRuntime(spec)
        self.sessions = SessionTable(
            spec,
            capacity=capacity,
            idle_timeout_s=idle_timeout_s,
            default_seed=lambda *identity: derived_seed(SERVER_SEED, *identity),
            clock=self.clock,
        )
        self.engine = Engine(self.runtime, self.sessions, spec, buckets=buckets, seed=SERVER_SEED)

    def request(self, x: float = 1.0, session_id: str | None = "a", **fields: Any) -> StepRequest:
        return step_request(self.spec, x, session_id, **fields)

    def step(self, x: float = 1.0, session_id: str | None = "a", **fields: Any) -> StepAnswer:
        """One request by itself; its error is raised."""
        (answer,) = self.engine.step([self.request(x, session_id, **fields)])
        if isinstance(answer, ServiceError):
            raise answer
        return answer

    def start(self, x: float = 1.0, session_id: str = "a", **fields: Any) -> StepAnswer:
        return self.step(x, session_id, episode_start=True, **fields)


class AppClient:
    """A synchronous client of the application, with no socket between.

    `with AppClient(service) as client:` runs the application's lifespan and waits for its warm-up;
    `is_warm=False` leaves both out.
    """

    def __init__(self, service: PolicyService, *, is_warm: bool = True) -> None:
        self.service = service
        self.app = create_app(service)
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
            assert self.service.warming is not None
            await self.service.warming

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self._runner.run(asyncio.wait_for(coroutine, TIMEOUT_S))

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.run(self.http.request(method, path, **options))

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def act(self, body: Any) -> httpx.Response:
        """Posts a JSON value, or bytes as they are."""
        return self.run(self._act(body))

    def act_at_once(self, bodies: Sequence[Any]) -> list[httpx.Response]:
        async def all_of_them() -> list[httpx.Response]:
            return await asyncio.gather(*map(self._act, bodies))

        return self.run(all_of_them())

    async def _act(self, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.http.post(
            "/act", content=content, headers={"Content-Type": "application/json"}
        )
