"""ONNX runs where it was asked to, or not at all."""

import onnxruntime
import pytest

from export.formats import FORMATS, StepSource
from export.loaders.onnx import OnnxStep
from export.manifest import ArtifactError, Device, step_inputs, step_outputs
from export.tamiyo_step import TamiyoStep
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.loaded_step import allocated


@pytest.fixture(scope="module")
def content(policy: FactoredRecurrentActorCritic) -> bytes:
    return FORMATS["onnx"].write(StepSource(TamiyoStep(policy, None), max_batch_size=8))


def load(content: bytes, spec: PolicySpec, device: Device) -> OnnxStep:
    inputs, outputs = step_inputs(spec), step_outputs(spec)
    return OnnxStep(content, inputs=inputs, outputs=outputs, device=device, num_threads=1)


def test_cuda_is_refused_where_onnxruntime_has_none(
    content: bytes, spec: PolicySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ArtifactError, match="installed here has no CUDAExecutionProvider"):
        load(content, spec, "cuda")


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_cuda_never_falls_back_on_the_cpu(
    content: bytes, spec: PolicySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider may be there and find no device: onnxruntime then takes the CPU, and says so in
    its log alone. Here one is said to be there that is not.
    """
    said = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: said)
    with pytest.raises(ArtifactError, match="finds no device for its CUDAExecutionProvider"):
        load(content, spec, "cuda")


def test_arrays_with_gaps_are_not_bound(content: bytes, spec: PolicySpec) -> None:
    """The binding is of addresses: it would read what lies in the gaps."""
    inputs, outputs = allocated(step_inputs(spec), 2), allocated(step_outputs(spec), 2)
    inputs["noise"] = allocated(step_inputs(spec), 4)["noise"][::2]
    with pytest.raises(AssertionError, match="noise"):
        load(content, spec, "cpu").bind(inputs, outputs)
