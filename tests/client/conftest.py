"""A served artifact of a tiny policy, for clients of all kinds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from export.exporter import export_policy
from model.policy import FactoredRecurrentActorCritic
from tests.running_server import RunningServer, running_server


@pytest.fixture(scope="package")
def artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("client") / "tiny"
    export_policy(policy, None, output, name="tiny", formats=("onnx",), max_batch_size=64)
    return output


@pytest.fixture(scope="package")
def server(artifact: Path) -> Iterator[RunningServer]:
    with running_server(artifact) as server:
        yield server
        assert "Traceback" not in server.log()
