"""Several servers: the session's name says which, and what happens when that one is gone."""

from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest

from model.spec import PolicySpec
from tamiyo_client import PolicyClient, SessionLost, Unavailable, Unreachable, VectorPolicyClient
from tamiyo_client.exchange import Broken, Patience, Wait
from tamiyo_client.session import Session, by_preference
from tests.running_server import RunningServer, running_server

URLS = [f"http://server-{at}:8000" for at in range(5)]
NAMES = [f"env-{at}" for at in range(2000)]


def test_sessions_spread_over_the_servers_whatever_order_those_are_named_in() -> None:
    homes = Counter(by_preference(URLS, name)[0] for name in NAMES)
    assert set(homes) == set(URLS)
    assert max(homes.values()) < 1.2 * len(NAMES) / len(URLS)
    for name in NAMES[:50]:
        assert by_preference(URLS, name) == by_preference(URLS[::-1], name)


def test_only_the_sessions_of_a_server_that_is_gone_move() -> None:
    for name in NAMES[:500]:
        before, after = by_preference(URLS, name), by_preference(URLS[1:], name)
        assert after == [url for url in before if url != URLS[0]]


def test_no_server_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no URL"):
        VectorPolicyClient([], 2)


@pytest.mark.parametrize("failover", [False, True])
def test_all_servers_together_have_the_time_of_one_call(failover: bool) -> None:
    now_s = [0.0]
    session = Session(
        URLS,
        2,
        name=None,
        api_key=None,
        patience=Patience(timeout_s=10.0, clock=lambda: now_s[0]),
        failover=failover,
    )
    was_in = session.url, session.run
    call = session.act({}, np.ones(2, np.bool_), seed=None, deterministic=False)
    asked = set()

    def drive() -> None:
        outcome = None
        while True:
            effect = call.send(outcome)
            if isinstance(effect, Wait):
                now_s[0], outcome = now_s[0] + effect.seconds, None
            else:
                now_s[0], outcome = now_s[0] + effect.timeout_s, Broken(TimeoutError())
                asked.add(effect.url)

    with pytest.raises(Unreachable):
        drive()
    assert 7.0 < now_s[0] < 11.0
    assert asked == {f"{url}/act" for url in (URLS if failover else [session.url])}
    assert (session.url, session.run) == was_in  # the same call again begins where it did


def test_a_caller_that_allows_it_begins_anew_elsewhere(
    artifact: Path, server: RunningServer, spec: PolicySpec
) -> None:
    shown = np.ones((2, spec.observation_dim), np.float32)
    with running_server(artifact) as home:
        name = next(
            name
            for name in NAMES
            if by_preference([server.address, home.address], name)[0] == home.address
        )
        urls = [server.address, home.address]
        client = VectorPolicyClient(
            urls, 2, session_id=name, seed=4, failover=True, timeout_s=4.0, retries=3
        )
        first = client.act(shown)
        second = client.act(shown)
        assert client.url == home.address
    moved = client.act(shown)
    assert client.url == server.address
    assert (moved.step, moved.episode_start.tolist()) == (0, [True, True])
    assert np.array_equal(moved.log_probs, first.log_probs)
    assert not np.array_equal(second.log_probs, first.log_probs)
    assert client.act(shown).step == 1
    client.close()


def test_a_lone_environment_takes_its_seed_along(
    artifact: Path, server: RunningServer, spec: PolicySpec
) -> None:
    shown = np.ones(spec.observation_dim, np.float32)
    with PolicyClient(server.address) as client:
        expected = client.act(shown, seed=7).log_probs
    with running_server(artifact) as home:
        urls = [server.address, home.address]
        name = next(name for name in NAMES if by_preference(urls, name)[0] == home.address)
        client = PolicyClient(urls, session_id=name, failover=True, timeout_s=4.0, retries=3)
        client.act(shown, seed=7)
        client.act(shown, seed=7)
    moved = client.act(shown, seed=7)
    assert moved.episode_start
    assert np.array_equal(moved.log_probs, expected)
    client.close()


def test_one_that_does_not_is_told(artifact: Path, spec: PolicySpec) -> None:
    shown = np.ones((2, spec.observation_dim), np.float32)
    with running_server(artifact) as home:
        client = VectorPolicyClient([home.address], 2, timeout_s=2.0, retries=1)
        client.act(shown)
        port = home.host_and_port[1]
    with pytest.raises(Unavailable):
        client.act(shown)
    with running_server(artifact, "--port", str(port)):
        with pytest.raises(SessionLost, match="start a new episode"):
            client.act(shown)
        client.restart()
        assert client.act(shown).step == 0
        client.close()


def test_closing_ends_the_session_and_needs_no_server(artifact: Path, spec: PolicySpec) -> None:
    shown = np.ones((2, spec.observation_dim), np.float32)
    with running_server(artifact) as home:
        with VectorPolicyClient(home.address, 2, session_id="a/b c?é#") as client:
            client.act(shown)
            assert "tamiyo_sessions 2.0" in httpx.get(f"{home.address}/metrics").text
        assert "tamiyo_sessions 0.0" in httpx.get(f"{home.address}/metrics").text
        later = VectorPolicyClient(home.address, 2, timeout_s=2.0)
        later.act(shown)
    later.close()
