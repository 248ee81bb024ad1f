"""Every format's loader compares what its file says of inputs and outputs with the manifest."""

import io
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from export.format_kinds import FORMAT_KINDS
from export.formats import FORMATS, StepSource
from export.loaders.load import FORMAT_OF, RUNTIME_OF, load_step
from export.loaders.protocol import LoadedStep
from export.loaders.torch_warnings import torch_speaks_of_itself
from export.manifest import Array, ArtifactError, Device, FormatFile, step_inputs, step_outputs
from export.tamiyo_step import TamiyoStep
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.loaded_step import allocated, load

NAMES_INPUTS = tuple(FORMAT_OF)
NAMES_OUTPUTS = ("onnx", "aoti")
SAYS_DTYPES = ("onnx", "aoti", "eager", "compile")
FILE = FormatFile(file="policy.x", sha256="0" * 64, bytes=0)

Arrays = tuple[Array, ...]
Change = Callable[[Arrays], Arrays]


@pytest.fixture(scope="module")
def files(policy: FactoredRecurrentActorCritic) -> dict[str, bytes]:
    """Each format's content."""
    source = StepSource(TamiyoStep(policy, None), max_batch_size=8)
    return {name: written.write(source) for name, written in FORMATS.items()}


def load_against(
    content: bytes,
    name: str,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    *,
    device: Device = "cpu",
    file: FormatFile = FILE,
) -> LoadedStep:
    return load_step(
        content,
        name=name,
        file=file,
        inputs=inputs,
        outputs=outputs,
        device=device,
        num_threads=torch.get_num_threads(),
    )


def swapped(first: int, second: int) -> Change:
    """Two arrays of one shape, each under the other's name."""

    def change(arrays: Arrays) -> Arrays:
        order = list(arrays)
        order[first], order[second] = order[second], order[first]
        return tuple(order)

    return change


def with_array(at: int, **fields: object) -> Change:
    def change(arrays: Arrays) -> Arrays:
        return (*arrays[:at], arrays[at].model_copy(update=fields), *arrays[at + 1 :])

    return change


def one_more(arrays: Arrays) -> Arrays:
    return (*arrays, Array(name="more", dtype="float32", shape=("batch",)))


def one_less(arrays: Arrays) -> Arrays:
    return arrays[:-1]


@pytest.mark.parametrize("name", NAMES_INPUTS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swapped(3, 4), r"policy\.x: input 3 is 'state_h_in', expected 'state_c_in'"),
        (with_array(2, name="noises"), r"input 2 is 'noise', expected 'noises'"),
        (one_more, r"input 5 is missing, expected 'more'"),
        (one_less, r"input 4 'state_c_in' is one too many, expected 4"),
    ],
    ids=["swapped", "renamed", "missing", "extra"],
)
def test_inputs_of_other_names_or_number_are_refused(
    name: str, change: Change, says: str, files: dict[str, bytes], spec: PolicySpec
) -> None:
    with pytest.raises(ArtifactError, match=says):
        load_against(files[FORMAT_OF[name]], name, change(step_inputs(spec)), step_outputs(spec))


@pytest.mark.parametrize("name", SAYS_DTYPES)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_array(1, dtype="float32"), r"'action_mask' is bool \[\S+, 38\], expected float32"),
        (with_array(2, dtype="int64"), r"'noise' is float32 \[\S+, 38\], expected int64"),
        (with_array(0, shape=("batch", 7)), r"is float32 \[\S+, 11\], expected float32 \[batch, 7"),
        (with_array(0, shape=(2, 11)), r"'observation' is float32 \[\S+, 11\], .*\[2, 11\]"),
        (with_array(0, shape=("batch", "n")), r"\[\S+, 11\], expected float32 \[batch, n\]"),
        (with_array(3, shape=("batch", 10)), r"'state_h_in' is float32 \[\S+, 1, 10\], expected"),
    ],
    ids=["no bool", "no float", "size", "fixed batch", "free size", "rank"],
)
def test_inputs_of_another_dtype_or_shape_are_refused(
    name: str, change: Change, says: str, files: dict[str, bytes], spec: PolicySpec
) -> None:
    with pytest.raises(ArtifactError, match=says):
        load_against(files[FORMAT_OF[name]], name, change(step_inputs(spec)), step_outputs(spec))


@pytest.mark.parametrize("name", NAMES_OUTPUTS)
def test_outputs_of_other_names_are_refused(
    name: str, files: dict[str, bytes], spec: PolicySpec
) -> None:
    outputs = swapped(3, 4)(step_outputs(spec))
    with pytest.raises(ArtifactError, match=r"output 3 is 'state_h_out', expected 'state_c_out'"):
        load_against(files[FORMAT_OF[name]], name, step_inputs(spec), outputs)


