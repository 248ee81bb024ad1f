"""Pushes as a learner sends them, to be changed before they are sent."""

from pathlib import Path
from typing import NamedTuple, Self

import httpx
from safetensors.torch import load, save
from torch import Tensor

from export.exporter import export_policy
from export.manifest import Manifest, Precision
from export.parameters import sha256
from export.push import copied, push_body
from export.weights import pack, pack_weights
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic

SAFETENSORS = "application/vnd.safetensors"
TIMEOUT_S = 240.0


class Learner(NamedTuple):
    """A policy and its statistics, as they are at some time of its training."""

    policy: FactoredRecurrentActorCritic
    normalizer: ObservationNormalizer | None = None

    def version(self, precision: Precision = "fp32") -> str:
        weights = pack_weights(*self)
        return f"sha256:{sha256(pack(weights, self.policy.spec, precision))}"

    def push(self, precision: Precision = "fp32") -> "Tensors":
        body = push_body(copied(*self), self.policy.spec, precision)
        return Tensors(load(body))

    def export(
        self,
        output: Path,
        *formats: str,
        precision: Precision = "fp32",
        max_batch_size: int = 16,
    ) -> Manifest:
        """An artifact of its own."""
        return export_policy(
            *self,
            output,
            name=output.name,
            formats=formats,
            precision=precision,
            max_batch_size=max_batch_size,
        )


class Tensors(dict[str, Tensor]):
    """A push's parameters and probe by name."""

    def changed(self, **changes: Tensor | None) -> Self:
        """A copy with other tensors; `__` stands for a dot, None takes one away."""
        named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
        merged = {name: tensor.clone() for name, tensor in self.items()} | named
        return type(self)({name: t for name, t in merged.items() if t is not None})

    def with_number(self, name: str, where: tuple[int, ...], number: float) -> Self:
        other = self[name].clone()
        other[where] = number
        return type(self)(self | {name: other})

    def parameters(self) -> Self:
        return type(self)({n: t for n, t in self.items() if not n.startswith("probe.")})

    def probe(self) -> Self:
        return type(self)({n: t for n, t in self.items() if n.startswith("probe.")})

    def of_rows(self, rows: slice, steps: slice) -> Self:
        """With some of its probe's rows and steps only."""
        return type(self)(
            {
                name: tensor
                if not name.startswith("probe.")
                else tensor[rows]
                if name.startswith("probe.state") and name.endswith("_in")
                else tensor[steps, rows]
                for name, tensor in self.items()
            }
        )

    def written(self) -> bytes:
        return save({name: tensor.contiguous() for name, tensor in self.items()})


def put(url: str, body: bytes, query: str = "", **headers: str) -> httpx.Response:
    """Sends a push; headers by their names with `_` for `-`."""
    of = {name.replace("_", "-"): value for name, value in headers.items()}
    headers = {"Content-Type": SAFETENSORS} | of
    return httpx.put(
        f"{url}/policy/weights{query}", content=body, headers=headers, timeout=TIMEOUT_S
    )
