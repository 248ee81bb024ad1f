"""A file that is not what its manifest says is refused by `verify` and by the service alike.

Here its maker mended the manifest's hashes, or somebody changed a bit and did not.
"""

import shutil
import subprocess
from pathlib import Path

import onnx
import pytest
from torch import Tensor

from export.artifact import open_artifact
from export.exporter import export_policy
from export.format_kinds import FORMAT_KINDS
from export.formats import FORMATS, StepSource
from export.loaders.load import RUNTIME_OF
from export.manifest import ArtifactError, File, Manifest
from export.packed_step import StepOutput
from export.tamiyo_step import TamiyoStep
from export.verify import verify_artifact
from model.policy import FactoredRecurrentActorCritic
from service.runtime.load import load_runtime
from tests.running_server import ROOT, clean_environment, service_command

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def whole(policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "tiny"
    export_policy(policy, None, output, name="tiny", formats=tuple(FORMATS), max_batch_size=2)
    return output


def alone(whole: Path, directory: Path, format_name: str, content: bytes | None = None) -> Path:
    """A copy with one format, its file of other content if there is some, its hash mended."""
    copied = Path(shutil.copytree(whole, directory / "copied"))
    manifest = Manifest.read(copied)
    file = manifest.formats[format_name]
    path = copied / file.file
    if content is not None:
        path.write_bytes(content)
    mended = file.model_copy(update=File.describe(path).model_dump())
    manifest.model_copy(update={"formats": {format_name: mended}}).write(copied)
    return copied


def serve(artifact: Path, format_name: str) -> None:
    """Loads the format as the service does."""
    manifest = Manifest.read(artifact)
    load_runtime(artifact, manifest, name=RUNTIME_OF[format_name], device="cpu", num_threads=1)


def with_names(content: bytes, kind: str, first: str, second: str) -> bytes:
    """The graph with two of its inputs or outputs, of one shape, each under the other's name.

    Whoever feeds it by position gets what the policy gives.
    """
    model = onnx.load_from_string(content)
    other = {first: second, second: first}
    for array in getattr(model.graph, kind):
        array.name = other.get(array.name, array.name)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [other.get(name, name) for name in names]
    onnx.checker.check_model(model, full_check=True)
    changed: bytes = model.SerializeToString()
    return changed


class WithSwappedArguments(TamiyoStep):
    """Two of its arguments under each other's names."""

    def forward(  # type: ignore[override]
        self,
        observation: Tensor,
        action_mask: Tensor,
        noise: Tensor,
        state_c_in: Tensor,
        state_h_in: Tensor,
    ) -> StepOutput:
        return super().forward(observation, action_mask, noise, state_c_in, state_h_in)


@pytest.mark.parametrize(
    ("kind", "first", "second", "says"),
    [
        ("input", "state_h_in", "state_c_in", "input 3 is 'state_c_in', expected 'state_h_in'"),
        ("output", "state_h_out", "state_c_out", "output 3 is 'state_c_out', expected"),
        ("input", "noise", "noises", "input 2 is 'noises', expected 'noise'"),
    ],
)
def test_onnx_under_other_names_is_refused(
    whole: Path, tmp_path: Path, kind: str, first: str, second: str, says: str
) -> None:
    manifest = Manifest.read(whole)
    content = with_names(manifest.formats["onnx"].read(whole), kind, first, second)
    assert_refused(alone(whole, tmp_path, "onnx", content), "onnx", rf"policy\.onnx: {says}")


def test_onnx_with_one_more_input_is_refused(whole: Path, tmp_path: Path) -> None:
    model = onnx.load_from_string(Manifest.read(whole).formats["onnx"].read(whole))
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, ["batch"])
    )
    artifact = alone(whole, tmp_path, "onnx", model.SerializeToString())
    assert_refused(artifact, "onnx", r"policy\.onnx: input 5 'more' is one too many, expected 5")


@pytest.mark.parametrize("format_name", ["torchscript", "pt2", "aoti"])
def test_torch_s_formats_under_other_names_are_refused(
    whole: Path, tmp_path: Path, policy: FactoredRecurrentActorCritic, format_name: str
) -> None:
    swapped = StepSource(WithSwappedArguments(policy, None), max_batch_size=2)
    artifact = alone(whole, tmp_path, format_name, FORMATS[format_name].write(swapped))
    says = r": input 3 is 'state_c_in', expected 'state_h_in'"
    assert_refused(artifact, format_name, says)


def assert_refused(artifact: Path, format_name: str, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        verify_artifact(open_artifact(artifact))
    with pytest.raises(ArtifactError, match=says):
        serve(artifact, format_name)


def test_the_service_says_so_in_one_line_and_does_not_start(whole: Path, tmp_path: Path) -> None:
    content = Manifest.read(whole).formats["onnx"].read(whole)
    artifact = alone(
        whole, tmp_path, "onnx", with_names(content, "input", "state_h_in", "state_c_in")
    )
    done = subprocess.run(
        service_command("--artifact", str(artifact), "--device", "cpu"),
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "policy.onnx: input 3 is 'state_c_in', expected 'state_h_in'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("format_name", FORMAT_KINDS)
def test_one_changed_bit_is_refused_before_any_loader_touches_the_file(
    whole: Path, tmp_path: Path, format_name: str
) -> None:
    """Where a loader goes first, it says that the file cannot be loaded, or says nothing."""
    artifact = alone(whole, tmp_path, format_name)
    path = artifact / FORMAT_KINDS[format_name].file
    content = path.read_bytes()
    for at in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert_refused(artifact, format_name, r": its SHA-256 is not the one in manifest\.json")


@pytest.mark.parametrize("format_name", FORMAT_KINDS)
def test_verify_loads_what_it_hashed_and_nothing_that_took_its_place(
    whole: Path, tmp_path: Path, format_name: str
) -> None:
    artifact = alone(whole, tmp_path, format_name)
    path = artifact / FORMAT_KINDS[format_name].file

    def replace(stage: str) -> None:
        if stage == "loading the formats":  # all hashes have been checked by then
            path.write_bytes(b"not a policy")

    assert verify_artifact(open_artifact(artifact), on_stage=replace).keys() == {format_name}
    assert path.read_bytes() == b"not a policy"
