"""Another artifact's weights in the place of those that serve, or why not."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from numpy.typing import NDArray

from export.loaders.protocol import LoadedStep, RenewableStep
from export.manifest import ArtifactError, Manifest
from export.parameters import Parameters
from model.spec import PolicySpec
from service.engine import stepper
from service.engine.policy_versions import Change, Successor
from service.errors import Draining, Invalid
from service.runtime.load import load_runtime
from service.runtime.protocol import DeviceLost
from service.settings import Settings
from tests.pushes import Learner
from tests.random_inputs import random_policy
from tests.service.fakes import TIMEOUT_S, AppClient, Served
from tests.specs import TINY_V1

MAX_BATCH_SIZE = 16


def exported(directory: Path, spec: PolicySpec = TINY_V1, *, seed: int = 0) -> Manifest:
    learner = Learner(random_policy(spec, seed))
    return learner.export(directory, "onnx", max_batch_size=MAX_BATCH_SIZE)


def successor(directory: Path) -> Successor:
    manifest = Manifest.read(directory)
    load = partial(load_runtime, directory, manifest, name="onnx", device="cpu", num_threads=1)
    return Successor(manifest, load)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two exports of one policy."""
    directory = tmp_path_factory.mktemp("successors")
    for seed in range(2):
        exported(directory / f"version-{seed}", seed=seed)
    return directory / "version-0", directory / "version-1"


@pytest.fixture
def client(artifacts: tuple[Path, Path]) -> Iterator[AppClient]:
    manifest, load = successor(artifacts[0])
    with AppClient(Served.make(manifest, load(), Settings(artifact=artifacts[0]))) as client:
        yield client


def succeed(client: AppClient, directory: Path) -> Change:
    return client.run(client.engine.versions.succeed(lambda: successor(directory), by="somebody"))


def test_its_weights_serve_until_those_before_do_again(
    client: AppClient, artifacts: tuple[Path, Path]
) -> None:
    first, second = (Manifest.read(directory).policy_version for directory in artifacts)
    body = {"observation": [0.5] * TINY_V1.observation_dim, "seed": 3}
    before = client.act(body).json()
    assert succeed(client, artifacts[1]) == Change(second, first, None)
    after = client.act(body).json()
    assert (before["policy_version"], after["policy_version"]) == (first, second)
    assert after["value"] != before["value"]
    versions = client.engine.versions
    client.run(versions.rollback(if_match=None, restarts_sessions=False, by="somebody"))
    assert client.act(body).json() == before


def test_the_weights_that_serve_are_not_loaded_again(
    client: AppClient, artifacts: tuple[Path, Path]
) -> None:
    def load() -> None:
        raise AssertionError

    manifest = Manifest.read(artifacts[0])
    versions = client.engine.versions
    client.run(versions.succeed(lambda: Successor(manifest, load), by="somebody"))  # type: ignore[arg-type]
    assert [version.policy_version for version in versions.listed] == [manifest.policy_version]


