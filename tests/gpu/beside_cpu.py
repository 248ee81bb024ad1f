"""The device's runtime beside the host's, which steps on the CPU: the same launches for both."""

from functools import partial

import numpy as np

from export.loaders.torch_step import TorchStep
from export.manifest import Precision
from export.parity import TOLERANCES
from model.step_spec import StepSpec
from service.runtime.device_runtime import DeviceRuntime
from service.runtime.protocol import Outputs
from tests.gpu.device import HAS_GPU
from tests.service.runtime.test_device_runtime import NUM_ROWS, Both

MOST_OTHER_ACTIONS = 0.005
"""Of all rows: choices closer than the tolerance are a tie."""


class BesideCpu(Both):
    """On a GPU within the gate's tolerance of the CPU; in rehearsal the same, to the last bit."""

    def __init__(
        self,
        reference: TorchStep,
        device: DeviceRuntime,
        spec: StepSpec,
        rng: np.random.Generator,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(reference, spec, rng)
        self.runtimes[1] = device
        self.write(self.all_rows)
        tolerance = TOLERANCES[precision]
        self._check_close = partial(
            np.testing.assert_allclose, atol=tolerance.atol, rtol=tolerance.rtol
        )
        self.num_rows = self.num_other = 0

    def collect(self) -> Outputs:
        if not HAS_GPU:
            return super().collect()
        host, device = [runtime.collect() for runtime in self.runtimes]
        self.under_way.pop(0)
        num = len(device.arrays["action"])
        fine = np.ones(num, dtype=np.bool_) if host.is_finite is None else host.is_finite
        got = np.ones(num, dtype=np.bool_) if device.is_finite is None else device.is_finite
        assert got.tolist() == fine.tolist()
        is_other = (host.arrays["action"] != device.arrays["action"]).any(axis=1)
        self.num_rows += num
        self.num_other += int(np.count_nonzero(is_other & fine))
        alike = fine & ~is_other
        for name, array in host.arrays.items():
            self._check_close(device.arrays[name][alike], array[alike])
        return device

    def check_states(self) -> None:
        if not HAS_GPU:
            super().check_states()
            return
        rows = np.arange(NUM_ROWS + 1, dtype=np.intp)
        host, device = [runtime.read(rows) for runtime in self.runtimes]
        for one, other in zip(host, device, strict=True):
            fine = np.isfinite(one).reshape(len(rows), -1).all(axis=1)
            assert np.isfinite(other).reshape(len(rows), -1).all(axis=1).tolist() == fine.tolist()
            self._check_close(other[fine], one[fine])
            assert not other[-1].any()
        assert self.num_other <= 1 + MOST_OTHER_ACTIONS * self.num_rows
