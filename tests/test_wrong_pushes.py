"""Pushes that are wrong, each in its own way: each its sentence, and the older weights serve on.

Over real sockets. Whatever was sent, the version that served before answers bit for bit as it did,
to whoever carries no state, and to a session that goes on from its own.
"""

import gzip
import pickle
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from export.manifest import Precision
from model.spec import PolicySpec
from service.http.connection import LINGER_BYTES
from service.http.policy_routes import MOST_BODIES
from tests.export.gate_cases import statistics
from tests.machine import needs_bf16
from tests.pushes import SAFETENSORS, TIMEOUT_S, Learner, Tensors, put
from tests.random_inputs import random_policy
from tests.running_server import RunningServer, running_server
from tests.specs import TINY_V2 as V2

SIZE = 16
V1 = PolicySpec.tamiyo_v1(
    num_slots=2, observation_dim=SIZE, feature_dim=SIZE, hidden_dim=SIZE, num_layers=1
)
"""Its first weight is square."""
NUMBERS = count()
CHUNK = b"\0" * 65_536
BUFFERED = 16_000_000
"""What sockets may hold beside what was read."""


def learner(seed: int, spec: PolicySpec = V1) -> Learner:
    return Learner(random_policy(spec, seed), statistics(spec.observation_dim))


class Served(NamedTuple):
    """A server, the policy that it serves, and a push of another that is right."""

    server: RunningServer
    spec: PolicySpec
    own: Learner
    right: Tensors

    @property
    def url(self) -> str:
        return self.server.address


def serving(directory: Path, spec: PolicySpec, fmt: str, precision: Precision) -> Iterator[Served]:
    own = learner(0, spec)
    own.export(directory, fmt, precision=precision)
    with running_server(directory) as server:
        served = Served(server, spec, own, learner(1, spec).push(precision))
        yield served
        # All that was refused was refused for its own sake: the right one is taken.
        answer = put(served.url, served.right.written())
        assert answer.status_code == 200, answer.text
        assert answer.json()["policy_version"] == learner(1, spec).version(precision)
        assert server.stop() == 0
        assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving(tmp_path_factory.mktemp("wrong") / "v1", V1, "onnx", "fp32")


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving(tmp_path_factory.mktemp("wrong") / "v2", V2, "onnx", "fp32")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving(tmp_path_factory.mktemp("wrong") / "bf16", V1, "torchscript", "bf16")


class Before:
    """What was served before a push: the same steps are to give the same bits after it."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._name = f"session {next(NUMBERS)}"
        self._stateless = self._act()
        self._first = self._act(session_id="reference", episode=self._name, step=0)
        self._second = self._act(session_id="reference", episode=self._name, step=1)
        self._act(session_id=self._name, episode=self._name, step=0)
        self._versions = self._get("/policy/versions")

    def _get(self, path: str) -> Any:
        return httpx.get(f"{self._served.url}{path}", timeout=TIMEOUT_S).raise_for_status().json()

    def _act(self, **fields: Any) -> dict[str, Any]:
        observation = [0.1 * (1 + fields.get("step", 0))] * self._served.spec.observation_dim
        start = {"episode_start": True, "seed": 5} if fields.get("step") == 0 else {}
        if not fields:
            start = {"seed": 5}
        request = {"observation": observation, **fields, **start}
        answer = httpx.post(f"{self._served.url}/act", json=request, timeout=TIMEOUT_S)
        told: dict[str, Any] = answer.raise_for_status().json()
        told.pop("session_id", None)
        return told

    def check(self) -> None:
        assert self._get("/policy/versions") == self._versions
        assert self._act() == self._stateless
        assert self._act(session_id=self._name, episode=self._name, step=1) == self._second


def check_refused(served: Served, body: bytes, status: int, sentence: str) -> None:
    before = Before(served)
    answer = put(served.url, body)
    assert answer.status_code == status, answer.text
    said = answer.json()
    assert sentence in said["error"], said
    assert said["error_type"] == {400: "malformed", 422: "invalid"}[status]
    assert "\n" not in said["error"]
    before.check()


def swapped_heads(push: Tensors) -> Tensors:
    """Two heads of four choices each, with each other's last layers."""
    mlps = learner(1).policy.head_mlps()
    widths = [mlp[0].get_parameter("bias").shape[0] for mlp in mlps]
    one, other = (at for at, head in enumerate(V1.heads) if head.size == 4)
    rows, columns = (
        [torch.arange(sum(sizes[:at]), sum(sizes[: at + 1])) for at in (one, other)]
        for sizes in ([head.size for head in V1.heads], widths)
    )
    weight, bias = (push[f"outputs.output_layers.{of}"].clone() for of in ("weight", "bias"))
    blocks = [weight[r[:, None], c].clone() for r, c in zip(rows, columns, strict=True)]
    biases = [bias[r].clone() for r in rows]
    for at in (0, 1):
        weight[rows[at][:, None], columns[at]] = blocks[1 - at]
        bias[rows[at]] = biases[1 - at]
    return push.changed(outputs__output_layers__weight=weight, outputs__output_layers__bias=bias)


