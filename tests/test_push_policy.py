"""`export.push_policy`: what a learner's one call sends, and what it raises."""

import copy
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from torch import nn

from export import push_policy
from export.__main__ import main
from export.push import copied, push_body
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from tamiyo_client import errors
from tests.client.faulty_proxy import faulty_proxy
from tests.export.gate_cases import statistics
from tests.pushes import Learner
from tests.random_inputs import random_policy
from tests.running_server import RunningServer, running_server
from tests.specs import TINY_V1 as V1
from tests.specs import TINY_V2 as V2

Arguments = tuple[nn.Module, ObservationNormalizer | None]


class Served(NamedTuple):
    server: RunningServer
    learner: Callable[[int], Learner]

    @property
    def url(self) -> str:
        return self.server.address

    def version(self) -> str:
        answer = httpx.get(f"{self.url}/policy").raise_for_status().json()
        return str(answer["policy_version"])

    def listed(self) -> list[str]:
        answer = httpx.get(f"{self.url}/policy/versions").raise_for_status().json()
        return [version["policy_version"] for version in answer["versions"]]


def v1_learner(seed: int) -> Learner:
    return Learner(random_policy(V1, seed), statistics(V1.observation_dim))


def v2_learner(seed: int) -> Learner:
    return Learner(random_policy(V2, seed))


def serving(directory: Path, learner: Callable[[int], Learner]) -> Iterator[Served]:
    learner(0).export(directory, "onnx")
    with running_server(directory) as server:
        yield Served(server, learner)
        assert server.stop() == 0
        assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving(tmp_path_factory.mktemp("push") / "v1", v1_learner)


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving(tmp_path_factory.mktemp("push") / "v2", v2_learner)


def compiled(module: nn.Module) -> nn.Module:
    """Wrapped as any backend wraps it; this one needs no C++ compiler."""
    wrapped: Any = torch.compile(module, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def compiled_in_parts(policy: FactoredRecurrentActorCritic) -> nn.Module:
    """As a learner that compiles what is slow has it."""
    policy.add_module("feature_net", compiled(policy.feature_net))
    return policy


FORMS: dict[str, Callable[[FactoredRecurrentActorCritic], nn.Module]] = {
    "plain": lambda policy: policy,
    "training": lambda policy: policy.train(),
    "compiled": compiled,
    "compiled in parts": compiled_in_parts,
    "double": lambda policy: policy.double(),
    "half": lambda policy: policy.half(),
    "bfloat16": lambda policy: policy.bfloat16(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("served", ["v1", "v2"])
def test_a_policy_of_any_form_is_pushed_and_left_as_it_was(
    form: str, served: str, request: pytest.FixtureRequest
) -> None:
    on: Served = request.getfixturevalue(served)
    seed = 1 + list(FORMS).index(form)
    own, normalizer = on.learner(seed)
    policy = FORMS[form](own)
    before = on.version()
    state = copy.deepcopy(policy.state_dict())
    dtypes, is_training = {p.dtype for p in policy.parameters()}, policy.training
    random_state = torch.get_rng_state()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    answer = push_policy(policy, normalizer, on.url)
    rounded = Learner(own, normalizer)
    assert answer.policy_version == on.version() == rounded.version()
    assert answer.previous_version == before
    assert {p.dtype for p in policy.parameters()} == dtypes
    assert policy.training == is_training
    assert all(p.requires_grad for p in policy.parameters())
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)


def test_a_push_is_the_same_bytes_each_time() -> None:
    for learner in (v1_learner(1), v2_learner(1)):
        spec = learner.policy.spec
        bodies = {push_body(copied(*learner), spec, "fp32") for _ in range(2)}
        assert len(bodies) == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_before_anybody_is_asked(number: float) -> None:
    policy, normalizer = v1_learner(1)
    policy.get_parameter("lstm_ln.weight").data[3] = number
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        nobody.setblocking(False)
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"policy's 'lstm_ln\.weight' holds NaN or infinity"):
            push_policy(policy, normalizer, url)
        with pytest.raises(BlockingIOError):
            nobody.accept()


def test_statistics_that_are_not_finite_or_of_other_features_are_refused_too() -> None:
    policy, normalizer = v1_learner(1)
    assert normalizer is not None
    with pytest.raises(ValueError, match="the normaliser is for 5 features"):
        push_policy(policy, statistics(5), "http://127.0.0.1:9")
    normalizer.mean[0] = float("nan")
    with pytest.raises(ValueError, match="mean"):
        push_policy(policy, normalizer, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_dim": 12}, "hidden_dim is 12, expected 10"),
        ({"num_layers": 2, "hidden_dim": 12}, "hidden_dim is 12, expected 10"),
        ({"observation_dim": 12}, "observation_dim is 12, expected 11"),
        ({"feature_dim": 14, "num_layers": 2}, "feature_dim is 14, expected 12"),
    ],
)
def test_another_spec_than_the_served_one_is_named_and_nothing_is_sent(
    v1: Served, changes: dict[str, Any], sentence: str
) -> None:
    before = v1.listed()
    policy = random_policy(V1.model_copy(update=changes))
    with pytest.raises(ValueError, match=f"is not of the spec that is served: {sentence}$"):
        push_policy(policy, None, v1.url)
    assert v1.listed() == before


