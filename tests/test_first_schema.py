"""An artifact of the first schema, which names no parameters: it serves on, and takes no others."""

import io
from pathlib import Path

import httpx
import pytest
import torch

from export.loaders.torch_warnings import torch_speaks_of_itself
from export.manifest import FormatFile, Manifest
from export.tamiyo_step import TamiyoStep
from model.spec import PolicySpec
from tests.export.gate_cases import statistics
from tests.pushes import TIMEOUT_S, Learner, put
from tests.random_inputs import random_policy
from tests.running_server import running_server


def frozen(learner: Learner) -> bytes:
    """TorchScript as earlier releases wrote it: frozen before it was saved."""
    step, content = TamiyoStep(*learner).eval(), io.BytesIO()
    with torch.no_grad(), torch_speaks_of_itself():
        traced = torch.jit.trace(step, step.example(batch_size=2))  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.freeze(traced), content)
    return content.getvalue()


def of_first_schema(learner: Learner, directory: Path) -> Manifest:
    """What an earlier release exported, as far as a server can tell."""
    manifest = learner.export(directory, "onnx", "torchscript")
    traced = manifest.formats["torchscript"]
    (directory / traced.file).write_bytes(frozen(learner))
    first = Manifest.model_validate(
        manifest.model_dump()
        | {
            "schema_version": 1,
            "parameters": (),
            "parameters_sha256": None,
            "formats": manifest.formats
            | {"torchscript": FormatFile.describe(directory / traced.file)},
        }
    )
    first.write(directory)
    return first


@pytest.mark.parametrize("runtime", ["onnx", "torchscript"])
def test_it_serves_and_a_push_is_told_what_is_missing(
    runtime: str, spec: PolicySpec, tmp_path: Path
) -> None:
    learner = Learner(random_policy(spec, 0), statistics(spec.observation_dim))
    manifest = of_first_schema(learner, tmp_path / "first")
    push = Learner(random_policy(spec, 1), learner.normalizer).push().written()
    observation = [0.1 * number for number in range(spec.observation_dim)]
    with running_server(tmp_path / "first", "--runtime", runtime) as server:
        act = {"observation": observation, "deterministic": True}
        before = httpx.post(f"{server.address}/act", json=act, timeout=TIMEOUT_S).json()
        assert before["policy_version"] == manifest.weights.version
        answer = put(server.address, push)
        assert answer.status_code == 422
        assert "it was exported before it could name its parameters; export it again" in answer.text
        policy = httpx.get(f"{server.address}/policy", timeout=TIMEOUT_S).json()
        assert policy["parameters"] == []
        assert httpx.post(f"{server.address}/act", json=act, timeout=TIMEOUT_S).json() == before
        assert server.stop() == 0
    with torch.no_grad():
        assert learner.normalizer is not None
        value = learner.policy(learner.normalizer(torch.tensor([[observation]]))).value
    assert before["value"] == pytest.approx(float(value), abs=2e-5)
