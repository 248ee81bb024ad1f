"""A step that is a callable of tensors, as a `LoadedStep`. Importing this module imports torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from export.loaders.arrays import FileArray, check_arrays
from export.manifest import Array, ArtifactError
from export.parameters import Parameters

Renewed = Callable[[Mapping[str, Tensor]], Callable[..., Any]]


class TorchStep:
    """`call` takes a tensor on `device` for each of `inputs`, and gives one for each of `outputs`.

    Both in the manifest's order: what a format says of its order was compared with it before.
    `renewed` makes such a call with other parameters, where the runtime can.
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
    ) -> None:
        self.name = name
        self.device = device
        self._call = call
        self._inputs = inputs
        self._outputs = outputs
        self._renewed = renewed

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
                    self._check(results, wanted)
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
        call = self._renewed(tensors)
        return TorchStep(
            self.name, call, self._inputs, self._outputs, self.device, renewed=self._renewed
        )

    def _check(self, results: Any, wanted: Sequence[Tensor]) -> None:
        if not isinstance(results, (tuple, list)):
            raise ArtifactError(f"the step gives a {type(results).__name__}, not its outputs")
        got = [FileArray(None, dtype_name(result), tuple(result.shape)) for result in results]
        expected = [
            array.model_copy(update={"shape": tuple(tensor.shape)})
            for array, tensor in zip(self._outputs, wanted, strict=True)
        ]
        check_arrays("output", got, expected)


def _tensor(parameter: NDArray[Any]) -> Tensor:
    tensor = torch.from_numpy(parameter)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def dtype_name(tensor: Tensor) -> str:
    """As the manifest writes it."""
    return str(tensor.dtype).removeprefix("torch.")
