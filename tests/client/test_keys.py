"""The client where the server takes keys."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from model.spec import PolicySpec
from tamiyo_client import NotAllowed, VectorPolicyClient
from tests.running_server import RunningServer, running_server

KEY = "the-learner-has-this-one"
TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def keyed(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    file = tmp_path_factory.mktemp("keys") / "act.keys"
    file.write_text(f"{KEY} learner\n")
    with running_server(artifact, "--act-keys", str(file)) as server:
        yield server
        assert KEY not in server.log()


def num_rows(server: RunningServer) -> str:
    metrics = httpx.get(f"{server.address}/metrics", timeout=TIMEOUT_S).text
    (line,) = [line for line in metrics.splitlines() if line.startswith("tamiyo_sessions ")]
    return line.partition(" ")[2]


def test_a_client_with_the_key_acts_and_ends_its_session(
    keyed: RunningServer, spec: PolicySpec
) -> None:
    observations = np.zeros((3, spec.observation_dim), np.float32)
    with VectorPolicyClient(keyed.address, 3, api_key=KEY) as client:
        assert client.act(observations).step == 0
        assert num_rows(keyed) == "3.0"
    assert num_rows(keyed) == "0.0"


@pytest.mark.parametrize("api_key", [None, "another"])
def test_a_client_without_it_is_told_so_at_once(
    keyed: RunningServer, spec: PolicySpec, api_key: str | None
) -> None:
    observations = np.zeros((3, spec.observation_dim), np.float32)
    with VectorPolicyClient(keyed.address, 3, api_key=api_key, retries=20) as client:
        with pytest.raises(NotAllowed, match="key") as refusal:
            client.act(observations)
        assert (refusal.value.status, refusal.value.error_type) == (401, "unauthorized")
        assert KEY not in str(refusal.value)
        assert client.policy()["limits"], "which is open"
    metrics = httpx.get(f"{keyed.address}/metrics", timeout=TIMEOUT_S).text
    assert 'tamiyo_act_requests_total{result="unauthorized"}' in metrics