def test_a_policy_of_another_name_or_value_scale_is_the_same_policy(v2: Served) -> None:
    """The scale is a parameter, and goes with its weights."""
    policy = random_policy(V2.model_copy(update={"name": "another", "value_scale": 7.0}), 9)
    observation = {"observation": [0.3] * V2.observation_dim, "deterministic": True}
    push_policy(policy, None, v2.url)
    seven = httpx.post(f"{v2.url}/act", json=observation).json()["value"]
    push_policy(random_policy(V2, 9), None, v2.url)
    three = httpx.post(f"{v2.url}/act", json=observation).json()["value"]
    assert seven == pytest.approx(three * 7 / 3, rel=1e-6)


def test_the_server_s_own_sentence_is_raised(v1: Served) -> None:
    policy, _ = v1_learner(1)
    before = v1.listed()
    with pytest.raises(errors.InvalidRequest, match=r"^`features\.mean` is missing$") as refusal:
        push_policy(policy, None, v1.url)
    assert (refusal.value.status, refusal.value.error_type) == (422, "invalid")
    assert v1.listed() == before


def test_another_version_than_the_one_to_be_replaced_is_raised_as_such(v1: Served) -> None:
    before = v1.listed()
    with pytest.raises(errors.VersionMismatch, match=f"^{before[0]} serves, not sha256:12$"):
        push_policy(*v1_learner(20), v1.url, if_match="sha256:12")
    assert v1.listed() == before


def test_a_server_that_is_not_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
    with pytest.raises(errors.Unreachable):
        push_policy(*v1_learner(1), url, timeout_s=0.2)
    with pytest.raises(ValueError, match="ftp"):
        push_policy(*v1_learner(1), "ftp://127.0.0.1")


@pytest.mark.parametrize("content", ["<html>welcome</html>", "5"])
def test_what_answers_and_is_no_policy_server_is_told_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "policy").write_text(content)
    pages = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), pages) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            with pytest.raises(errors.ServerError, match="200, and not of a policy server"):
                push_policy(*v1_learner(1), url)
        finally:
            server.shutdown()


def test_sessions_are_given_up_where_that_is_asked_for(v1: Served) -> None:
    observation = [0.1] * V1.observation_dim
    first = {"session_id": "a", "observation": observation, "step": 0, "episode_start": True}
    following = {"session_id": "a", "observation": observation, "step": 1}
    for restarts, status in ((False, 200), (True, 410)):
        httpx.post(f"{v1.url}/act", json=first).raise_for_status()
        push_policy(*v1_learner(30 + restarts), v1.url, restart_sessions=restarts)
        assert httpx.post(f"{v1.url}/act", json=following).status_code == status


def pushed_by_command(
    learner: Learner, directory: Path, capsys: pytest.CaptureFixture[str], *urls: str
) -> tuple[int | str | None, str]:
    """The exit code of `python -m export push`, which has to refuse, and its one line."""
    torch.save(learner.policy.state_dict(), directory / "newer.pt")
    arguments = ["push", "--checkpoint", str(directory / "newer.pt"), "--normaliser", "identity"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, *(word for url in urls for word in ("--to", url))])
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return exit_.value.code, printed


