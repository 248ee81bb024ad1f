"""From settings to a server that runs, and to its end."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp

from export.artifact import Artifact, open_artifact
from export.loaders.protocol import RenewableStep
from export.manifest import ArtifactError, Manifest
from service.artifact import find_artifact
from service.engine.engine import Engine
from service.engine.snapshot_file import SnapshotError
from service.http.app import create_app
from service.http.connections import Connections
from service.http.descriptors import raise_descriptor_limit
from service.http.key_file import KeyFileError
from service.http.keys import Keys, is_loopback
from service.metrics import Metrics
from service.runtime.auto import choose_runtime
from service.runtime.device import choose_device
from service.runtime.load import load_runtime
from service.settings import Settings

logger = logging.getLogger("service")

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

ACCEPTS_A_TURN = 16
"""libuv accepts one connection for each listening descriptor and turn of its loop, and a turn may
hold a whole batch: with one descriptor, the last of 256 new clients would wait for 256 batches."""

SWITCH_INTERVAL_S = 0.0002
"""How long a step that is done may have to wait for the loop to let its thread say so."""


class _Server(uvicorn.Server):
    """Uvicorn, one line with a working request once `/act` is open, and an end with the device."""

    def __init__(self, config: uvicorn.Config, engine: Engine, observation_dim: int) -> None:
        super().__init__(config)
        self._engine = engine
        self._observation_dim = observation_dim
        self.has_failed = False

    def stop(self, *_: object) -> None:
        """Asks for the end, as a signal's handler."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            reached_at = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
            self._watching = asyncio.create_task(self._watch(reached_at, port))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.stops()  # it is one patience, uvicorn's with connections and the engine's
        await super().shutdown(sockets)

    async def _watch(self, host: str, port: int) -> None:
        assert self._engine.warm_up.done is not None
        try:
            await asyncio.shield(self._engine.warm_up.done)
        except Exception as error:
            logger.exception("the policy failed while warming up")
            self._engine.batcher.refusal(error)
            self.has_failed = self.should_exit = True
            return
        _settle_garbage()
        repeats = self._observation_dim - 1
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        sys.stdout.write(
            f"ready: curl -s http://{address}/act -H 'Content-Type: application/json' "
            f"""-d "{{\\"session_id\\":\\"env-0\\",\\"episode_start\\":true,"""
            f"""\\"observation\\":[$(printf '0.1,%.0s' $(seq {repeats}))0.1]}}"\n"""
        )
        sys.stdout.flush()
        await self._engine.batcher.device_lost.wait()
        logger.error("the device is lost to this process, which ends: another one may have it")
        self.has_failed = self.should_exit = True


def main(asked_to_stop: Sequence[int] = ()) -> int:
    """Serves until it is asked to stop; the exit code. In the main thread.

    `asked_to_stop` has the signals that came since the process began, which a handler of the
    caller's is to raise SystemExit for; one raised while Python runs a destructor is lost.
    """
    settings = _settings()
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=LOG_FORMAT,
        stream=sys.stdout,
    )
    try:
        keys = Keys(settings.act_keys, settings.admin_keys)
        signal.signal(signal.SIGHUP, lambda *_: keys.reload())
        artifact = open_policy(settings)
        runtime = load_policy(artifact, settings)
    except (ArtifactError, KeyFileError) as error:
        _fail(str(error))
    _warn_if_open(settings)
    return serve(settings, artifact.manifest, runtime, keys, asked_to_stop)


def open_policy(settings: Settings) -> Artifact:
    """The artifact to serve, its manifest read once. ArtifactError where it is not to be."""
    directory = find_artifact(settings.artifact)
    if settings.trusted is None:
        return open_artifact(directory)
    from export.signature import load_public_key

    return open_artifact(directory, trusted=load_public_key(settings.trusted))


def load_policy(artifact: Artifact, settings: Settings) -> RenewableStep:
    """Its step, on what runs it here. Raises ArtifactError."""
    manifest = artifact.manifest
    device = choose_device(settings.device, manifest, settings.runtime)
    name: str = settings.runtime
    if name == "auto":
        name = choose_runtime(
            artifact,
            device=device,
            num_threads=settings.num_threads,
            batch_sizes=settings.batch_sizes(manifest.max_batch_size),
            tf32=settings.tf32,
        )
    return load_runtime(
        artifact.directory, manifest, name=name, device=device, num_threads=settings.num_threads
    )


