"""Whatever state of the process a caller has set: the artifact is the same, and so is the state."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import backends

from export.artifact import open_artifact
from export.exporter import export_policy
from export.manifest import Manifest
from export.process import plain_process
from export.verify import verify_artifact
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from tests.export.gate_cases import statistics

FORMAT = "torchscript"
LARGEST = 64

State = Callable[[], AbstractContextManager[object]]


@contextmanager
def setting(set_it: Callable[[Any], object], during: object, before: object) -> Iterator[None]:
    set_it(during)
    try:
        yield
    finally:
        set_it(before)


def precision_of(place: Any, value: str) -> AbstractContextManager[object]:
    return setting(partial(setattr, place, "fp32_precision"), value, "none")


@contextmanager
def precision_by_the_older_switch(value: str) -> Iterator[None]:
    """It says the newer ones' too, and leaves them said."""
    with (
        precision_of(backends.mkldnn.matmul, "none"),  # type: ignore[attr-defined]
        precision_of(backends.cuda.matmul, "none"),
        setting(torch.set_float32_matmul_precision, value, "highest"),
    ):
        yield


STATES: dict[str, State] = {
    "products in bf16, by the older switch": lambda: precision_by_the_older_switch("medium"),
    "all in bf16": lambda: precision_of(backends, "bf16"),
    "all in TF32": lambda: precision_of(backends, "tf32"),
    "a CPU's products in bf16": lambda: precision_of(
        backends.mkldnn.matmul,  # type: ignore[attr-defined]
        "bf16",
    ),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "three threads": lambda: setting(torch.set_num_threads, 3, torch.get_num_threads()),
}


def asked(question: Callable[[], Any]) -> Any:
    """Torch's older switches raise where the newer ones contradict them."""
    try:
        return question()
    except RuntimeError:
        return "contradicted"


def state_of_the_process() -> dict[str, Any]:
    cudnn: Any = backends.cudnn
    mkldnn: Any = backends.mkldnn
    return {
        "older switch": asked(torch.get_float32_matmul_precision),
        "cudnn.allow_tf32": asked(lambda: cudnn.allow_tf32),
        "precisions": [
            place.fp32_precision
            for place in (
                *(backends, mkldnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn),
                *(cudnn, cudnn.conv, cudnn.rnn, backends.cuda.matmul),
            )
        ],
        "products": [mkldnn.matmul.fp32_precision, backends.cuda.matmul.fp32_precision],
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast's dtype": torch.get_autocast_dtype("cpu"),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "inference mode": torch.is_inference_mode_enabled(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "random numbers": torch.get_rng_state().sum().item(),
    }


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """How fast a step is doesn't matter here. And no test leaves a state to the next."""
    monkeypatch.setattr("export.measurement.SECONDS_PER_BATCH_SIZE", 0.005)
    before = state_of_the_process()
    yield
    assert state_of_the_process() == before


def export(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer, output: Path
) -> Manifest:
    return export_policy(
        policy, normalizer, output, name="tiny", formats=(FORMAT,), max_batch_size=LARGEST
    )


@pytest.fixture(scope="module")
def plain(policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is exported in a state that nobody has touched."""
    output = tmp_path_factory.mktemp("process") / "plain"
    export(policy, statistics(policy.spec.observation_dim), output)
    return output


@pytest.mark.parametrize("name", STATES)
def test_export_passes_and_is_the_same_in_every_state_which_it_leaves_as_it_was(
    name: str, policy: FactoredRecurrentActorCritic, plain: Path, tmp_path: Path
) -> None:
    normalizer = statistics(policy.spec.observation_dim)
    with STATES[name]():
        before = state_of_the_process()
        manifest = export(policy, normalizer, tmp_path / "it")
        assert state_of_the_process() == before
    assert manifest.policy_version == Manifest.read(plain).policy_version
    assert max(manifest.parity.formats[FORMAT].max_error.values()) < 1e-5


@pytest.mark.parametrize("name", STATES)
def test_verify_passes_in_every_state_which_it_leaves_as_it_was(name: str, plain: Path) -> None:
    artifact = open_artifact(plain)
    with STATES[name]():
        before = state_of_the_process()
        parity = verify_artifact(artifact)
        assert state_of_the_process() == before
    assert max(parity[FORMAT].max_error.values()) < 1e-5


class Interrupted(Exception): ...


@pytest.mark.parametrize("name", STATES)
def test_export_that_fails_leaves_every_state_as_it_was(
    name: str, policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    def interrupt(stage: str) -> None:
        raise Interrupted

    with STATES[name]():
        before = state_of_the_process()
        with pytest.raises(Interrupted):
            export_policy(
                policy, None, tmp_path / "it", name="it", formats=(FORMAT,), on_stage=interrupt
            )
        assert state_of_the_process() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", STATES)
def test_inside_torch_computes_as_in_a_fresh_process(name: str) -> None:
    x = torch.linspace(-1, 1, 96 * 96).view(96, 96)
    exact = (x.double() @ x.double()).float()
    with STATES[name](), plain_process():
        product = torch.mm(x, x)
        made = torch.zeros(2)
        state = state_of_the_process()
    assert float((product - exact).abs().max()) < 1e-4
    assert (made.dtype, made.device.type) == (torch.float32, "cpu")
    assert not made.is_inference()
    assert not state["autocast"]
    assert not state["gradients"]
    assert state["older switch"] == "highest"
    assert state["products"] == ["ieee", "ieee"]
    assert state["threads"] == 1


def test_what_inherited_its_precision_inherits_it_still() -> None:
    """Or a caller who sets it for all products once more would find that some no longer heed it."""
    matmul: Any = backends.mkldnn.matmul  # type: ignore[attr-defined]
    with precision_of(backends, "bf16"):
        with plain_process():
            pass
        assert matmul.fp32_precision == "bf16"
        backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
        assert matmul.fp32_precision == "ieee"


def test_as_many_threads_as_asked_for_are_there_inside() -> None:
    before = torch.get_num_threads()
    with plain_process(num_threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_of_two_threads_one_waits_so_that_each_is_given_back_what_was_there() -> None:
    before = torch.get_num_threads()
    is_inside, may_leave = threading.Event(), threading.Event()

    def other() -> None:
        with plain_process():
            is_inside.set()
            may_leave.wait(10.0)

    torch.set_num_threads(2)
    try:
        with plain_process():
            thread = threading.Thread(target=other)
            thread.start()
            assert not is_inside.wait(0.5)
        assert is_inside.wait(10.0)
        may_leave.set()
        thread.join(10.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
