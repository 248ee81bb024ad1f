"""States and batches in a device's memory: a launch copies one buffer there, and one back.

Serves torch's formats. Importing this module imports torch.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from math import inf
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.loaders.protocol import LoadedStep
from export.loaders.torch_step import LiveStep, TorchStep
from export.manifest import Array
from model.step_spec import StepSpec
from service.runtime.arrays import Arrays, are_all
from service.runtime.device_states import DeviceStates
from service.runtime.device_step import IS_FINITE, READ_ROW, WRITE_ROW, DeviceStep, Packing
from service.runtime.protocol import MOST_UNDER_WAY, DeviceLost, Outputs, Rows, State

RUNS_BEFORE_CAPTURE = 3
"""TorchScript looks on at the first, compiles in the second, and then does the same each time."""

Run = Callable[[], None]


class Device(Protocol):
    """Where work runs, in the order in which it was submitted."""

    torch_device: torch.device

    def host_buffer(self, num_rows: int, row_bytes: int) -> Tensor:
        """Zeros, `[rows, row_bytes]` of uint8, in host memory that it copies from and to fast."""

    def capture(self, run: Run) -> Run:
        """What does in submitted work all that `run` does, as fast as can be; runs nothing yet.

        Inside `as_served`. `run` has run before in submitted work, so that nothing in it happens
        for the first time.
        """

    def as_served(self) -> AbstractContextManager[None]:
        """For one thread at a time: in it, products are as precise as they are to be served."""

    def submit(self, work: Run) -> Future[None]:
        """Has `work` run; does not wait. The future is done when all it began has ended.

        Raises nothing: what went wrong is the future's.
        """

    def settle(self) -> None:
        """Waits for what the calling thread itself began: submitted work finds it done.

        Raises DeviceLost where nothing will be any more.
        """


class _Lane:
    """Host memory of one batch at a time: what it brings, and what it is given."""

    def __init__(self, device: Device, packing: Packing, states: DeviceStates, rows: int) -> None:
        self.brought = device.host_buffer(rows, packing.brought.row_bytes)
        self.given = device.host_buffer(rows, packing.given.row_bytes)
        self.inputs = packing.brought.views(self.brought.numpy())
        self.outputs = packing.given.views(self.given.numpy())
        for array in self.inputs.values():
            if array.dtype == np.bool_:
                array[:] = True
        self.read_row = self.inputs.pop(READ_ROW)
        self.write_row = self.inputs.pop(WRITE_ROW)
        self.is_finite = self.outputs.pop(IS_FINITE)
        self.read_row[:], self.write_row[:] = states.zero_row, states.scrap_row


class _Captured(NamedTuple):
    """What served before, of the same file, as it was captured.

    Machine code whose own parameters nobody can write to is there twice: as its file has it, and
    with parameters that are written.
    """

    live: LiveStep
    steps: list[Run]


class DeviceRuntime:
    """A `Runtime` on a device: states stay there, and a step is captured for each batch size.

    Captured steps read parameters of the runtime's own: new ones are copied there.
    """

    def __init__(
        self,
        loaded: LoadedStep,
        device: Device,
        *,
        spec: StepSpec,
        num_rows: int,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        batch_sizes: Sequence[int],
    ) -> None:
        assert isinstance(loaded, TorchStep)
        self.name = loaded.name
        self.device = loaded.device
        self.when_done: Callable[[], None] = lambda: None
        self._device = device
        self._states = states = DeviceStates(spec, num_rows, device.torch_device)
        self.zero_row = states.zero_row
        self._packing = packing = Packing(states, inputs, outputs)
        self._sizes = sizes = sorted(batch_sizes)
        self._by_num_rows = [0]  # which of the batch sizes a batch of so many rows takes
        for at, size in enumerate(sizes):
            self._by_num_rows += [at] * (size + 1 - len(self._by_num_rows))
        # One of each for all batches: they are on the device one after another.
        self._brought, self._given = self._buffers()
        lanes = [_Lane(device, packing, states, sizes[-1]) for _ in range(MOST_UNDER_WAY)]
        self._lanes = deque(lanes)
        self._idle = lanes[0].brought.to(device.torch_device, copy=True)
        self._under_way: deque[tuple[_Lane, int, Future[None]]] = deque()
        self._aside: _Captured | None = None
        self._is_captured = False  # every batch size of what serves
        self._take(loaded, loaded.enliven())
        step = self._step(self._live)
        self._steps: list[Run] = [partial(step, size) for size in sizes]
        device.settle()

    def _take(self, loaded: TorchStep, live: LiveStep) -> None:
        # The file's own, where it serves now: whoever goes back to them has no others to bring.
        own = {} if loaded.parameters else {n: p.clone() for n, p in live.parameters.items()}
        self._loaded, self._live, self._own = loaded, live, own

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """What a batch brings and is given, on the device."""
        brought, given = [
            torch.zeros(
                (self._sizes[-1], layout.row_bytes),
                dtype=torch.uint8,
                device=self._device.torch_device,
            )
            for layout in (self._packing.brought, self._packing.given)
        ]
        return brought, given

    def _step(self, live: LiveStep) -> DeviceStep:
        return DeviceStep(live, self._states, self._packing, self._brought, self._given)

    @property
    def inputs(self) -> Mapping[str, NDArray[Any]]:
        return self._lanes[0].inputs

    def launch(self, read_rows: Rows, write_rows: Rows, *, beside_s: float = inf) -> None:
        lane, num = self._lanes[0], len(read_rows)
        at = self._by_num_rows[num]
        size = self._sizes[at]
        lane.read_row[:num], lane.read_row[num:size] = read_rows, self.zero_row
        lane.write_row[:num], lane.write_row[num:size] = write_rows, self._states.scrap_row
        future = self._device.submit(partial(self._run, lane, self._steps[at], size))
        self._under_way.append((lane, num, future))
        self._lanes.rotate()
        future.add_done_callback(lambda _: self.when_done())

    @torch.inference_mode()
    def _run(self, lane: _Lane, step: Run, size: int) -> None:
        self._brought[:size].copy_(lane.brought[:size], non_blocking=True)
        step()
        lane.given[:size].copy_(self._given[:size], non_blocking=True)

    def is_done(self) -> bool:
        return not self._under_way or self._under_way[0][2].done()

    def is_idle(self) -> bool:
        return not self._under_way or self._under_way[-1][2].done()

    def collect(self) -> Outputs:
        lane, num, future = self._under_way.popleft()
        future.result()
        # Copies: answers are written from them when others have been launched.
        arrays: Arrays = {name: array[:num].copy() for name, array in lane.outputs.items()}
        is_finite = lane.is_finite[:num].copy()
        return Outputs(arrays, None if are_all(is_finite) else is_finite)

    def read(self, rows: Rows) -> State:
        with self._settled():
            return self._states.read(rows)

    def write(self, rows: Rows, state: State) -> None:
        with self._settled():
            self._states.write(rows, state)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """What the calling thread does there has ended after it. A lost device says so."""
        try:
            yield
        except Exception:
            self._device.settle()
            raise
        self._device.settle()

    def prepare(self, loaded: LoadedStep) -> Callable[[], None]:
        with self._settled():
            return self._prepared(loaded)

    def _prepared(self, loaded: LoadedStep) -> Callable[[], None]:
        assert isinstance(loaded, TorchStep)
        parameters = loaded.parameters or self._own
        own = self._live.parameters
        is_like = loaded.is_like(self._loaded)
        if is_like and parameters and parameters.keys() <= own.keys():
            return partial(self._adopt_parameters, loaded, parameters)
        aside = self._aside if is_like else None
        if aside is not None and aside.live.parameters.keys() == loaded.parameters.keys():
            return partial(self._adopt_aside, loaded, aside)
        live = loaded.enliven()
        steps = self._captured(live)

        def adopt() -> None:
            served = _Captured(self._live, self._steps)
            self._aside = served if is_like and self._is_captured else None
            self._take(loaded, live)
            self._device.settle()
            self._steps, self._is_captured = steps, True

        return adopt

    def _adopt_aside(self, loaded: TorchStep, aside: _Captured) -> None:
        self._write(aside.live, loaded.parameters)
        self._aside = _Captured(self._live, self._steps)
        self._loaded, self._live, self._steps = loaded, aside.live, aside.steps

    def _adopt_parameters(self, loaded: TorchStep, parameters: Mapping[str, Tensor]) -> None:
        self._write(self._live, parameters)
        self._loaded = loaded

    def _write(self, live: LiveStep, parameters: Mapping[str, Tensor]) -> None:
        """Copies parameters into those that the step reads: all of them, between two launches.

        Raises DeviceLost where that fails: nobody knows then how many are new.
        """
        pairs = [(live.parameters[name], parameter) for name, parameter in parameters.items()]

        @torch.inference_mode()
        def copy() -> None:
            for to, parameter in pairs:
                to.copy_(parameter, non_blocking=True)

        try:
            self._device.submit(copy).result()
        except Exception as error:
            raise DeviceLost("new weights are there in part") from error

    def warm_up(self, *, is_wanted: Callable[[], bool] = lambda: True) -> None:
        if self._is_captured:  # as another was, before this
            return
        self._steps = self._captured(self._live, is_wanted)
        self._is_captured = is_wanted()

    def _captured(self, live: LiveStep, is_wanted: Callable[[], bool] = lambda: True) -> list[Run]:
        """The step at each batch size, captured while it was wanted.

        It runs first on buffers of its own, whose rows are all padding: others may serve meanwhile.
        """
        brought, given = self._buffers()
        brought.copy_(self._idle)
        trial = DeviceStep(live, self._states, self._packing, brought, given)
        step = self._step(live)
        self._device.settle()
        steps: list[Run] = [partial(step, size) for size in self._sizes]
        with self._device.as_served():
            for at in reversed(range(len(steps))):  # what the largest takes is enough for all
                for _ in range(RUNS_BEFORE_CAPTURE):
                    if is_wanted():
                        self._device.submit(partial(trial, self._sizes[at])).result()
                if is_wanted():
                    steps[at] = self._device.capture(steps[at])
        return steps
