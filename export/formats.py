"""The file formats of an exported step: how each is written. `export.loaders` loads them back.

A new format is one row in `export.format_kinds`, one here, and a loader.
"""

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch._inductor
from numpy.typing import NDArray
from torch._inductor.exc import InductorError
from torch.export import Dim, ExportedProgram

from export.format_kinds import FORMAT_KINDS
from export.loaders.arrays import write as arrays_as_text
from export.loaders.load import first_line
from export.loaders.torch_formats import program_arrays
from export.loaders.torch_warnings import torch_speaks_of_itself
from export.manifest import Precision, step_inputs, step_outputs
from export.packed_step import PackedStep


class FormatError(ValueError):
    """A format cannot be had as it was asked for; the message says why."""


class StepSource:
    """The step as the formats take it: a module, an example, and one captured graph for all.

    The example has two rows: with one, tracers take the batch for a constant. The step is written
    as it evaluates, never as it trains.
    """

    def __init__(self, step: PackedStep, max_batch_size: int) -> None:
        self.step = step.eval()
        self.example = step.example(batch_size=2)
        self._max_batch_size = max_batch_size

    @cached_property
    def program(self) -> ExportedProgram:
        return self.capture(self.step)

    def capture(self, step: PackedStep) -> ExportedProgram:
        """The graph of `step`, which is this one or has other parameters."""
        batch = Dim("batch", min=1, max=self._max_batch_size)
        with torch_speaks_of_itself(), torch.no_grad():
            return torch.export.export(
                step, self.example, dynamic_shapes=tuple({0: batch} for _ in self.example)
            )


class Format(NamedTuple):
    """A format's kind, and the step's way to the file's bytes.

    `write` leaves nothing on disk: who writes the bytes there hears of a full disk from Python.
    """

    file: str
    is_native: bool
    precisions: tuple[Precision, ...]
    write: Callable[[StepSource], bytes]


def write_torchscript(source: StepSource) -> bytes:
    """A traced TorchScript module. It is frozen where it is loaded: frozen, it has no parameters
    that others could take the place of."""
    content = io.BytesIO()
    with torch_speaks_of_itself(), torch.no_grad():
        # Torch has no types for it.
        traced = torch.jit.trace(source.step, source.example)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, content)
    return content.getvalue()


def write_pt2(source: StepSource) -> bytes:
    """torch.export's own archive: the captured graph, to run, compile or lower elsewhere."""
    content = io.BytesIO()
    with torch_speaks_of_itself():
        torch.export.save(source.program, content)
    return content.getvalue()


def write_aoti(source: StepSource) -> bytes:
    """AOTInductor's package: what torch.compile makes, ahead of time; needs a C++ compiler.

    Freezing stores the weights as oneDNN's kernels want them: bf16 products need that on each call
    otherwise. In float32 MKL takes weights as they are, and oneDNN's calls cost more at small
    batches (docs/performance.md). The package's metadata has the graph's inputs and outputs, which
    it keeps no names of.
    """
    content = io.BytesIO()
    is_cpu = source.example[0].device.type == "cpu"
    freezing = is_cpu and source.step.product_dtype == torch.bfloat16
    program = source.program
    inputs, outputs = program_arrays(program)
    named = [
        array._replace(name=of_manifest.name)
        for array, of_manifest in zip(outputs, step_outputs(source.step.spec), strict=True)
    ]
    metadata = {"inputs": arrays_as_text(inputs), "outputs": arrays_as_text(named)}
    try:
        with torch_speaks_of_itself(), torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=content,
                inductor_configs={
                    "freezing": freezing,
                    "always_keep_tensor_constants": True,  # small ones are inlined otherwise
                    "aot_inductor.metadata": metadata,
                },
            )
    except InductorError as error:  # no compiler, or no room for what it writes
        raise FormatError(f"aoti cannot be compiled here: {first_line(error)}") from error
    return content.getvalue()


def write_onnx(source: StepSource) -> bytes:
    """ONNX, optimised, with the manifest's names; checked by `onnx.checker`.

    Of a step with parameters like no others, whose places the policy's then take: the optimiser
    drops a bias of zeros, merges what is equal and multiplies by no one, and a graph without these
    could not be given other parameters.
    """
    spec = source.step.spec
    with torch_speaks_of_itself():
        program = torch.onnx.export(
            source.capture(_with_unlike_parameters(source.step)),
            (),
            dynamo=True,
            optimize=True,
            verbose=False,
            input_names=[array.name for array in step_inputs(spec)],
            output_names=[array.name for array in step_outputs(spec)],
        )
    assert program is not None
    model = program.model_proto
    _set_initializers(model, source.step.packed())
    content: bytes = model.SerializeToString()
    check_onnx(content)
    return content


def _with_unlike_parameters(step: PackedStep) -> PackedStep:
    """A copy, of whose parameters no two numbers are alike, nor 0 or 1."""
    other = copy.deepcopy(step)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.state_dict().values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return other


def _set_initializers(model: Any, parameters: Mapping[str, NDArray[Any]]) -> None:
    """Puts the parameters in their places. Raises FormatError where one has none in the graph."""
    import onnx

    places = {initializer.name: initializer for initializer in model.graph.initializer}
    for name, parameter in parameters.items():
        if name not in places:
            raise FormatError(f"onnx cannot be had: its graph has no parameter {name!r}")
        places[name].CopyFrom(onnx.numpy_helper.from_array(parameter, name))


def check_onnx(content: bytes) -> None:
    """Raises FormatError where the model is not what the ONNX standard says: another runtime than
    the one that loads it here might refuse it, or read it otherwise.
    """
    import onnx

    try:
        onnx.checker.check_model(content, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise FormatError(f"onnx was written against its standard: {first_line(error)}") from error


def check_formats(names: Sequence[str], precision: Precision, device: torch.device) -> None:
    """Raises FormatError where one of the formats cannot be had, with this precision, here."""
    if not names:
        raise FormatError("at least one format is needed")
    for name in names:
        if name not in FORMATS:
            raise FormatError(f"unknown format {name!r}; the formats are {', '.join(FORMATS)}")
        if precision not in FORMATS[name].precisions:
            having = (name for name, written in FORMATS.items() if precision in written.precisions)
            raise FormatError(
                f"{name} has no {precision}: onnxruntime brings no such products for a CPU; "
                f"{', '.join(having)} have it"
            )
    if precision == "bf16" and not _has_bf16(device):
        raise FormatError(f"this machine's {device.type} has no bf16 products; export fp32")


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_WRITE: dict[str, Callable[[StepSource], bytes]] = {
    "torchscript": write_torchscript,
    "pt2": write_pt2,
    "aoti": write_aoti,
    "onnx": write_onnx,
}

FORMATS = {name: Format(*kind, _WRITE[name]) for name, kind in FORMAT_KINDS.items()}
