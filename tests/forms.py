"""The forms of a step, as a client writes and reads them with public packages alone.

A request is its fields by name, as documented: arrays are NumPy's, `action_mask` is by head, and
`state` has `h` and `c`. Only JSON carries lone environments, the others vectors.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from tests.connection import Answer, Message

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

    def request(self, fields: Fields) -> Message: ...

    def told(self, answer: Answer) -> Told: ...


class _Json:
    def request(self, fields: Fields) -> Message:
        content = json.dumps(fields, default=lambda array: array.tolist()).encode()
        return Message(content, {"Content-Type": "application/json"} | _named(fields))

    def told(self, answer: Answer) -> Told:
        fields = json.loads(answer.content)
        step, state = fields.pop("step"), fields.pop("state", None)
        for name in ("session_id", "policy_version"):
            fields.pop(name, None)
        by_head = {name: fields.pop(name) for name in ("action", "log_prob")}
        outputs = {name: np.array([*values.values()]).T for name, values in by_head.items()}
        outputs |= {name: np.array(value) for name, value in fields.items()}
        return Told(step, outputs, state and {half: np.array(state[half]) for half in "hc"})


class _Safetensors:
    def request(self, fields: Fields) -> Message:
        tensors, scalars = _parted(fields)
        metadata = {n: v if isinstance(v, str) else json.dumps(v) for n, v in scalars.items()}
        headers = {"Content-Type": "application/vnd.safetensors"} | _named(fields)
        return Message(save(tensors, metadata), headers)

    def told(self, answer: Answer) -> Told:
        content = answer.content
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        state = {half: tensors.pop(f"state_{half}") for half in "hc" if f"state_{half}" in tensors}
        return Told(int(header["__metadata__"]["step"]), tensors, state or None)


DATATYPES = {"float32": "FP32", "float64": "FP64", "int64": "INT64", "uint64": "UINT64"}
DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}


class _Inference:
    """The Open Inference Protocol, with tensors in JSON or in binary."""

    def __init__(self, model: str, *, is_binary: bool) -> None:
        self._path = f"/v2/models/{model}/infer"
        self._is_binary = is_binary

    def request(self, fields: Fields) -> Message:
        tensors, scalars = _parted(fields)
        named = _named(fields)
        starts = tensors.pop("episode_start", None)
        if starts is not None and starts.all():
            scalars["sequence_start"] = True
        elif starts is not None:
            tensors["episode_start"] = starts
        if "session_id" in scalars:
            scalars["sequence_id"] = scalars.pop("session_id")
        if "timeout_ms" in scalars:
            scalars["timeout"] = max(1, int(1000 * scalars.pop("timeout_ms")))
        scalars["binary_data_output"] = self._is_binary
        inputs: list[dict[str, Any]] = [
            {"name": n, "shape": t.shape, "datatype": DATATYPES.get(t.dtype.name, "BOOL")}
            for n, t in tensors.items()
        ]
        raw = [tensor.tobytes() for tensor in tensors.values()]
        for of, tensor, content in zip(inputs, tensors.values(), raw, strict=True):
            if self._is_binary:
                of["parameters"] = {"binary_data_size": len(content)}
            else:
                of["data"] = tensor.tolist()
        text = json.dumps({"inputs": inputs, "parameters": scalars}).encode()
        if not self._is_binary:
            return Message(text, {"Content-Type": "application/json"} | named, self._path)
        headers = {"Inference-Header-Content-Length": str(len(text))} | named
        return Message(b"".join((text, *raw)), headers, self._path)

    def told(self, answer: Answer) -> Told:
        length = int(answer.headers.get("inference-header-content-length", len(answer.content)))
        assert (length < len(answer.content)) == self._is_binary
        body, raw, at = json.loads(answer.content[:length]), answer.content[length:], 0
        tensors: Arrays = {}
        for of in body["outputs"]:
            if self._is_binary:
                size = of["parameters"]["binary_data_size"]
                flat = np.frombuffer(raw[at : at + size], DTYPES[of["datatype"]])
                at += size
            else:
                flat = np.array(of["data"], DTYPES[of["datatype"]])
            tensors[of["name"]] = flat.reshape(of["shape"])
        assert at == len(raw)
        state = {half: tensors.pop(f"state_{half}") for half in "hc" if f"state_{half}" in tensors}
        return Told(body["parameters"]["step"], tensors, state or None)


def _named(fields: Fields) -> dict[str, str]:
    """What a balancer reads."""
    return {"X-Session-Id": fields["session_id"]} if "session_id" in fields else {}


def _parted(fields: Fields) -> tuple[Arrays, dict[str, Any]]:
    """What tensors have, and what is said once for all rows."""
    tensors: Arrays = {}
    scalars: dict[str, Any] = {}
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
            scalars[name] = value
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, scalars


def inference(model: str, *, is_binary: bool) -> Form:
    """That of a model of this name."""
    return _Inference(model, is_binary=is_binary)


JSON: Form = _Json()
SAFETENSORS: Form = _Safetensors()
