"""The formats by name: what can be asked for, without what it takes to write them. Torch-free."""

from typing import NamedTuple

from export.manifest import Precision


class FormatKind(NamedTuple):
    """`is_native` says that the file holds machine code, for the kind of machine that wrote it;
    `precisions` what the format's runtime has products for."""

    file: str
    is_native: bool = False
    precisions: tuple[Precision, ...] = ("fp32", "bf16")


FORMAT_KINDS = {
    "torchscript": FormatKind("policy.ts"),
    "pt2": FormatKind("policy.pt2"),
    "aoti": FormatKind("policy.aoti.pt2", is_native=True),
    "onnx": FormatKind("policy.onnx", precisions=("fp32",)),
}

PORTABLE_FORMATS = tuple(name for name, kind in FORMAT_KINDS.items() if not kind.is_native)
