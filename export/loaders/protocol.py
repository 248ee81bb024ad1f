"""What a loaded format is to whoever runs it: the gate, `verify` and the service alike."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from export.parameters import Parameters


class LoadedStep(Protocol):
    """One exported step. `name` is its runtime's, `device` where it runs."""

    name: str
    device: str

    def bind(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
    ) -> Callable[[], None]:
        """A call that steps the policy from what `inputs` hold by then, into `outputs`.

        Both are by the manifest's names: contiguous arrays on the host, of one batch size, that
        share no memory. Binding them once spares each call finding and checking them. A call
        raises ArtifactError, and writes nothing, where the step's results are not the manifest's.
        """


class RenewableStep(LoadedStep, Protocol):
    """One that may be given new weights."""

    def with_parameters(self, parameters: Parameters) -> "RenewableStep":
        """The same step with other parameters, all of them: what an export of these would load.

        This one goes on as it was, and calls bound to it too; the new one may keep the arrays.
        Raises ArtifactError where the format, or the runtime, takes no others than its file's.
        """
