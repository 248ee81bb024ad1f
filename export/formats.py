"""The file formats of an exported step: how each is written, and how it is loaded back.

A new format is one row in `export.format_kinds`, and here a pair of functions with its name.
"""

import io
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.export import Dim, ExportedProgram

from export.format_kinds import FORMAT_KINDS
from export.manifest import ArtifactError, FormatFile, Precision, step_inputs, step_outputs
from export.step import PolicyStep, StepInput, StepOutput

LoadedStep = Callable[..., StepOutput]


class FormatError(ValueError):
    """A format cannot be had as it was asked for; the message says why."""


class StepSource:
    """The step as the formats take it: a module, an example, and one captured graph for all.

    The example has two rows: with one, tracers take the batch for a constant.
    """

    def __init__(self, step: PolicyStep, max_batch_size: int) -> None:
        self.step = step
        self.example = step.example(batch_size=2)
        self._max_batch_size = max_batch_size

    @cached_property
    def program(self) -> ExportedProgram:
        batch = Dim("batch", min=1, max=self._max_batch_size)
        with _torch_speaks_of_itself(), torch.no_grad():
            return torch.export.export(
                self.step, self.example, dynamic_shapes=tuple({0: batch} for _ in self.example)
            )


class Format(NamedTuple):
    """A format's kind, and its two ways: the step to the file's bytes, and these to a callable.

    `write` leaves nothing on disk: who writes the bytes there hears of a full disk from Python.
    """

    file: str
    is_native: bool
    precisions: tuple[Precision, ...]
    write: Callable[[StepSource], bytes]
    load: Callable[[bytes, torch.device], LoadedStep]


def write_torchscript(source: StepSource) -> bytes:
    """A traced and frozen TorchScript module."""
    content = io.BytesIO()
    with _torch_speaks_of_itself(), torch.no_grad():
        traced = torch.jit.trace(source.step, source.example)  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.freeze(traced), content)
    return content.getvalue()


def load_torchscript(content: bytes, device: torch.device) -> LoadedStep:
    with _torch_speaks_of_itself():
        loaded: LoadedStep = torch.jit.load(io.BytesIO(content), map_location=device)  # type: ignore[no-untyped-call]
    return loaded


def write_pt2(source: StepSource) -> bytes:
    """torch.export's own archive: the captured graph, to run, compile or lower elsewhere."""
    content = io.BytesIO()
    with _torch_speaks_of_itself():
        torch.export.save(source.program, content)
    return content.getvalue()


def load_pt2(content: bytes, device: torch.device) -> LoadedStep:
    with _torch_speaks_of_itself():
        loaded: LoadedStep = torch.export.load(io.BytesIO(content)).module()
    return loaded


def write_aoti(source: StepSource) -> bytes:
    """AOTInductor's package: what torch.compile makes, ahead of time; needs a C++ compiler.

    Freezing stores the weights as oneDNN's kernels want them: bf16 products need that on each call
    otherwise. In float32 MKL takes weights as they are, and oneDNN's calls cost more at small
    batches (docs/performance.md).
    """
    content = io.BytesIO()
    is_cpu = source.example[0].device.type == "cpu"
    freezing = is_cpu and source.step.product_dtype == torch.bfloat16
    program = source.program
    try:
        with _torch_speaks_of_itself(), torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                program, package_path=content, inductor_configs={"freezing": freezing}
            )
    except InductorError as error:  # no compiler, or no room for what it writes
        raise FormatError(f"aoti cannot be compiled here: {first_line(error)}") from error
    return content.getvalue()


def load_aoti(content: bytes, device: torch.device) -> LoadedStep:
    # The loader unpacks from a path; what it opens is what was hashed, in a directory of our own.
    with tempfile.TemporaryDirectory(prefix="tamiyo-aoti-") as directory:
        package = Path(directory) / "policy.pt2"
        package.write_bytes(content)
        loaded: LoadedStep = torch._inductor.aoti_load_package(str(package))
    return loaded


def write_onnx(source: StepSource) -> bytes:
    """ONNX, optimised, with the manifest's names; checked by `onnx.checker`."""
    import onnx

    spec = source.step.spec
    with _torch_speaks_of_itself():
        program = torch.onnx.export(
            source.program,
            (),
            dynamo=True,
            optimize=True,
            verbose=False,
            input_names=[array.name for array in step_inputs(spec)],
            output_names=[array.name for array in step_outputs(spec)],
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    onnx.checker.check_model(content, full_check=True)
    return content


def load_onnx(content: bytes, device: torch.device) -> LoadedStep:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it has no say in a user's network
    import onnxruntime

    # TF32, which the CUDA provider has on by default, keeps 10 bits of a float32's 23.
    cuda = ("CUDAExecutionProvider", {"use_tf32": 0})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider" if device.type == "cpu" else cuda]
    )
    return OnnxStep(session, device)


class OnnxStep:
    """An onnxruntime session as a `LoadedStep`, with NumPy arrays between."""

    def __init__(self, session: Any, device: torch.device) -> None:
        self.session = session
        self.device = device
        self.names = [array.name for array in session.get_inputs()]

    def feed(self, inputs: StepInput) -> dict[str, Any]:
        return {name: array.cpu().numpy() for name, array in zip(self.names, inputs, strict=True)}

    def __call__(self, *inputs: Tensor) -> StepOutput:
        arrays = self.session.run(None, self.feed(inputs))
        return tuple(torch.from_numpy(array).to(self.device) for array in arrays)


def native_call(step: LoadedStep, inputs: StepInput) -> Callable[[], object]:
    """The call alone, its inputs already what the format's runtime takes: for timing."""
    if isinstance(step, OnnxStep):
        return partial(step.session.run, None, step.feed(inputs))
    return partial(step, *inputs)


def load_format(
    format_name: str, file: FormatFile, directory: Path, device: torch.device
) -> LoadedStep:
    """The step of a format's file, after its hash and its machine were checked.

    Raises ArtifactError where the file is not the manifest's, is for another kind of machine, or
    cannot be loaded.
    """
    missing = file.missing_on(machine_requirement(device))
    if missing:
        raise ArtifactError(
            f"{directory / file.file}: holds machine code that needs {', '.join(missing)}, which "
            "this machine has not; export it here, or use another format"
        )
    content = file.read(directory)
    try:
        return FORMATS[format_name].load(content, device)
    except Exception as error:  # whatever the format's own loader raises
        raise ArtifactError(
            f"{directory / file.file}: cannot be loaded: {first_line(error)}"
        ) from error


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


def machine_requirement(device: torch.device) -> str:
    """What machine code made here may need: all the CPU has, or the GPU's compute capability."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    names = (name for name, has in torch.cpu.get_capabilities().items() if has is True)
    return " ".join([platform.machine(), *sorted(names)])


def first_line(error: Exception) -> str:
    """What a foreign library says first of its failure."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _torch_speaks_of_itself() -> Iterator[None]:
    """Silences what torch 2.13 says of its own insides: TorchScript is deprecated (here it is asked
    for, and inductor's imports use it), so is a class its exporters use, and torchvision is absent.
    """
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning
            )
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        registration.setLevel(level)


_WRITE_AND_LOAD: dict[str, tuple[Callable[[StepSource], bytes], Any]] = {
    "torchscript": (write_torchscript, load_torchscript),
    "pt2": (write_pt2, load_pt2),
    "aoti": (write_aoti, load_aoti),
    "onnx": (write_onnx, load_onnx),
}

FORMATS = {name: Format(*kind, *_WRITE_AND_LOAD[name]) for name, kind in FORMAT_KINDS.items()}
