"""A device without room, one that fails a copy, and one whose fault stays."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from export.loaders.torch_step import Live, TorchStep
from export.manifest import step_inputs, step_outputs
from service.runtime.cpu_device import CpuDevice
from service.runtime.device_states import DeviceStates
from service.runtime.protocol import DeviceLost
from tests.service.runtime.sums import Sums
from tests.service.runtime.test_device_runtime import on_device
from tests.specs import TINY_V1

ARRAYS = step_inputs(TINY_V1), step_outputs(TINY_V1)


def test_more_states_than_the_device_has_room_for_are_told_in_gigabytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def zeros(shape: tuple[int, ...], **_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    hidden = TINY_V1.states[0].shape[-1]
    with pytest.raises(MemoryError, match=rf"^{8 * hidden}\.0 GB of states do not, on cpu$"):
        DeviceStates(TINY_V1, 10**9, torch.device("cpu"))


def test_another_fault_there_says_nothing_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(shape: tuple[int, ...], **_: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(RuntimeError, match="no kernel image"):
        DeviceStates(TINY_V1, 8, torch.device("cpu"))


def fails_to_copy(parameters: Mapping[str, Tensor]) -> Live:
    raise RuntimeError("a copy failed")


class Failing(CpuDevice):
    """Fails what it is given, and is lost where `is_lost`."""

    failure: Exception | None = None
    is_lost = False

    def submit(self, work: Callable[[], None]) -> Future[None]:
        def fail() -> None:
            if self.failure is not None:
                raise self.failure
            work()

        return super().submit(fail)

    def settle(self) -> None:
        if self.is_lost:
            raise DeviceLost("an illegal memory access was encountered")


def test_weights_of_which_nobody_knows_how_many_are_new_are_served_no_more() -> None:
    device, call = Failing(), Sums(TINY_V1, []).__call__
    own = TorchStep(
        *("t", call, *ARRAYS),
        renewed=lambda parameters: call,
        enlivened=lambda parameters: Live(call, {"scale": torch.ones(1)}),
    )
    other = own.with_parameters({"scale": np.zeros(1, np.float32)})
    adopt = on_device(own, TINY_V1, device).prepare(other)
    device.failure = RuntimeError("a copy failed")
    with pytest.raises(DeviceLost, match="new weights are there in part"):
        adopt()


def test_a_lost_device_is_told_wherever_it_is_met() -> None:
    device = Failing()
    runtime = on_device(Sums(TINY_V1, []).step(), TINY_V1, device)
    other = TorchStep("t", Sums(TINY_V1, []).__call__, *ARRAYS, enlivened=fails_to_copy)
    out_of_range = np.array([10**6], dtype=np.intp)
    for is_lost in (False, True):
        device.is_lost = is_lost
        with pytest.raises(DeviceLost if is_lost else IndexError):  # as an operation fails
            runtime.read(out_of_range)
        with pytest.raises(DeviceLost if is_lost else RuntimeError):
            runtime.prepare(other)
    row = np.array([0], dtype=np.intp)
    with pytest.raises(DeviceLost):
        runtime.write(row, tuple([np.zeros((1, *s.shape), np.float32) for s in TINY_V1.states]))
