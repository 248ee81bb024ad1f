"""A served artifact, and the application over it or over the fake policy."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.exporter import export_policy
from export.manifest import Manifest, Source
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from service.engine import noise_ahead
from service.runtime import cuda_device
from service.settings import Settings
from tamiyo_client.noise import gumbel_noise
from tests.service.fakes import AppClient, Bench, Served, SummingRuntime
from tests.service.gpu_stand_in import GpuStandIn

MakeClient = Callable[..., AppClient]


@pytest.fixture(scope="session")
def artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    torch.set_num_threads(1)  # as the server does; two threads wait for each other's busy core
    directory = tmp_path_factory.mktemp("artifacts") / "tiny"
    source = Source(kind="preset", name="tiny", seed=0)
    export_policy(policy, None, directory, name="tiny", source=source, formats=("torchscript",))
    return directory


@pytest.fixture(scope="session")
def manifest(artifact: Path) -> Manifest:
    return Manifest.read(artifact)


@pytest.fixture
def bench(spec: PolicySpec) -> Bench:
    return Bench(spec)


@pytest.fixture
def runtime(spec: PolicySpec) -> SummingRuntime:
    return SummingRuntime(spec)


@pytest.fixture
def make_client(
    artifact: Path, manifest: Manifest, runtime: SummingRuntime
) -> Iterator[MakeClient]:
    """Makes a client of the application over `runtime`; settings as keyword arguments."""
    with ExitStack() as stack:

        def make(*, is_warm: bool = True, **settings: Any) -> AppClient:
            served = Served.make(manifest, runtime, Settings(artifact=artifact, **settings))
            return stack.enter_context(AppClient(served, is_warm=is_warm))

        yield make


@pytest.fixture
def client(make_client: MakeClient) -> AppClient:
    return make_client()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[GpuStandIn]:
    """Those that were made, each in a GPU's place."""
    made: list[GpuStandIn] = []

    def make(*, tf32: bool) -> GpuStandIn:
        made.append(GpuStandIn(tf32=tf32))
        return made[-1]

    monkeypatch.setattr(cuda_device, "CudaDevice", make)
    return made


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many rows noise was made, each time it was."""
    numbers: list[int] = []

    def counting(
        seeds: NDArray[np.uint64], steps: NDArray[np.uint64], num_columns: int
    ) -> NDArray[np.float32]:
        numbers.append(len(seeds))
        return gumbel_noise(seeds, steps, num_columns)

    monkeypatch.setattr(noise_ahead, "gumbel_noise", counting)
    return numbers