OTHERS = {
    "observations": (
        PolicySpec.tamiyo_v1(
            num_slots=2, observation_dim=13, feature_dim=12, hidden_dim=10, num_layers=1
        ),
        "its observation_dim is 13, and that of the policy that serves 11",
    ),
    "a network": (
        PolicySpec.tamiyo_v1(
            num_slots=2, observation_dim=11, feature_dim=12, hidden_dim=14, num_layers=1
        ),
        "its hidden_dim is 14, and that of the policy that serves 10",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_one_of_another_policy_is_refused_with_what_differs(
    client: AppClient, tmp_path: Path, what: str
) -> None:
    spec, sentence = OTHERS[what]
    exported(tmp_path / "other", spec)
    serves = client.engine.versions.current
    with pytest.raises(Invalid, match=sentence):
        succeed(client, tmp_path / "other")
    assert client.engine.versions.current is serves


def test_one_that_was_checked_with_smaller_batches_is_refused(
    client: AppClient, tmp_path: Path
) -> None:
    Learner(random_policy(TINY_V1, 1)).export(tmp_path / "other", "onnx", max_batch_size=8)
    with pytest.raises(Invalid, match=r"checked with batches up to 8, and .* up to 16"):
        succeed(client, tmp_path / "other")


def test_one_that_is_damaged_or_not_there_is_refused(client: AppClient, tmp_path: Path) -> None:
    exported(tmp_path / "other", seed=2)
    file = tmp_path / "other" / "policy.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(Invalid, match=r"policy\.onnx") as refused:
        succeed(client, tmp_path / "other")
    assert isinstance(refused.value.__cause__, ArtifactError)
    with pytest.raises(Invalid, match="nowhere"):
        succeed(client, tmp_path / "nowhere")
    metrics = client.get("/metrics").text
    assert 'tamiyo_weights_changes_total{result="invalid"} 2.0' in metrics


class Gated:
    """The loaded step, which waits in every call from when it is told to until it is let go."""

    def __init__(self, loaded: RenewableStep) -> None:
        self.name, self.device = loaded.name, loaded.device
        self.loaded = loaded
        self.begun, self.may_go_on = Event(), Event()
        self.may_go_on.set()

    def with_parameters(self, parameters: Parameters) -> RenewableStep:
        return self.loaded.with_parameters(parameters)

    def bind(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
    ) -> Callable[[], None]:
        step = self.loaded.bind(inputs, outputs)

        def run() -> None:
            self.begun.set()
            assert self.may_go_on.wait(TIMEOUT_S)
            step()

        return run


def test_a_device_that_fails_to_take_weights_goes_on_with_those_it_has(
    artifacts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change waits for a batch that is under way: its client gets an answer, and the next."""

    def fails() -> None:
        raise MemoryError

    monkeypatch.setattr(stepper, "SHORT_STEP_S", 0.0)  # every step is one beside the loop
    monkeypatch.setattr(stepper, "LONG_STEP_S", 0.0)
    manifest, load = successor(artifacts[0])
    gated = Gated(load())
    body = {"observation": [0.5] * TINY_V1.observation_dim, "seed": 3}

    async def change_behind_a_batch(client: AppClient) -> httpx.Response:
        gated.may_go_on.clear()
        gated.begun.clear()
        acting = asyncio.ensure_future(client.http.post("/act", json=body))
        await asyncio.get_running_loop().run_in_executor(None, gated.begun.wait, TIMEOUT_S)
        changing = asyncio.ensure_future(
            client.engine.versions.succeed(lambda: successor(artifacts[1]), by="somebody")
        )
        while client.engine.batcher._change is None:
            await asyncio.sleep(0)
        gated.may_go_on.set()
        with pytest.raises(MemoryError):
            await changing
        return await acting

    with AppClient(Served.make(manifest, gated, Settings(artifact=artifacts[0]))) as client:
        before = client.act(body).json()
        with monkeypatch.context() as patch:
            patch.setattr(client.engine.runtime, "prepare", lambda loaded: fails)
            assert client.run(change_behind_a_batch(client)).json() == before
        assert client.act(body).json() == before
        assert succeed(client, artifacts[1]).previous_version == before["policy_version"]


@pytest.mark.parametrize("when", ["prepared", "adopted"])
def test_a_device_that_is_lost_to_new_weights_is_lost_to_all(
    when: str,
    client: AppClient,
    artifacts: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise DeviceLost("an illegal memory access was encountered")

    def prepare(loaded: LoadedStep) -> Callable[[], None]:
        if when == "prepared":
            fail()
        return fail

    batcher = client.engine.batcher
    between, is_lost_by_then = batcher.between, list[bool]()

    def noted(change: Callable[[], None]) -> None:
        between(change)
        is_lost_by_then.append(batcher.device_lost.is_set())

    monkeypatch.setattr(batcher, "between", noted)
    monkeypatch.setattr(client.engine.runtime, "prepare", prepare)
    with pytest.raises(Draining, match="lost its device"):
        succeed(client, artifacts[1])
    assert batcher.device_lost.is_set()
    assert is_lost_by_then == ([True] if when == "adopted" else []), "no batch comes between"
    assert "an illegal memory access was encountered" in caplog.text
    assert client.get("/readyz").status_code == 503
    changes = 'tamiyo_weights_changes_total{result="draining"} 1.0'
    assert changes in client.get("/metrics").text


def test_a_server_that_stops_is_not_ready(client: AppClient) -> None:
    assert client.get("/readyz").status_code == 200
    client.engine.stops()
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["error_type"]) == (503, "draining")


def test_a_device_that_is_lost_to_a_snapshot_is_lost_to_all(
    artifacts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while nobody acts."""
    manifest, load = successor(artifacts[0])
    settings = Settings(
        artifact=artifacts[0], snapshot=tmp_path / "sessions", snapshot_every_s=0.01
    )

    def read(rows: object) -> None:
        raise DeviceLost("an illegal memory access was encountered")

    with AppClient(Served.make(manifest, load(), settings)) as client:
        body = {"observation": [0.5] * TINY_V1.observation_dim}
        assert client.act(body | {"session_id": "a", "episode_start": True}).status_code == 200
        monkeypatch.setattr(client.engine.runtime, "read", read)
        lost = client.engine.batcher.device_lost.wait()
        client.run(asyncio.wait_for(lost, TIMEOUT_S))
        assert client.get("/readyz").status_code == 503
