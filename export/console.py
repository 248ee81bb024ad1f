"""What a command says: lines and a table on stdout, and one last line on stderr. Torch-free."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from export.artifact import Artifact
from export.manifest import FormatParity, Manifest
from export.report import Report

SHOWN = (1, 32, 256)
"""The batch sizes whose speed the table shows."""


@contextmanager
def printing() -> Iterator[None]:
    """What cannot be printed is no fault of what was read or written."""
    try:
        yield
    except OSError as error:
        fail(f"stdout: cannot be written ({error.strerror})")


def say(line: str) -> None:
    with printing():
        sys.stdout.write(line + "\n")


def name_unlisted(artifact: Artifact) -> None:
    """A note on stderr of what lies beside the artifact's files, where something does."""
    names = [name if name.isprintable() else repr(name) for name in artifact.unlisted()]
    if names:
        sys.stderr.write(f"export: not part of the artifact: {', '.join(names)}\n")


def fail(message: str, code: int = 2) -> NoReturn:
    sys.stderr.write(f"export: {' '.join(message.split())}\n")
    raise SystemExit(code)


def summarize(
    manifest: Manifest,
    parity: Mapping[str, FormatParity],
    report: Report | None = None,
    *,
    judge: str = "eager",
) -> None:
    table = Table("format", "file", "size", "error", "equal", box=None, pad_edge=False)
    sizes = [] if report is None else [size for size in SHOWN if size <= manifest.max_batch_size]
    for size in sizes:
        table.add_column(f"B={size}")
    for name in parity:
        file = manifest.formats[name]
        speedup = {} if report is None else report.speedup(name)
        table.add_row(
            name,
            file.file,
            f"{file.bytes / 1e6:.2f} MB",
            f"{max(parity[name].max_error.values()):.1e}",
            f"{parity[name].action_agreement:.2%}",
            *(f"{speedup[size]:.1f}x" for size in sizes),
        )
    with printing():
        Console(soft_wrap=True, highlight=False).print(table)
    legend = f"error: largest of any output; equal: share of free actions that are {judge}'s"
    say(legend + ("; B: times as fast as eager at that batch size" if sizes else ""))
