"""A replica's parts that need no Ray to run; tests/test_ray_serve.py has the rest."""

import asyncio
from pathlib import Path

import pytest

from export.manifest import ArtifactError
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from service.engine.block import Block
from service.errors import Invalid, ServiceError
from service.settings import Settings
from tests.pushes import Learner
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


def test_a_replica_s_queue_is_the_service_s_own(artifact: Path) -> None:
    application = ray_app.app(Settings(artifact=artifact, max_waiting=77))
    assert application._bound_deployment.max_ongoing_requests == 77


def test_nothing_but_the_artifact_is_read_of_user_config(artifact: Path) -> None:
    replica = ray_app.Replica(Settings(artifact=artifact))
    config = {"artifact": str(artifact), "runtime": "eager"}
    sentence = "`runtime`: Extra inputs are not permitted; `artifact` alone is read of it"
    with pytest.raises(Invalid, match=sentence):
        asyncio.run(replica.reconfigure(config, None))


def test_newer_weights_run_on_what_the_older_ones_ran_on(
    artifact: Path, policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    """And on nothing else where an artifact lacks it, which `auto` alone would choose."""
    Learner(policy).export(tmp_path / "tiny", "onnx")
    replica = ray_app.Replica(Settings(artifact=artifact))
    assert replica._successor(artifact).load().name == "torchscript"
    with pytest.raises(ArtifactError, match="torchscript"):
        replica._successor(tmp_path / "tiny").load()


def test_replicas_share_no_snapshot(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="replicas are many"):
        ray_app.app(Settings(artifact=artifact, snapshot=tmp_path / "sessions"))