def test_every_url_is_tried_and_each_refusal_named(
    v1: Served, v2: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_v1 = f"{v1.url}: the policy is not of the spec that is served: "
    before, elsewhere = (v1.listed(), v2.listed()), f"{v1.url}/nowhere"
    code, line = pushed_by_command(v2_learner(50), tmp_path, capsys, v1.url, elsewhere, v2.url)
    assert code == 1
    assert line.startswith(f"export: {of_v1}")
    assert f"; {elsewhere}: " in line
    assert v2.listed()[1:] == before[1]
    assert pushed_by_command(v2_learner(51), tmp_path, capsys, v1.url, v2.url)[0] == 1
    code, line = pushed_by_command(v2_learner(52), tmp_path, capsys, v1.url, f"{v1.url}/")
    assert (code, line.count("is not of the spec")) == (2, 2)
    assert v1.listed() == before[0]


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://127.0.0.1:99999", "http://[::1"])
def test_what_can_be_no_url_is_found_before_any_other_is_asked(
    v2: Served, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = v2.listed()
    code, line = pushed_by_command(v2_learner(53), tmp_path, capsys, v2.url, url)
    assert (code, f"'{url}' is no server's URL" in line) == (2, True)
    assert v2.listed() == before


FAULTS = {
    "the answer": ["none", "cut in the answer"],
    "the answer, and again": ["none", "cut in the answer", "cut in the answer", "none"],
    "the request": ["none", "cut before the request is through", "none"],
    "both": ["none", "cut before the answer", "cut in the answer", "none"],
    "the spec": ["cut in the answer", "none", "none"],
    "room, then the answer": ["none", "overloaded", "cut in the answer", "draining", "none"],
}


@pytest.mark.parametrize("lost", FAULTS)
@pytest.mark.parametrize("is_conditional", [False, True])
def test_a_push_whose_answer_is_lost_is_sent_again_and_happens_once(
    v1: Served, lost: str, is_conditional: bool
) -> None:
    learner = v1_learner(40 + 2 * list(FAULTS).index(lost) + is_conditional)
    before = v1.listed()
    faults = [*FAULTS[lost], *["none"] * 20]
    with faulty_proxy(*v1.server.host_and_port, faults) as (url, seen):
        answer = push_policy(*learner, url, if_match=before[0] if is_conditional else None)
    assert (answer.policy_version, answer.previous_version) == (learner.version(), before[0])
    assert v1.listed()[:2] == [learner.version(), before[0]]
    assert seen.total() >= len(FAULTS[lost])


def test_the_weights_that_serve_may_be_pushed_again_and_are_probed_again(v1: Served) -> None:
    own = push_policy(*v1_learner(0), v1.url)
    again = push_policy(*v1_learner(0), v1.url)
    assert own.policy_version == again.policy_version == v1.version()
    assert isinstance(again.probe_error, float)
    assert again.probe_error < 2e-5


@pytest.mark.parametrize("key", ["SECRET\n", "\ufeffSECRET", "SECRET ", "SÉCRET", ""])
def test_what_can_be_no_key_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="the key is not of printable ASCII letters") as told:
        push_policy(*v1_learner(1), "http://127.0.0.1:9", key)
    assert not key.strip() or key.strip() not in str(told.value)


@pytest.mark.parametrize("version", ["sha256:12\r\nHost: b", "sha256:1\x00", "sha256:é"])
def test_what_can_be_no_version_is_refused_before_anybody_is_asked(version: str) -> None:
    with pytest.raises(ValueError, match="a version is of printable ASCII letters"):
        push_policy(*v1_learner(1), "http://127.0.0.1:9", if_match=version)


NORMALIZERS: dict[str, Callable[[ObservationNormalizer], nn.Module]] = {
    "compiled": compiled,
    "double": lambda normalizer: normalizer.double(),
    "bfloat16": lambda normalizer: normalizer.bfloat16(),
}


@pytest.mark.parametrize("form", NORMALIZERS)
def test_statistics_of_any_form_are_pushed_as_they_are(form: str) -> None:
    """These are of numbers that every one of these forms has exactly."""
    policy, _ = v1_learner(1)
    mean, var = (torch.arange(V1.observation_dim, dtype=torch.float32) for _ in range(2))
    expected = push_body(copied(policy, ObservationNormalizer(mean, var)), V1, "fp32")
    normalizer: Any = NORMALIZERS[form](ObservationNormalizer(mean, var))
    assert push_body(copied(policy, normalizer), V1, "fp32") == expected


def test_a_module_around_a_policy_is_no_policy() -> None:
    policy, normalizer = v1_learner(1)
    with pytest.raises(ValueError, match="a Sequential is no policy; where it is wrapped around"):
        push_policy(nn.Sequential(policy), normalizer, "http://127.0.0.1:9")


def test_what_is_pushed_is_the_policy_as_it_was_when_it_was_copied() -> None:
    policy, normalizer = v1_learner(1)
    own = copied(policy, normalizer)
    before = push_body(own, V1, "fp32")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert push_body(own, V1, "fp32") == before
    assert push_body(copied(policy, normalizer), V1, "fp32") != before


def test_a_policy_that_was_compiled_in_parts_is_probed_in_eager_mode() -> None:
    policy, normalizer = v1_learner(1)
    expected = push_body(copied(policy, normalizer), V1, "fp32")
    compiled: Any = torch.compile(policy.feature_net, backend="eager")
    policy.feature_net = compiled
    own = copied(policy, normalizer)
    assert not any("OptimizedModule" in type(module).__name__ for module in own.policy.modules())
    assert push_body(own, V1, "fp32") == expected
