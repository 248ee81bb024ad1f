"""`config.pbtxt`: what Triton is told of the step. No protobuf is needed to write it.

Which policy each version is, is not in here: `export.triton.repository` knows the versions.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from export.manifest import Array, Device, Manifest, bucket_sizes
from export.triton.graph import START, carried

SEQUENCE_IDLE_US = 600_000_000
"""As long as the service keeps a session by default. Triton's own default is one second."""
QUEUE_TIMEOUT_US, MAX_QUEUED = 50_000, 1024
TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "bool": "TYPE_BOOL"}


def stateless_config(manifest: Manifest, name: str, device: Device) -> str:
    """Of the model whose client brings the state, and is given the next one."""
    return _rendered(
        manifest,
        name,
        device,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        warmup_sizes=bucket_sizes(manifest.max_batch_size),
        timeout_us=QUEUE_TIMEOUT_US,
        max_queued=MAX_QUEUED,
        states=[],
    )


def sequence_config(manifest: Manifest, name: str, device: Device, *, max_sequences: int) -> str:
    """Of the model whose state Triton keeps, for as many sequences at once.

    It has no warm-up: such a request belongs to no sequence, so that Triton has no state to give
    it, and would not load the model.
    """
    shapes = {array.name: _kind(array) for array in manifest.inputs}
    states = carried(manifest.spec)
    return _rendered(
        manifest,
        name,
        device,
        inputs=[array for array in manifest.inputs if array.name not in states],
        outputs=[array for array in manifest.outputs if array.name not in states.values()],
        warmup_sizes=[],
        idle_us=SEQUENCE_IDLE_US,
        max_sequences=max_sequences,
        start=START,
        states=[(name, output, shapes[name]) for name, output in states.items()],
    )


def _rendered(manifest: Manifest, name: str, device: Device, **batching: Any) -> str:
    return _template().render(
        name=name, device=device, max_batch_size=manifest.max_batch_size, **batching
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"tensor": _tensor, "kind": _kind}
    return environment.get_template("config.pbtxt.jinja")


def _tensor(array: Array) -> str:
    """An input or output. Triton has no tensor without dims beside the batch: a client sees 1."""
    reshape = "" if array.shape[1:] else " reshape { shape: [ ] }"
    return f'name: "{array.name}" {_kind(array)}{reshape}'


def _kind(array: Array) -> str:
    return f"data_type: {TYPES[array.dtype]} dims: [ {_listed(array.shape[1:] or (1,))} ]"


def _listed(sizes: Sequence[int | str]) -> str:
    return ", ".join(map(str, sizes))
