"""The service as a Ray Serve deployment: `serve run service.ray_app:app artifact=DIR`.

A replica has an engine and sessions of its own, and our batcher; Ray's proxies listen, and
`service.ray_router` has each session come to its replica. `user_config` names the artifact whose
weights serve: every replica changes over to another one's while it acts, and one that starts later
begins with them.
"""

import asyncio
import logging
import time
from pathlib import Path

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve
from ray.exceptions import ActorDiedError, TaskCancelledError
from starlette.types import Message, Receive, Scope, Send

from service.engine.block import Answer, Block
from service.engine.engine import Engine
from service.engine.policy_versions import Successor
from service.errors import Forbidden, Invalid, ServiceError
from service.http.app import App, create_app
from service.http.inputs import InputReader
from service.http.keys import Keys
from service.metrics import Metrics
from service.server import LOG_FORMAT, load_policy, open_policy
from service.settings import Settings

logger = logging.getLogger("service")

ROUTER = "service.ray_router.SessionRouter"
DEPARTURES = (TaskCancelledError, ActorDiedError)
"""Whatever else Ray raises while a request is read is a failure, told and logged as any."""


class UserConfig(BaseModel):
    """What may change while replicas serve: whose weights, an artifact of the same policy."""

    model_config = ConfigDict(extra="forbid")

    artifact: Path


class ReplicaKeys(Keys):
    """Nobody changes the weights of one replica: others would go on with those they have."""

    async def may_administer(self, request: Request) -> str:
        raise Forbidden(
            "the weights of all replicas are those of the artifact in the deployment's "
            "user_config: name another one there, and `serve deploy` it"
        )


class ReplicaApp(App):
    """One whose requests come from Ray's proxies.

    Of a client that goes while its request is handed over, or with its proxy, Ray raises an error
    of its own where ASGI has a message.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def received() -> Message:
            try:
                return await receive()
            except DEPARTURES:
                return {"type": "http.disconnect"}

        await super().__call__(scope, received, send)


class Replica:
    """One replica, on Ray's loop for what is not Ray's own."""

    def __init__(self, settings: Settings) -> None:
        logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT)
        self._settings = settings
        self._is_serving = False
        self._one_at_a_time = asyncio.Lock()
        self._changing: set[asyncio.Task[None]] = set()
        metrics = Metrics()
        artifact = open_policy(settings)
        manifest, runtime = artifact.manifest, load_policy(artifact, settings)
        self._engine = Engine(
            manifest, runtime, settings, metrics.observe_batch, metrics.observe_change
        )
        keys = ReplicaKeys(settings.act_keys, settings.admin_keys)
        self._app = create_app(self._engine, manifest, settings, metrics, keys, kind=ReplicaApp)
        nothing = np.zeros((1, manifest.spec.observation_dim), np.float32)
        self._health = InputReader(manifest.spec).read(nothing, None, is_vector=False)

    def __serve_build_asgi_app__(self) -> App:
        return self._app

    def record_replica_metadata(self) -> dict[str, object]:
        """For `service.ray_router`, from Ray's own: which place this replica was given."""
        return {"place": serve.get_replica_context().rank.rank, "since_s": time.time()}

    async def reconfigure(self, user_config: object, rank: object) -> None:
        """Has the weights serve of the artifact that `user_config` names, or without one its own.

        A replica that starts does so first, and raises what is wrong with them. One that serves
        begins to, and where they are not to be had the log says why: were it to raise, Ray would
        end it, and with it its sessions. Ray calls this where `user_config` was taken away because
        of `rank`, which nothing else is done with.
        """
        if not self._is_serving:
            await self._change(user_config)
            return
        change = asyncio.create_task(self._try_to_change(user_config))
        self._changing.add(change)
        change.add_done_callback(self._changing.discard)

    async def check_health(self) -> None:
        """Raises where warm-up or, by now, a step failed; Ray then starts another replica."""
        await self._warm()
        await check_step(self._engine, Block(self._health))
        self._is_serving = True

    async def _warm(self) -> None:
        assert self._engine.warm_up.done is not None
        await asyncio.shield(self._engine.warm_up.done)

    async def _try_to_change(self, user_config: object) -> None:
        try:
            await self._change(user_config)
        except ServiceError as error:
            logger.error("user_config: %s; the weights stay what they are", error)
        except Exception:
            logger.exception("user_config: the weights stay what they are")

    async def _change(self, user_config: object) -> None:
        try:
            given = {"artifact": self._settings.artifact} if user_config is None else user_config
            config = UserConfig.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "user_config"
            raise Invalid(f"`{where}`: {first['msg']}; `artifact` alone is read of it") from error
        await self._warm()
        async with self._one_at_a_time:
            await self._engine.versions.succeed(
                lambda: self._successor(config.artifact), by=f"user_config, {config.artifact}"
            )

    def _successor(self, path: Path) -> Successor:
        another = {"artifact": path, "runtime": self._engine.runtime.name}
        settings = self._settings.model_copy(update=another)
        artifact = open_policy(settings)
        return Successor(artifact.manifest, lambda: load_policy(artifact, settings))


async def check_step(engine: Engine, block: Block) -> None:
    """Raises the error of a step that failed. One that was not taken for the load says nothing,
    unless none will be taken any more.
    """
    is_lost = engine.batcher.device_lost.is_set
    stepped: asyncio.Future[Answer | ServiceError] = asyncio.get_running_loop().create_future()

    def settle(answer: Answer | ServiceError) -> None:
        if not stepped.done():
            stepped.set_result(answer)

    try:
        engine.submit(block, settle, is_wanted=lambda: not stepped.done())
    except ServiceError:
        if is_lost():
            raise
        return
    answer = await stepped
    if isinstance(answer, ServiceError) and (
        is_lost() or answer.status_code == ServiceError.status_code
    ):
        raise answer


def app(settings: Settings) -> serve.Application:
    """What `serve run` and `serve deploy` call with an application's `args`. Raises ValueError."""
    if settings.snapshot is not None:
        raise ValueError("--snapshot is one process's file, and replicas are many")
    deployment = serve.deployment(
        name="Policy",
        # Ours is the queue, which knows sessions and deadlines, and says 429.
        max_ongoing_requests=settings.max_waiting,
        logging_config={"enable_access_log": False},
        request_router_config={"request_router_class": ROUTER},
    )
    return deployment(serve.ingress()(Replica)).bind(settings)
