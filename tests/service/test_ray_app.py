"""A replica's parts that need no Ray to run; tests/test_ray_serve.py has the rest."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from export.manifest import ArtifactError
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from service.engine.block import Block
from service.errors import Draining, Invalid, ServiceError
from service.http.app import create_app
from service.runtime.protocol import DeviceLost
from service.settings import Settings
from tests.pushes import Learner
from tests.service.conftest import MakeClient
from tests.service.fakes import AppClient, SummingRuntime, single

ray_app = pytest.importorskip("service.ray_app", reason="ray is in the extra `ray`")
exceptions = pytest.importorskip("ray.exceptions")


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


def test_one_whose_device_is_lost_never_is_again(
    make_client: MakeClient, runtime: SummingRuntime, block: Block
) -> None:
    client = make_client()
    runtime.failure = DeviceLost("an illegal memory access was encountered")
    for _ in range(2):
        with pytest.raises(Draining, match="shutting down"):
            client.run(ray_app.check_step(client.engine, block))
    runtime.failure = None
    with pytest.raises(Draining):
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


def sent_to(client: AppClient, error: Exception) -> list[Any]:
    """The answer to a request that Ray raises this of, as its `receive` does."""
    sent: list[Any] = []

    async def receive() -> Any:
        raise error

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/act", "headers": headers}
    client.run(create_app(*client.served, kind=ray_app.ReplicaApp)(scope, receive, send))
    return sent


@pytest.mark.parametrize("kind", ["TaskCancelledError", "ActorDiedError"])
def test_a_client_that_goes_while_its_request_is_handed_over_is_no_failure(
    make_client: MakeClient, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client()
    assert sent_to(client, getattr(exceptions, kind)()) == []
    assert 'tamiyo_act_requests_total{result="disconnected"} 1.0' in client.get("/metrics").text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_anything_else_that_ray_raises_is_a_failure_and_told(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    sent = sent_to(make_client(), exceptions.RayError("secret"))
    assert sent[0]["status"] == 500
    assert b"secret" not in sent[1]["body"]
    assert "a request for a step failed" in caplog.text


def test_a_replica_s_app_is_one_behind_ray_and_shows_its_routes(artifact: Path) -> None:
    """By which Ray finds its documentation, and tells its routes apart."""
    app = ray_app.Replica(Settings(artifact=artifact)).__serve_build_asgi_app__()
    assert isinstance(app, ray_app.ReplicaApp)
    assert app.docs_url == "/docs"
    assert "/policy" in {getattr(route, "path", None) for route in app.routes}


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