def serve(
    settings: Settings,
    manifest: Manifest,
    runtime: RenewableStep,
    keys: Keys,
    asked_to_stop: Sequence[int] = (),
) -> int:
    """What `main` does once there is a runtime."""
    metrics = Metrics()
    engine = _engine(manifest, runtime, settings, metrics)
    logger.info(
        "%s %s, %s on %s, batches up to %d",
        manifest.name,
        manifest.policy_version[:19],
        runtime.name,
        runtime.device,
        engine.max_batch_size,
    )
    app = create_app(engine, manifest, settings, metrics, keys)
    connections = Connections(app.act, metrics, settings, limit=raise_descriptor_limit())
    config = uvicorn.Config(
        app,
        http=connections.accept,  # type: ignore[arg-type]  # it is called, and no more is asked
        ws="none",
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        proxy_headers=False,  # nothing here depends on who a client says it is
        server_header=False,
        timeout_graceful_shutdown=settings.drain_s,
    )
    server = _Server(config, engine, manifest.spec.observation_dim)
    for number in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn has handlers of its own while it runs, and raises a signal again once it has
        # drained. Before that, these tell it to end as soon as it has begun; afterwards, nothing.
        signal.signal(number, server.stop)
    server.should_exit = bool(asked_to_stop)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        listener = config.bind_socket()
        server.run(sockets=[listener, *(listener.dup() for _ in range(ACCEPTS_A_TURN - 1))])
    except SystemExit:
        _fail(f"cannot listen on {settings.host}:{settings.port}")
    snapshots = engine.snapshots
    if snapshots is not None and not snapshots.has_ended:
        logger.error("%s: made to end at once, no last snapshot was written", snapshots.path)
    is_unsaved = snapshots is not None and (snapshots.has_failed or not snapshots.has_ended)
    exit_code = 1 if server.has_failed or is_unsaved else 0
    is_lost = engine.batcher.device_lost.is_set()
    if is_lost or engine.is_stepping():  # the interpreter's end would wait for it, or crash
        logging.shutdown()
        sys.stdout.flush()
        os._exit(exit_code)
    return exit_code


def _engine(
    manifest: Manifest, runtime: RenewableStep, settings: Settings, metrics: Metrics
) -> Engine:
    """The engine, with the sessions of `--snapshot`."""
    for option, value in (
        ("--snapshot-every-s", settings.snapshot_every_s),
        ("--snapshot-required", settings.snapshot_required),
    ):
        if value and settings.snapshot is None:
            _fail(f"{option} needs --snapshot, which says where")
    try:
        engine = Engine(manifest, runtime, settings, metrics.observe_batch, metrics.observe_change)
    except SnapshotError as error:
        _fail(str(error))
    except MemoryError as error:
        _fail(f"--max-sessions {settings.max_sessions} is more than fits here: {error}")
    if engine.snapshots is not None:
        metrics.watch_snapshots(engine.snapshots)
        try:
            engine.snapshots.restore()
        except SnapshotError as error:
            if settings.snapshot_required:
                _fail(f"{error}; put another there, or leave --snapshot-required out to lose it")
            aside = engine.snapshots.refused_path
            logger.warning(
                "%s; no session goes on, and the next one moves this to %s", error, aside
            )
        except Exception:  # of a device, say, which may have room for its weights another time
            logger.exception("%s: left as it is, nothing can go on from it now", settings.snapshot)
            raise SystemExit(1) from None
    return engine


def _warn_if_open(settings: Settings) -> None:
    """Says what is open to whom where the service can be reached from elsewhere."""
    is_reachable = settings.host != "localhost" and not is_loopback(settings.host)
    if is_reachable and settings.act_keys is None:
        admin = "are closed to them" if settings.admin_keys is None else "take an admin key"
        logger.warning(
            "whoever reaches %s may act, as there are no --act-keys; the routes that change the "
            "policy %s",
            settings.host,
            admin,
        )


def _settle_garbage() -> None:
    """What start-up made stays for good, and full collections, which stop every client, are rare.

    Requests leave no cycles behind; what they make is freed as they end.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _settings() -> Settings:
    try:
        return CliApp.run(Settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + "-".join(map(str, first["loc"])).replace("_", "-")
        if first["type"] == "missing":
            _fail(f"{option} is required; see python -m service --help")
        _fail(f"{option}: {first['msg']}, not {first['input']!r}")


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"service: {message}\n")
    raise SystemExit(2)
