"""What can be told of the GPU's side without one; `tests/gpu` has the rest."""

import pytest
import torch

from service.runtime.cuda_device import float32_products


@pytest.mark.parametrize(("tf32", "precision"), [(True, "high"), (False, "highest")])
def test_products_are_in_tf32_where_asked_for_and_only_there(tf32: bool, precision: str) -> None:
    def capture() -> None:
        with float32_products(tf32=tf32):
            assert torch.get_float32_matmul_precision() == precision
            raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        capture()
    assert torch.get_float32_matmul_precision() == "highest"
