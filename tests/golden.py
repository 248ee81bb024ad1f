"""Where the recorded inputs and outputs of the original policy lie, and how a test asks for them.

They are not part of this repository: a checkout without them skips these tests, with the reason,
and still has the naive NumPy policy (`tests/naive.py`) as its oracle.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no recorded outputs: {GOLDEN.parent.name}/golden is absent"
)


def golden_tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_json(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return loaded
