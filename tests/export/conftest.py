"""Artifacts that more than one module's tests make something of: they only read them."""

from pathlib import Path

import pytest

from export.exporter import export_policy
from tests.export.gate_cases import statistics
from tests.random_inputs import random_policy
from tests.specs import TINY_V1, TINY_V2


@pytest.fixture(scope="session")
def onnx_artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of two policies of V1 and one of V2, in ONNX, for batches up to 16."""
    made = {}
    for name, spec, seed in (("v1", TINY_V1, 0), ("v1-other", TINY_V1, 1), ("v2", TINY_V2, 0)):
        made[name] = tmp_path_factory.mktemp("onnx") / name
        policy, normalizer = random_policy(spec, seed), statistics(spec.observation_dim)
        export_policy(
            policy, normalizer, made[name], name="tiny", formats=("onnx",), max_batch_size=16
        )
    return made
