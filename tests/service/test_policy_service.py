"""What joins codec, sessions, engine and batcher: nothing is left behind by a request."""

import asyncio
import threading
from typing import Any

import pytest

from model.spec import PolicySpec
from tests.service.conftest import MakeClient
from tests.service.fakes import POISON, AppClient, SummingRuntime
from tests.service.http.test_act import body

REFUSED: dict[str, dict[str, Any]] = {
    "a conflict": {"step": 7},
    "out of time": {"timeout_ms": 1e-6},
    "not finite": {"is_poison": True},
    "of another episode": {"episode": "none of its"},
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_session_whose_request_was_refused_can_be_given_up_again(
    make_client: MakeClient, spec: PolicySpec, why: str
) -> None:
    client = make_client(max_sessions=1)
    client.act(body(spec, session_id="a", episode_start=True))
    request = body(spec, session_id="a", **REFUSED[why])
    if request.pop("is_poison", False):
        request["observation"][-1] = POISON
    assert client.act(request).status_code in (409, 422, 504)
    assert client.act(body(spec, session_id="b", episode_start=True)).status_code == 200


def test_a_session_whose_request_found_no_room_can_be_given_up_again(
    make_client: MakeClient, spec: PolicySpec
) -> None:
    client = make_client(max_sessions=1, max_waiting=1)
    client.act(body(spec, session_id="a", episode_start=True))
    answers = client.act_at_once([body(spec), body(spec, session_id="a")])
    assert sorted(answer.status_code for answer in answers) == [200, 429]
    assert client.act(body(spec, session_id="b", episode_start=True)).status_code == 200


def test_every_unseeded_episode_has_noise_of_its_own(client: AppClient, spec: PolicySpec) -> None:
    start = body(spec, session_id="a", episode_start=True)
    noise = [tuple(client.act(start).json()["log_prob"].values()) for _ in range(4)]
    assert len(set(noise)) == 4


def test_a_warm_up_that_ends_after_the_server_s_end_is_no_error(
    make_client: MakeClient, runtime: SummingRuntime
) -> None:
    client = make_client(is_warm=False)
    runtime.gate = threading.Event()
    errors: list[Any] = []

    async def stop_while_warming() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, error: errors.append(error))
        client.service.start()
        await client.service.stop()
        assert client.service.is_warming()
        assert runtime.gate is not None
        runtime.gate.set()
        while client.service.is_warming():
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    client.run(stop_while_warming())
    assert errors == []
    assert len(runtime.batch_sizes) == 1, "the step that ran, and no other"