def without_statistics(push: Tensors) -> Tensors:
    """What is sent by a learner that forgets them, though its policy is used to them."""
    return push.changed(features__mean=torch.zeros(SIZE), features__scale=torch.ones(SIZE))


def of_another_spec(push: Tensors) -> Tensors:
    other = V1.model_copy(update={"hidden_dim": 12})
    return learner(1, other).push()


OF_OTHERS = "they are not of the policy that made the probe"
WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (
        lambda push: push.changed(features__linear__bias=None),
        "`features.linear.bias` is missing",
    ),
    "extra": (
        lambda push: push.changed(nonesuch=torch.zeros(1)),
        "`nonesuch` is none of this policy's parameters",
    ),
    "misshapen": (
        lambda push: push.changed(value_scale=torch.ones(2)),
        "`value_scale` is [2], expected [1]",
    ),
    "another rank": (
        lambda push: push.changed(value_scale=torch.ones(())),
        "`value_scale` is [], expected [1]",
    ),
    "no number": (
        lambda push: push.with_number("features.linear.weight", (1, 2), float("nan")),
        "`features.linear.weight[1][2]` is NaN or infinite",
    ),
    "infinite": (
        lambda push: push.with_number("recurrence.cells.0.bias", (3,), -float("inf")),
        "`recurrence.cells.0.bias[3]` is NaN or infinite",
    ),
    "double": (
        lambda push: push.changed(value_scale=torch.ones(1, dtype=torch.float64)),
        "`value_scale` is float64, expected float32",
    ),
    "transposed": (
        lambda push: push.changed(features__linear__weight=push["features.linear.weight"].t()),
        OF_OTHERS,
    ),
    "swapped heads": (swapped_heads, OF_OTHERS),
    "forgotten normaliser": (without_statistics, OF_OTHERS),
    "another value scale": (
        lambda push: push.changed(value_scale=torch.full((1,), 2.0)),
        "`probe.value[0][0]` is ",
    ),
    "probe of other weights": (
        lambda push: Tensors(push.parameters() | learner(2).push().probe()),
        OF_OTHERS,
    ),
    "one weight of the served policy": (
        lambda push: push.changed(
            recurrence__cells__0__weight=learner(0).push()["recurrence.cells.0.weight"]
        ),
        OF_OTHERS,
    ),
    "of another spec": (
        of_another_spec,
        "`recurrence.output_norm.weight` is [12], expected [16]",
    ),
    "parameters of another spec": (
        lambda push: Tensors(of_another_spec(push).parameters() | push.probe()),
        "`recurrence.output_norm.weight` is [12], expected [16]",
    ),
    "in bf16": (lambda push: learner(1).push("bf16"), " is bfloat16, expected float32"),
    "no probe": (lambda push: push.parameters(), "a probe has `probe.observation`"),
    "few rows": (
        lambda push: push.of_rows(slice(31), slice(4)),
        "the probe has 31 rows of 4 steps; it takes at least 32 of 4, and 1024 in all at most",
    ),
    "few steps": (
        lambda push: push.of_rows(slice(32), slice(3)),
        "the probe has 32 rows of 3 steps",
    ),
    "too many": (
        lambda push: Tensors(
            push.parameters()
            | {
                name: torch.cat([tensor] * 9, dim=0 if name.endswith("_in") else 1)
                for name, tensor in push.probe().items()
            }
        ),
        "the probe has 288 rows of 4 steps",
    ),
    "no output": (
        lambda push: push.changed(probe__state_c_out=None),
        "`probe.state_c_out` is missing",
    ),
    "no input": (lambda push: push.changed(probe__noise=None), "`probe.noise` is missing"),
    "an output more": (
        lambda push: push.changed(probe__q_value=torch.zeros(4, 32)),
        "`probe.q_value` is nothing this policy takes or gives",
    ),
    "an output of another dtype": (
        lambda push: push.changed(probe__action=push["probe.action"].float()),
        "`probe.action` is float32 [4, 32, 8], expected int64 [4, 32, 8]",
    ),
    "states of every step": (
        lambda push: push.changed(probe__state_h_in=push["probe.state_h_out"]),
        "`probe.state_h_in` is float32 [4, 32, 1, 16], expected float32 [32, 1, 16]",
    ),
    "an observation that is no number": (
        lambda push: push.with_number("probe.observation", (2, 5, 1), float("nan")),
        "step 2 of the probe: `observation[5]",
    ),
    "a state that is no number": (
        lambda push: push.with_number("probe.state_c_in", (7, 0, 1), float("inf")),
        "`probe.state_c_in[7]",
    ),
    "an expected value that is no number": (
        lambda push: push.with_number("probe.value", (3, 31), float("nan")),
        "`probe.value[3][31]` is nan, and with these parameters the step gives ",
    ),
    "expected values that allow any": (
        lambda push: push.changed(
            **{
                name.replace(".", "__"): torch.full_like(tensor, float("inf"))
                for name, tensor in push.probe().items()
                if tensor.is_floating_point() and name.endswith(("_out", "log_prob", "value"))
            }
        ),
        " is inf, and with these parameters the step gives ",
    ),
    "an expected value that is off": (
        lambda push: push.with_number(
            "probe.value", (1, 9), float(push["probe.value"][1, 9]) + 1e-3
        ),
        "`probe.value[1][9]` is ",
    ),
    "another action": (
        lambda push: push.with_number(
            "probe.action", (3, 30, 7), (int(push["probe.action"][3, 30, 7]) + 1) % 6
        ),
        "`probe.action[3][30][7]` is ",
    ),
    "nothing allowed": (
        lambda push: push.changed(probe__action_mask=torch.zeros(4, 32, V1.num_choices).bool()),
        "step 0 of the probe: ",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told_in_its_own_sentence(v1: Served, wrong: str) -> None:
    make, sentence = WRONG[wrong]
    check_refused(v1, make(v1.right).written(), 422, sentence)


@pytest.mark.parametrize("number", [13, -2, 2**40])
def test_a_blueprint_that_there_is_none_of_is_not_looked_up(v2: Served, number: int) -> None:
    push = v2.right.with_number("probe.blueprint_index", (1, 3, 0), number)
    sentence = "step 1 of the probe: `blueprint_index[3][0]` is not -1 (none) or one of"
    check_refused(v2, push.written(), 422, sentence)


def test_embeddings_of_another_policy_are_found_out(v2: Served) -> None:
    other = learner(2, V2).push()["features.blueprints"]
    push = v2.right.changed(features__blueprints=other)
    check_refused(v2, push.written(), 422, OF_OTHERS)


@needs_bf16
@pytest.mark.parametrize("wrong", ["in fp32", "other weights", "no number", "forgotten normaliser"])
def test_a_server_of_bf16_takes_no_other_parameters(bf16: Served, wrong: str) -> None:
    one = bf16.right
    push, sentence = {
        "in fp32": (learner(1).push("fp32"), " is float32, expected bfloat16"),
        "other weights": (Tensors(one.parameters() | learner(2).push("bf16").probe()), OF_OTHERS),
        "no number": (
            one.with_number("features.linear.weight", (1, 2), float("inf")),
            "`features.linear.weight[1][2]` is NaN or infinite",
        ),
        "forgotten normaliser": (without_statistics(one), OF_OTHERS),
    }[wrong]
    check_refused(bf16, push.written(), 422, sentence)


class Payload:
    """Unpickling it would leave a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


NO_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda body: b"", "the body has 0 bytes"),
    "cut in the header": (lambda body: body[:100], "the header has "),
    "cut in the data": (lambda body: body[:-1], " ends after the data"),
    "a byte more": (lambda body: body + b"\0", "the tensors end at byte "),
    "a pickle": (lambda body: pickle.dumps(Payload()), "the header has "),
    "a gzip": (gzip.compress, "the header has "),
    "JSON": (lambda body: b'{"weights": []}', "the header has "),
}


@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_of_tensors_is_malformed(v1: Served, what: str) -> None:
    make, sentence = NO_FILES[what]
    check_refused(v1, make(v1.right.written()), 400, sentence)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "sentence"),
    [
        ("PUT", "/policy/weights", {"Content-Encoding": "gzip"}, 415, "Content-Encoding is 'gzip'"),
        ("PUT", "/policy/weights", {"Content-Type": "application/json"}, 415, "content type is"),
        ("PUT", "/policy/weights", {"If-Match": '"sha256:1"'}, 412, " serves, not sha256:1"),
        ("PUT", "/policy/weights?session=keep", {}, 400, "`session` is no parameter"),
        ("PUT", "/policy/weights?sessions=all", {}, 400, "`sessions` is 'all'"),
        ("POST", "/policy/weights", {}, 405, "POST /policy/weights: Method Not Allowed"),
        ("GET", "/policy/rollback", {}, 405, "GET /policy/rollback: Method Not Allowed"),
        ("PUT", "/policy/versions", {}, 405, "PUT /policy/versions: Method Not Allowed"),
        ("POST", "/policy/rollback", {"If-Match": "sha256:1"}, 412, " serves, not sha256:1"),
        ("POST", "/policy/rollback", {}, 409, "there is no version before this one"),
    ],
)
def test_a_right_body_on_another_way_is_refused(
    v1: Served, method: str, path: str, headers: dict[str, str], status: int, sentence: str
) -> None:
    before = Before(v1)
    headers = {"Content-Type": SAFETENSORS} | headers
    content = v1.right.written() if path.startswith("/policy/weights") else b""
    answer = httpx.request(
        method, v1.url + path, content=content, headers=headers, timeout=TIMEOUT_S
    )
    assert answer.status_code == status, answer.text
    assert sentence in answer.json()["error"]
    before.check()


def connected(served: Served) -> socket.socket:
    return socket.create_connection(served.server.host_and_port, timeout=TIMEOUT_S)


def head(*headers: str) -> bytes:
    lines = ["PUT /policy/weights HTTP/1.1", "Host: test", f"Content-Type: {SAFETENSORS}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def status_of(connection: socket.socket) -> int:
    answer = connection.recv(65_536)
    return int(answer.split(b" ", 2)[1])


def test_a_length_beyond_the_largest_push_is_refused_before_the_body_comes(v1: Served) -> None:
    before = Before(v1)
    with connected(v1) as connection:
        connection.sendall(head("Content-Length: 2000000000"))
        assert status_of(connection) == 413
    before.check()


def test_a_body_without_end_is_refused_and_then_not_read_on(v1: Served) -> None:
    before = Before(v1)
    largest = httpx.get(f"{v1.url}/policy").json()["limits"]["max_weights_bytes"]
    with connected(v1) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        sent = sent_until(connection, lambda: bool(select.select([connection], [], [], 0)[0]))
        assert status_of(connection) == 413
        assert sent < largest + BUFFERED
        with pytest.raises(ConnectionError):
            sent_until(connection, lambda: False)
    before.check()


def sent_until(connection: socket.socket, is_enough: Callable[[], bool]) -> int:
    """How many bytes were sent: of a body that would be as long as 10 times what is read on."""
    for number in range(10 * LINGER_BYTES // len(CHUNK)):
        if is_enough():
            return number * len(CHUNK)
        connection.sendall(b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK))
    raise AssertionError("it was all read")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_connection_cut_in_the_middle_of_the_body_changes_nothing(
    v1: Served, share: float
) -> None:
    before, body = Before(v1), v1.right.written()
    with connected(v1) as connection:
        connection.sendall(head(f"Content-Length: {len(body)}"))
        connection.sendall(body[: int(share * len(body))])
    before.check()
    # And the next push is not told that another is being checked.
    check_refused(v1, v1.right.changed(value_scale=None).written(), 422, "is missing")


def test_no_more_bodies_are_read_at_once_than_there_is_memory_for(v1: Served) -> None:
    """Nor is a push in anybody's way whose body does not come."""
    body = learner(5).push().written()
    with ExitStack() as stack:
        slow = [stack.enter_context(connected(v1)) for _ in range(MOST_BODIES + 1)]
        for connection in slow:
            connection.sendall(head(f"Content-Length: {len(body)}") + body[:1000])
        refused = select.select(slow, [], [], TIMEOUT_S)[0]
        assert [status_of(connection) for connection in refused] == [409]
        (connection, *_) = [each for each in slow if each not in refused]
        connection.sendall(body[1000:])
        assert status_of(connection) == 200
    put(v1.url, learner(0).push().written()).raise_for_status()


def test_a_name_that_is_no_parameter_s_is_shown_on_one_line_as_far_as_it_matters(
    v1: Served,
) -> None:
    push = learner(1).push()
    name = "x\n2026-01-01 00:00:00 INFO service: pushed " + "y" * 5000
    answer = put(v1.url, Tensors(push | {name: push["value_scale"].clone()}).written())
    assert answer.status_code == 422
    sentence = answer.json()["error"]
    assert "\n" not in sentence
    assert len(sentence) < 200
    assert "\n2026-01-01 00:00:00" not in v1.server.log()
