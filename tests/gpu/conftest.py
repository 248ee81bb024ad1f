"""`make test-gpu`: without a GPU all is skipped, or rehearsed on the CPU, and it says which."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from export.exporter import export_policy
from export.formats import FormatError
from export.manifest import Device, Precision
from model.actor_critic import ActorCritic
from model.sb3.spec import SB3Spec
from model.spec import PolicySpec
from tests.gpu.device import DEVICE, HAS_GPU
from tests.random_inputs import random_policy
from tests.sb3.policies import random_sb3
from tests.specs import TINY_LSTMS, TINY_MLPS, TINY_V1, TINY_V2
from tests.test_faults import MODEL

POLICIES: dict[str, PolicySpec | SB3Spec] = {
    spec.name: spec for spec in (TINY_V1, TINY_V2, TINY_MLPS, TINY_LSTMS)
}
LARGEST = 64

Exported = Callable[..., Path]
Note = Callable[[str], None]

NOTES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOTES] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    why = "no GPU is visible here; --rehearse runs on the CPU what can run there"
    for item in items:
        if item.get_closest_marker("gpu") is None:
            continue
        # What torch says of a GPU is shown, and fails nothing.
        item.add_marker(pytest.mark.filterwarnings("default"))
        if not HAS_GPU and not config.getoption("--rehearse"):
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    of_cuda = [
        each.nodeid.rpartition("::")[2].partition("[")[0]
        for each in skipped
        if "CUDA only" in each.longreprtext
    ]
    for note in config.stash[NOTES]:
        terminalreporter.write_line(f"gpu: {note}")
    if HAS_GPU:
        terminalreporter.write_line(f"gpu: ran on {torch.cuda.get_device_name()}")
    elif config.getoption("--rehearse"):
        terminalreporter.write_line("gpu: a rehearsal on the CPU; nothing ran on a GPU")
        if of_cuda:
            terminalreporter.write_line(
                f"gpu: CUDA only, not run: {', '.join(dict.fromkeys(of_cuda))}"
            )
    elif skipped:
        terminalreporter.write_line("gpu: skipped, as no GPU is visible here; nothing was run")


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """What was measured and is not asserted: the run's end says it."""
    return request.config.stash[NOTES].append


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`(policy, formats, precision, device)` -> its artifact, behind the gate, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def artifact(
        policy: str, formats: str, precision: Precision = "fp32", device: Device = DEVICE
    ) -> Path:
        key = (policy, formats, precision, device)
        if key not in made:
            directory = tmp_path_factory.mktemp("gpu") / policy
            try:
                export_policy(
                    made_policy(POLICIES[policy]),
                    None,
                    directory,
                    name=MODEL,
                    formats=formats.split(","),
                    device=device,
                    precision=precision,
                    max_batch_size=LARGEST,
                )
            except FormatError as error:  # no bf16 products here, say, or no compiler
                pytest.skip(str(error))
            made[key] = directory
        return made[key]

    return artifact


def made_policy(spec: PolicySpec | SB3Spec) -> ActorCritic:
    return random_sb3(spec, 0) if isinstance(spec, SB3Spec) else random_policy(spec)