@pytest.mark.parametrize("name", FORMAT_OF)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (one_more, r"output 5 is missing, expected 'more'"),
        (one_less, r"output 4( 'state_c_out')? is one too many, expected 4"),
    ],
    ids=["missing", "extra"],
)
def test_outputs_of_another_number_are_refused(
    name: str, change: Change, says: str, files: dict[str, bytes], spec: PolicySpec
) -> None:
    with pytest.raises(ArtifactError, match=says):
        load_against(files[FORMAT_OF[name]], name, step_inputs(spec), change(step_outputs(spec)))


@pytest.mark.parametrize("name", SAYS_DTYPES)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_array(0, dtype="float32"), r"'action' is int64 \[\S+, 8\], expected float32"),
        (with_array(2, shape=("batch", 1)), r"'value' is float32 \[\S+\], expected .*\[batch, 1\]"),
    ],
    ids=["dtype", "shape"],
)
def test_outputs_of_another_dtype_or_shape_are_refused(
    name: str, change: Change, says: str, files: dict[str, bytes], spec: PolicySpec
) -> None:
    with pytest.raises(ArtifactError, match=says):
        load_against(files[FORMAT_OF[name]], name, step_inputs(spec), change(step_outputs(spec)))


@pytest.mark.parametrize("name", FORMAT_OF)
def test_arrays_are_bound_by_their_names_in_whatever_order_they_come(
    name: str, files: dict[str, bytes], spec: PolicySpec
) -> None:
    step = load(files[FORMAT_OF[name]], name, spec)
    assert (step.name, step.device) == (name, "cpu")
    inputs, outputs = allocated(step_inputs(spec), 3), allocated(step_outputs(spec), 3)
    inputs["action_mask"][:] = True
    inputs["state_c_in"][:] = 0.5
    backwards = allocated(step_outputs(spec), 3)
    step.bind(inputs, outputs)()
    step.bind(dict(reversed(inputs.items())), dict(reversed(backwards.items())))()
    assert outputs["state_c_out"].any()
    for array in outputs:
        assert (outputs[array] == backwards[array]).all(), array


@pytest.mark.parametrize("name", FORMAT_OF)
def test_what_is_no_file_of_the_format_is_refused(name: str, spec: PolicySpec) -> None:
    with pytest.raises(ArtifactError, match=r"policy\.x: cannot be loaded: "):
        load_against(b"not a policy", name, step_inputs(spec), step_outputs(spec))


def test_machine_code_for_another_machine_is_refused(
    files: dict[str, bytes], spec: PolicySpec
) -> None:
    foreign = FILE.model_copy(update={"requires": "vsx"})
    with pytest.raises(ArtifactError, match=r"needs vsx, which this machine has not"):
        load_against(files["aoti"], "aoti", step_inputs(spec), step_outputs(spec), file=foreign)


@pytest.mark.parametrize("name", ["torchscript", "aoti", "eager", "compile"])
def test_a_device_that_torch_does_not_find_is_refused(
    name: str, spec: PolicySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ArtifactError, match=r"policy\.x: the torch .* finds no CUDA device"):
        load_against(b"", name, step_inputs(spec), step_outputs(spec), device="cuda")


def test_every_format_has_a_runtime_that_runs_it() -> None:
    assert RUNTIME_OF.keys() == FORMAT_KINDS.keys()
    assert all(FORMAT_OF[runtime] == name for name, runtime in RUNTIME_OF.items())


class Doubled(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3


def test_a_package_without_names_is_loaded_by_number() -> None:
    """As exports wrote them before they wrote names into it."""
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    content = io.BytesIO()
    with torch_speaks_of_itself(), torch.no_grad():
        program = torch.export.export(Doubled(), (torch.zeros(2, 3),), dynamic_shapes=(batch,))
        torch._inductor.aoti_compile_and_package(program, package_path=content)
    x, twice, thrice = (
        Array(name=name, dtype="float32", shape=("batch", 3)) for name in ("x", "twice", "thrice")
    )
    step = load_against(content.getvalue(), "aoti", (x,), (twice, thrice))
    inputs, outputs = allocated((x,), 4), allocated((twice, thrice), 4)
    inputs["x"][:] = 5
    step.bind(inputs, outputs)()
    assert (outputs["twice"] == 10).all()
    assert (outputs["thrice"] == 15).all()
    with pytest.raises(ArtifactError, match="input 1 is missing, expected 'twice'"):
        load_against(content.getvalue(), "aoti", (x, twice), (thrice,))
    with pytest.raises(ArtifactError, match="output 1 is one too many, expected 1"):
        load_against(content.getvalue(), "aoti", (x,), (twice,))
