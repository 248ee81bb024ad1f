"""Loads torch's formats. Importing this module imports torch.

`torchscript` and `aoti` run their files; `eager` and `compile` run the graph of the `pt2` file, one
operation at a time or through torch.compile, which takes a C++ compiler here. Each loader gives
the step as torch has it, and what its file says of inputs and outputs.
"""

import io
import tempfile
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from export.loaders.arrays import FileArray, check_arrays
from export.loaders.torch_step import Enlivened, Live, Renewed, TorchStep, dtype_name
from export.loaders.torch_warnings import torch_speaks_of_itself
from export.manifest import Array, ArtifactError, Device


class Loaded(NamedTuple):
    """A step of tensors, and the arrays of its file.

    `renewed` makes one with other parameters, `enlivened` one whose parameters can be written.
    """

    call: Callable[..., Any]
    inputs: list[FileArray]
    outputs: list[FileArray]
    renewed: Renewed | None
    enlivened: Enlivened | None


def load_torch_step(
    name: str,
    content: bytes,
    *,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    device: Device,
    num_threads: int,
) -> TorchStep:
    """The runtime `name` on the bytes of its (verified) file.

    `num_threads` is torch's intra-op pool, for the whole process. Raises ArtifactError where the
    file's inputs and outputs are not those given.
    """
    torch.set_num_threads(num_threads)
    loaded = LOADERS[name](content, device)
    check_arrays("input", loaded.inputs, inputs)
    check_arrays("output", loaded.outputs, outputs)
    return TorchStep(
        name,
        loaded.call,
        inputs,
        outputs,
        device,
        renewed=loaded.renewed,
        enlivened=loaded.enlivened,
    )


@torch_speaks_of_itself()
def load_torchscript(content: bytes, device: str) -> Loaded:
    """A trace keeps the names of its arguments, and the number of its results.

    Frozen, it is some hundredths faster, and takes no parameters any more: it is frozen with them.
    Artifacts of the first schema hold one that was frozen before it was written.
    """

    @torch_speaks_of_itself()
    def enlivened(parameters: Mapping[str, Tensor]) -> Live:
        # Torch has no types for it.
        step = torch.jit.load(io.BytesIO(content), map_location=device)  # type: ignore[no-untyped-call]
        own = {**dict(step.named_parameters()), **dict(step.named_buffers())}
        check_names(parameters, own)
        with torch.no_grad():
            for name, parameter in parameters.items():
                own[name].copy_(parameter)
        return Live(step, own)

    @torch_speaks_of_itself()
    def renewed(parameters: Mapping[str, Tensor]) -> Callable[..., Any]:
        step: Any = enlivened(parameters).call
        is_frozen = not hasattr(step, "training")  # in an older artifact's file
        frozen: Callable[..., Any] = step if is_frozen else torch.jit.freeze(step)
        return frozen

    step: Any = renewed({})
    schema = step.forward.schema
    (returned,) = schema.returns
    is_tuple = isinstance(returned.type, torch.TupleType)
    num_outputs = len(returned.type.elements()) if is_tuple else 1
    inputs = [FileArray(argument.name) for argument in schema.arguments[1:]]
    return Loaded(step, inputs, [FileArray()] * num_outputs, renewed, enlivened)


@torch_speaks_of_itself()
def load_aoti(content: bytes, device: str) -> Loaded:
    """A package keeps numbers; names, dtypes and shapes only where the export wrote them in it."""
    # Takes a second to import, and a writable temporary directory, which no other format needs.
    import torch._inductor
    from torch.utils._pytree import treespec_loads

    def opened(parameters: Mapping[str, Tensor], *, is_live: bool) -> Any:
        # The loader unpacks from a path; what it opens is what was hashed, in a directory of ours.
        with tempfile.TemporaryDirectory(prefix="tamiyo-aoti-") as directory:
            package = Path(directory) / "policy.pt2"
            package.write_bytes(content)
            # Threads that take care of one another cannot be captured (pytorch#148601).
            step = torch._inductor.aoti_load_package(str(package), run_single_threaded=is_live)
        if parameters:
            check_names(parameters, step.get_constant_fqns())
            step.load_constants(dict(parameters), check_full_update=False, user_managed=is_live)
        return step

    @torch_speaks_of_itself()
    def renewed(parameters: Mapping[str, Tensor]) -> Callable[..., Any]:
        step: Callable[..., Any] = opened(parameters, is_live=False)
        return step

    @torch_speaks_of_itself()
    def enlivened(parameters: Mapping[str, Tensor]) -> Live:
        # Those in the package cannot be got at: only others can be written.
        own = {name: parameter.clone() for name, parameter in parameters.items()}
        return Live(opened(own, is_live=True), own)

    step: Any = renewed({})
    metadata = step.get_metadata()
    if "inputs" in metadata:
        said = (FileArray.read(metadata["inputs"]), FileArray.read(metadata["outputs"]))
        return Loaded(step, *said, renewed, enlivened)
    taken, given = map(treespec_loads, step.loader.get_call_spec())
    inputs, outputs = [FileArray()] * taken.num_leaves, [FileArray()] * given.num_leaves
    return Loaded(step, inputs, outputs, renewed, enlivened)


@torch_speaks_of_itself()
def load_eager(content: bytes, device: str) -> Loaded:
    program = move_to_device_pass(torch.export.load(io.BytesIO(content)), device)

    def renewed(parameters: Mapping[str, Tensor]) -> Callable[..., Any]:
        step = program.module()
        check_names(parameters, step.state_dict())
        step.load_state_dict(parameters, strict=False, assign=True)
        return step

    def enlivened(parameters: Mapping[str, Tensor]) -> Live:
        named = {**program.module().state_dict(), **parameters}
        own = {name: tensor.clone() for name, tensor in named.items()}
        return Live(renewed(own), own)

    return Loaded(renewed({}), *program_arrays(program), renewed, enlivened)


def load_compiled(content: bytes, device: str) -> Loaded:
    eager = load_eager(content, device)
    return eager._replace(
        call=torch.compile(eager.call, dynamic=True), renewed=None, enlivened=None
    )


def check_names(parameters: Iterable[str], own: Container[str]) -> None:
    """Raises ArtifactError where a file has no such parameter to be replaced."""
    for name in parameters:
        if name not in own:
            raise ArtifactError(
                f"its parameters cannot be replaced: it has none called {name!r} (machine code "
                "with bf16 products for a CPU holds them as its kernels want them)"
            )


def program_arrays(program: ExportedProgram) -> tuple[list[FileArray], list[FileArray]]:
    """A captured graph's inputs, by their names, and its outputs, which have none."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    signature = program.graph_signature
    inputs = [(name, values[name]) for name in signature.user_inputs]
    outputs = [(None, values[name]) for name in signature.user_outputs]
    taken, given = (
        [FileArray(name, dtype_name(value), _shape(value)) for name, value in arrays]
        for arrays in (inputs, outputs)
    )
    return taken, given


def _shape(value: torch.Tensor) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


LOADERS: dict[str, Callable[[bytes, str], Loaded]] = {
    "torchscript": load_torchscript,
    "aoti": load_aoti,
    "eager": load_eager,
    "compile": load_compiled,
}
