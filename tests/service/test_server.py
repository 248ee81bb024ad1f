"""The server's own part of an end."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette

from export.manifest import Manifest
from model.spec import PolicySpec
from service.engine import stepper
from service.engine.engine import Engine
from service.server import _Server
from service.settings import Settings
from tests.service.fakes import TIMEOUT_S, FakeClock, SummingRuntime, run, single


def test_the_time_that_connections_take_to_end_is_the_engine_s_too(
    artifact: Path, manifest: Manifest, spec: PolicySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have taken all of it, so the step that is under way is not waited for."""
    for name in ("SHORT_STEP_S", "LONG_STEP_S"):
        monkeypatch.setattr(stepper, name, 0.0)  # and so it runs beside the loop
    clock, loaded, has_stopped = FakeClock(), SummingRuntime(spec), False
    settings = Settings(artifact=artifact, drain_s=10 * int(TIMEOUT_S))

    async def scenario() -> None:
        engine = Engine(manifest, loaded, settings, clock=clock)

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            nonlocal has_stopped
            engine.start()
            yield
            clock.now_s += settings.drain_s
            await asyncio.wait_for(engine.stop(), TIMEOUT_S / 2)
            has_stopped = True

        config = uvicorn.Config(Starlette(lifespan=lifespan), log_config=None)
        config.load()
        server = _Server(config, engine, spec.observation_dim)
        server.servers = []
        server.lifespan = config.lifespan_class(config)
        await server.lifespan.startup()
        assert engine.warm_up.done is not None
        await engine.warm_up.done
        gate = loaded.gate = threading.Event()
        engine.submit(single(spec, 1.0), print, is_wanted=lambda: True)
        while engine.runtime.is_idle():
            await asyncio.sleep(0)
        await server.shutdown()
        gate.set()

    run(scenario())
    assert has_stopped
