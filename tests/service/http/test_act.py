"""`POST /act` from headers to answer, whatever its body is in: sessions, limits, failures."""

import json
from collections.abc import AsyncIterator

import pytest

from model.spec import PolicySpec
from tests.service.conftest import MakeClient
from tests.service.fakes import POISON, AppClient, SummingRuntime
from tests.service.http.bodies import Json, body, error_of, raw


def test_an_unknown_session_is_404_and_a_lost_one_410(client: AppClient, spec: PolicySpec) -> None:
    unknown = error_of(client.act(body(spec, session_id="x")), 404, "unknown_session")
    assert "'x'" in unknown
    assert "episode_start" in unknown
    lost = error_of(client.act(body(spec, session_id="x", step=4)), 410, "session_lost")
    assert "'x'" in lost


def test_an_evicted_session_is_410(make_client: MakeClient, spec: PolicySpec) -> None:
    client = make_client(max_sessions=1)
    for session in ("first", "second"):
        assert client.act(body(spec, session_id=session, episode_start=True)).status_code == 200
    error_of(client.act(body(spec, session_id="first")), 410, "session_lost")
    assert client.act(body(spec, session_id="second")).status_code == 200


@pytest.mark.parametrize(
    "fields", [{"step": 0}, {"step": 5}, {"step": 2, "seed": 1}, {"step": 2, "episode": "8"}]
)
def test_a_step_out_of_turn_is_409_and_says_which_is_next(
    client: AppClient, spec: PolicySpec, fields: Json
) -> None:
    client.act(body(spec, 1, session_id="a", episode="7", episode_start=True, seed=5))
    client.act(body(spec, 2, session_id="a", step=1))
    sentence = error_of(client.act(body(spec, 9, session_id="a", **fields)), 409, "step_conflict")
    assert "next step is 2" in sentence


def test_a_retry_is_byte_for_byte_the_answer_and_says_that_it_is_one(
    client: AppClient, spec: PolicySpec
) -> None:
    start = body(spec, 0.1, session_id="a", episode="7", step=0, episode_start=True)
    step = body(spec, 0.2, session_id="a", episode="7", step=1)
    for request in (start, step):
        first = client.act(request)
        assert first.status_code == 200
        assert "replayed" not in first.headers
        for _ in range(2):
            again = client.act(request)
            assert again.status_code == 200
            assert again.headers["Replayed"] == "true"
            assert again.content == first.content


def test_a_retry_that_overtakes_its_answer_waits_for_it(
    client: AppClient, runtime: SummingRuntime, spec: PolicySpec
) -> None:
    client.act(body(spec, 1, session_id="a", episode_start=True))
    runtime.batch_sizes.clear()
    answers = client.act_at_once([body(spec, 10, session_id="a", step=1)] * 3)
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert len({answer.content for answer in answers}) == 1
    assert [answer.headers.get("replayed") for answer in answers] == [None, "true", "true"]
    assert runtime.batch_sizes == [1]


def test_requests_of_one_session_without_a_step_run_in_the_order_of_arrival(
    client: AppClient, spec: PolicySpec
) -> None:
    client.act(body(spec, 0, session_id="a", episode_start=True))
    answers = client.act_at_once([body(spec, 10.0**n, session_id="a") for n in range(5)])
    assert [answer.json()["value"] for answer in answers] == [1, 11, 111, 1111, 11111]
    assert [answer.json()["step"] for answer in answers] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("max_batch_size", [1, 8])
def test_a_start_never_takes_the_place_of_a_session_whose_step_waits(
    make_client: MakeClient, spec: PolicySpec, max_batch_size: int
) -> None:
    client = make_client(max_sessions=1, max_batch_size=max_batch_size)
    client.act(body(spec, 1, session_id="a", episode="7", episode_start=True))
    rival, step = client.act_at_once(
        [body(spec, 1, session_id="b", episode_start=True), body(spec, 10, session_id="a", step=1)]
    )
    error_of(rival, 429, "overloaded")
    assert step.json()["value"] == 11
    again = client.act(body(spec, 100, session_id="a", episode="7", step=2))
    assert again.json()["value"] == 111


def test_one_bad_request_in_a_crowd_harms_nobody(client: AppClient, spec: PolicySpec) -> None:
    poison = body(spec)
    poison["observation"][-1] = POISON
    crowd = [
        body(spec, 1),
        raw(spec, "NaN"),
        body(spec, 2),
        b"{",
        body(spec, 3, session_id="nobody"),
        poison,
        body(spec, 4, action_mask={"op": [False] * 6}),
        body(spec, 5),
    ]
    answers = client.act_at_once(crowd)
    assert [answer.status_code for answer in answers] == [200, 422, 200, 400, 404, 422, 422, 200]
    assert [answers[at].json()["value"] for at in (0, 2, 7)] == [1, 2, 5]


