"""A step that is a callable of tensors, as a `LoadedStep`. Importing this module imports torch."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from export.loaders.arrays import FileArray, check_arrays
from export.manifest import Array, ArtifactError
from export.parameters import Parameters

Renewed = Callable[[Mapping[str, Tensor]], Callable[..., Any]]


class Live(NamedTuple):
    """A call, and by name those of its parameters that may be written between two calls."""

    call: Callable[..., Any]
    parameters: Mapping[str, Tensor]


Enlivened = Callable[[Mapping[str, Tensor]], Live]


class LiveStep:
    """A step of tensors that stay on its device, to be captured or run as it is.

    `parameters` are its own, and nobody else's: what is written to them, the next call reads.
    """

    def __init__(self, live: Live, outputs: Sequence[Array]) -> None:
        self.parameters = live.parameters
        self._call = live.call
        self._outputs = outputs

    def __call__(self, given: Sequence[Tensor], num_rows: int) -> Sequence[Tensor]:
        """For each input a tensor of so many rows -> one for each output.

        Raises ArtifactError where the results are not the manifest's.
        """
        results: Sequence[Tensor] = self._call(*given)
        check_results(results, self._outputs, num_rows)
        return results


class TorchStep:
    """`call` takes a tensor on `device` for each of `inputs`, and gives one for each of `outputs`.

    Both in the manifest's order: what a format says of its order was compared with it before.
    `renewed` makes such a call with other parameters, where the runtime can, and `enlivened` one
    whose parameters can be written. `parameters` are those that it was made with instead of its
    file's.
    """

    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        device: str = "cpu",
        *,
        renewed: Renewed | None = None,
        enlivened: Enlivened | None = None,
        parameters: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.device = device
        self._call = call
        self._inputs = inputs
        self._outputs = outputs
        self._renewed = renewed
        self._enlivened = enlivened
        self.parameters = parameters

    def bind(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
    ) -> Callable[[], None]:
        given = [torch.from_numpy(inputs[array.name]) for array in self._inputs]
        wanted = [torch.from_numpy(outputs[array.name]) for array in self._outputs]
        is_checked = False

        def run() -> None:
            nonlocal is_checked
            with torch.inference_mode():
                results = self._call(*(tensor.to(self.device) for tensor in given))
                if not is_checked:  # `copy_` would broadcast, and cast, without a word
                    check_results(results, self._outputs, len(wanted[0]))
                    is_checked = True
                for tensor, result in zip(wanted, results, strict=True):
                    tensor.copy_(result)

        return run

    def with_parameters(self, parameters: Parameters) -> "TorchStep":
        if self._renewed is None:
            raise ArtifactError(
                f"{self.name} takes no new parameters: it would compile its step anew, for a minute"
            )
        tensors = {name: _tensor(array).to(self.device) for name, array in parameters.items()}
        return TorchStep(
            self.name,
            self._renewed(tensors),
            self._inputs,
            self._outputs,
            self.device,
            renewed=self._renewed,
            enlivened=self._enlivened,
            parameters=tensors,
        )

    def enliven(self) -> LiveStep:
        """The same step for whoever has its tensors on the device already."""
        if self._enlivened is None:
            return LiveStep(Live(self._call, {}), self._outputs)
        return LiveStep(self._enlivened(self.parameters), self._outputs)

    def is_like(self, other: "TorchStep") -> bool:
        """Whether both run the same file: only their parameters differ then, if anything."""
        return self._renewed is not None and self._renewed is other._renewed


def check_results(results: Any, outputs: Sequence[Array], num_rows: int) -> None:
    """Raises ArtifactError where a step's results are not the manifest's."""
    if not isinstance(results, (tuple, list)):
        raise ArtifactError(f"the step gives a {type(results).__name__}, not its outputs")
    got = [FileArray(None, dtype_name(result), tuple(result.shape)) for result in results]
    expected = [
        array.model_copy(update={"shape": (num_rows, *array.shape[1:])}) for array in outputs
    ]
    check_arrays("output", got, expected)


def _tensor(parameter: NDArray[Any]) -> Tensor:
    tensor = torch.from_numpy(parameter)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def dtype_name(tensor: Tensor) -> str:
    """As the manifest writes it."""
    return str(tensor.dtype).removeprefix("torch.")
