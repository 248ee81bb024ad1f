"""The two forms of `POST /act`, as a client writes and reads them with public packages alone.

A request is its fields by name, as documented: arrays are NumPy's, `action_mask` is by head, and
`state` has `h` and `c`. safetensors carry vectors only.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

Fields = Mapping[str, Any]
Arrays = dict[str, NDArray[Any]]


class Told(NamedTuple):
    """An answer: outputs by name, `[rows, ...]`, or without rows for a lone environment.

    What was written as JSON is in 64 bits, which hold any float32. `state` is by `h` and `c`.
    """

    step: int
    outputs: Arrays
    state: Arrays | None


class Form(Protocol):
    """One of them."""

    content_type: str

    def request(self, fields: Fields) -> bytes: ...

    def told(self, content: bytes) -> Told: ...


class _Json:
    content_type = "application/json"

    def request(self, fields: Fields) -> bytes:
        return json.dumps(fields, default=lambda array: array.tolist()).encode()

    def told(self, content: bytes) -> Told:
        fields = json.loads(content)
        step, state = fields.pop("step"), fields.pop("state", None)
        for name in ("session_id", "policy_version"):
            fields.pop(name, None)
        by_head = {name: fields.pop(name) for name in ("action", "log_prob")}
        outputs = {name: np.array([*values.values()]).T for name, values in by_head.items()}
        outputs |= {name: np.array(value) for name, value in fields.items()}
        return Told(step, outputs, state and {half: np.array(state[half]) for half in "hc"})


class _Safetensors:
    content_type = "application/vnd.safetensors"

    def request(self, fields: Fields) -> bytes:
        scalars: dict[str, str] = {}
        tensors: Arrays = {}
        for name, value in fields.items():
            if name == "action_mask":
                tensors |= {f"action_mask.{head}": mask for head, mask in value.items()}
            elif name == "state":
                tensors |= {f"state_{half}": array for half, array in value.items()}
            elif name == "episode_start":
                tensors[name] = np.broadcast_to(value, len(fields["observation"]))
            elif isinstance(value, np.ndarray):
                tensors[name] = value
            else:
                scalars[name] = value if isinstance(value, str) else json.dumps(value)
        return save({name: np.ascontiguousarray(t) for name, t in tensors.items()}, scalars)

    def told(self, content: bytes) -> Told:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        state = {half: tensors.pop(f"state_{half}") for half in "hc" if f"state_{half}" in tensors}
        return Told(int(header["__metadata__"]["step"]), tensors, state or None)


JSON: Form = _Json()
SAFETENSORS: Form = _Safetensors()
