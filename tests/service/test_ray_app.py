"""A replica's parts that need no Ray to run; tests/test_ray_serve.py has the rest."""

from pathlib import Path

import pytest

from model.spec import PolicySpec
from service.engine.block import Block
from service.errors import ServiceError
from service.settings import Settings
from tests.service.conftest import MakeClient
from tests.service.fakes import SummingRuntime, single

ray_app = pytest.importorskip("service.ray_app", reason="ray is in the extra `ray`")


@pytest.fixture
def block(spec: PolicySpec) -> Block:
    return single(spec)


def test_a_replica_whose_steps_fail_is_not_healthy(
    make_client: MakeClient, runtime: SummingRuntime, block: Block
) -> None:
    client = make_client()
    client.run(ray_app.check_step(client.engine, block))
    runtime.failure = RuntimeError("the device is gone")
    with pytest.raises(ServiceError):
        client.run(ray_app.check_step(client.engine, block))
    runtime.failure = None
    client.run(ray_app.check_step(client.engine, block))


def test_one_that_takes_no_step_for_its_load_is(
    make_client: MakeClient, runtime: SummingRuntime, spec: PolicySpec, block: Block
) -> None:
    client = make_client(max_waiting=1)
    runtime.failure = RuntimeError("nobody steps")

    async def busy() -> None:
        client.engine.submit(single(spec), lambda answer: None, is_wanted=lambda: True)
        await ray_app.check_step(client.engine, block)

    client.run(busy())


def test_replicas_share_no_snapshot(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="replicas are many"):
        ray_app.app(Settings(artifact=artifact, snapshot=tmp_path / "sessions"))
