"""`POST /act` in safetensors: a vector of environments, as arrays, and scalars as metadata."""

import re
from collections.abc import Mapping
from math import isfinite

from model.step_spec import StepSpec
from service.engine.block import Answer, Block
from service.errors import Malformed, short
from service.http.codec import SAFETENSORS, Request
from service.http.safetensors_file import (
    LARGEST_HEADER_BYTES,
    LENGTH_BYTES,
    read_file,
    write_file,
)
from service.http.tensors import Scalars, TensorReader, check_identifier

SCALARS = ("session_id", "run", "step", "seed", "deterministic", "timeout_ms")
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
BOOLEANS = {"true": True, "false": False}


class SafetensorsCodec:
    """Reads and writes safetensors bodies for one policy. What is read are views of the body."""

    content_type = SAFETENSORS

    def __init__(self, spec: StepSpec, *, max_rows: int) -> None:
        self._reader = TensorReader(spec, max_rows=max_rows)
        self._heads = ",".join(spec.head_names)
        self.max_body_bytes = LENGTH_BYTES + LARGEST_HEADER_BYTES + self._reader.largest_bytes

    def parse(self, body: bytes | bytearray) -> Request:
        tensors, metadata = read_file(body, self._reader.dtypes)
        given = _Metadata(metadata)
        scalars = Scalars(
            session_id=given.identifier("session_id"),
            run=given.identifier("run"),
            step=given.integer("step"),
            seed=given.integer("seed"),
            deterministic=given.boolean("deterministic"),
        )
        return Request(self._reader.block(tensors, scalars), given.timeout_ms())

    def write(self, block: Block, answer: Answer) -> bytes:
        metadata = {
            "step": str(answer.step),
            "policy_version": answer.policy_version,
            "heads": self._heads,
        }
        if block.session_id is not None:
            metadata["session_id"] = block.session_id
        return write_file(answer.tensors(self._reader.states), metadata)


class _Metadata:
    """The file's metadata: strings, of which each is to be one kind of value."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        for name in metadata:
            if name not in SCALARS:
                raise Malformed(f"`{short(name)}` is not a field of the request's metadata")
        self._metadata = metadata

    def identifier(self, name: str) -> str | None:
        value = self._metadata.get(name)
        return None if value is None else check_identifier(name, value)

    def integer(self, name: str) -> int | None:
        value = self._metadata.get(name)
        if value is None:
            return None
        if not (value.isascii() and value.isdigit() and len(value) <= 20 and int(value) < 2**64):
            raise Malformed(f"`{name}` is not an integer from 0 to 2**64 - 1")
        return int(value)

    def boolean(self, name: str) -> bool:
        value = BOOLEANS.get(self._metadata.get(name, "false"))
        if value is None:
            raise Malformed(f"`{name}` is neither 'true' nor 'false'")
        return value

    def timeout_ms(self) -> float | None:
        value = self._metadata.get("timeout_ms")
        if value is None:
            return None
        timeout_ms = float(value) if NUMBER.fullmatch(value) else 0.0
        if not (isfinite(timeout_ms) and timeout_ms > 0):
            raise Malformed("`timeout_ms` is not a number above 0")
        return timeout_ms
