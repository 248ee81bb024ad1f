"""Artifacts that more than one module's tests make something of: they only read them."""

from pathlib import Path

import pytest

from export.exporter import export_policy
from tests.export.gate_cases import statistics
from tests.random_inputs import random_policy
from tests.sb3.policies import random_sb3
from tests.specs import TINY_LSTMS, TINY_MLPS, TINY_V1, TINY_V2


@pytest.fixture(scope="session")
def onnx_artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of two policies of V1, one of V2 and two of the other family, for batches up to 16."""
    made = {}
    for name, spec, seed in (("v1", TINY_V1, 0), ("v1-other", TINY_V1, 1), ("v2", TINY_V2, 0)):
        made[name] = tmp_path_factory.mktemp("onnx") / name
        policy, normalizer = random_policy(spec, seed), statistics(spec.observation_dim)
        export_policy(
            policy, normalizer, made[name], name="tiny", formats=("onnx",), max_batch_size=16
        )
    for name, of_sb3 in (("lstms", TINY_LSTMS), ("mlps", TINY_MLPS)):
        made[name] = tmp_path_factory.mktemp("onnx") / name
        export_policy(
            random_sb3(of_sb3), None, made[name], name=name, formats=("onnx",), max_batch_size=16
        )
    return made