def test_an_output_that_is_not_finite_is_422_and_the_session_goes_on(
    client: AppClient, spec: PolicySpec
) -> None:
    client.act(body(spec, 1, session_id="a", episode_start=True))
    poison = body(spec, 10, session_id="a", step=1)
    poison["observation"][-1] = POISON
    assert "has not moved" in error_of(client.act(poison), 422, "invalid")
    assert client.act(body(spec, 10, session_id="a", step=1)).json()["value"] == 11


def test_a_request_whose_time_is_up_is_504_and_has_not_moved_its_session(
    client: AppClient, runtime: SummingRuntime, spec: PolicySpec
) -> None:
    client.act(body(spec, 1, session_id="a", episode_start=True))
    runtime.batch_sizes.clear()
    late = body(spec, 10, session_id="a", step=1, timeout_ms=1e-9)
    error_of(client.act(late), 504, "deadline_exceeded")
    assert runtime.batch_sizes == []
    assert client.act(late | {"timeout_ms": 5000}).json()["value"] == 11


def test_a_request_that_names_no_timeout_gets_the_server_s(
    make_client: MakeClient, spec: PolicySpec
) -> None:
    client = make_client(timeout_ms=1e-9)
    error_of(client.act(body(spec)), 504, "deadline_exceeded")
    assert client.act(body(spec, timeout_ms=5000)).status_code == 200


def test_more_requests_than_may_wait_are_429_with_retry_after(
    make_client: MakeClient, spec: PolicySpec
) -> None:
    client = make_client(max_waiting=2)
    answers = client.act_at_once([body(spec, n) for n in range(10)])
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < 10
    for answer in refused:
        error_of(answer, 429, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1
    assert client.act(body(spec)).status_code == 200


def test_a_failing_policy_is_500_with_a_fixed_text_and_sessions_stay_as_they_were(
    client: AppClient,
    runtime: SummingRuntime,
    spec: PolicySpec,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client.act(body(spec, 1, session_id="a", episode_start=True))
    runtime.failure = RuntimeError("secret path /etc/model")
    step = body(spec, 10, session_id="a", step=1)
    assert error_of(client.act(step), 500, "internal") == "internal error"
    assert "secret path" in caplog.text
    runtime.failure = None
    assert client.act(step).json()["value"] == 11


def test_a_body_as_large_as_allowed_is_read(make_client: MakeClient, spec: PolicySpec) -> None:
    client = make_client(max_body_bytes=2000)
    content = json.dumps(body(spec)).encode()
    assert client.act(content + b" " * (2000 - len(content))).status_code == 200
    error_of(client.act(content + b" " * (2001 - len(content))), 413, "too_large")


def test_a_body_too_large_is_413_before_it_is_parsed(client: AppClient) -> None:
    limit = client.served.settings.max_body_bytes
    assert str(limit) in error_of(client.act(b"{" * (limit + 1)), 413, "too_large")


def test_a_body_of_unknown_length_is_read_no_further_than_the_limit(
    make_client: MakeClient,
) -> None:
    client = make_client(max_body_bytes=2000)
    num_read = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_read
        for _ in range(100):
            num_read += 1
            yield b"x" * 1000

    response = client.request(
        "POST", "/act", content=chunks(), headers={"Content-Type": "application/json"}
    )
    error_of(response, 413, "too_large")
    assert num_read <= 4


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/jsonp", "application/x-www-form-urlencoded", ""]
)
def test_another_content_type_is_415(
    client: AppClient, spec: PolicySpec, content_type: str
) -> None:
    response = client.request(
        "POST",
        "/act",
        content=json.dumps(body(spec)),
        headers={"Content-Type": content_type},
    )
    assert "application/json" in error_of(response, 415, "unsupported_content_type")


def test_no_content_type_is_415(client: AppClient, spec: PolicySpec) -> None:
    response = client.request("POST", "/act", content=json.dumps(body(spec)))
    error_of(response, 415, "unsupported_content_type")


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"]
)
def test_json_may_be_declared_with_parameters_and_in_any_case(
    client: AppClient, spec: PolicySpec, content_type: str
) -> None:
    response = client.request(
        "POST", "/act", content=json.dumps(body(spec)), headers={"Content-Type": content_type}
    )
    assert response.status_code == 200


REFUSED: dict[str, Json] = {
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
