"""Servers that take their time, calls that are broken off, and processes that fork."""

import asyncio
import gc
import multiprocessing
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from socket import create_server, socket
from typing import Any

import httpcore
import numpy as np
import pytest

from model.spec import PolicySpec
from tamiyo_client import AsyncVectorPolicyClient, Unreachable, VectorPolicyClient
from tamiyo_client.transport import _Bounded
from tests.random_inputs import random_observations
from tests.running_server import RunningServer

NUM_ROWS = 3
TIMEOUT_S = 1.0


@contextmanager
def dripping(answer: bytes) -> Iterator[str]:
    """A server that answers a byte each tenth of a second.

    Its answers take minutes: whose call has ended has not waited for one.
    """
    is_over, has_answered = threading.Event(), threading.Event()

    def drip(connection: socket) -> None:
        with connection:
            try:
                for at in range(len(answer)):
                    connection.sendall(answer[at : at + 1])
                    if is_over.wait(0.1):
                        return
            except OSError:
                return
            has_answered.set()

    def accept() -> None:
        while not is_over.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            threading.Thread(target=drip, args=(connection,), daemon=True).start()

    with create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            assert not has_answered.is_set()
        finally:
            is_over.set()
            thread.join(10)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nX-Long: ", b"HTTP/1.1 200 OK\r\nContent-Length: 1200\r\n\r\n"]
)
def test_a_call_ends_in_time_however_slowly_the_answer_comes(head: bytes, is_async: bool) -> None:
    shown = np.zeros((NUM_ROWS, 4), np.float32)
    with dripping(head + b"a" * 1200) as url:
        act = VectorPolicyClient(url, NUM_ROWS, timeout_s=TIMEOUT_S).act
        act_async = AsyncVectorPolicyClient(url, NUM_ROWS, timeout_s=TIMEOUT_S).act
        with pytest.raises(Unreachable):
            asyncio.run(act_async(shown)) if is_async else act(shown)


def test_a_connection_for_which_no_time_is_left_is_not_tried() -> None:
    with create_server(("127.0.0.1", 0)) as server:
        backend = _Bounded(httpcore.SyncBackend(), left_s=lambda: -0.001)
        with pytest.raises(httpcore.ConnectTimeout, match="no time is left to connect to 127"):
            backend.connect_tcp(*server.getsockname())


def test_so_does_one_that_fails_over() -> None:
    shown = np.zeros((NUM_ROWS, 4), np.float32)
    answer = b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 1200
    with dripping(answer) as one, dripping(answer) as other:
        client = VectorPolicyClient([one, other], NUM_ROWS, failover=True, timeout_s=TIMEOUT_S)
        with pytest.raises(Unreachable):
            client.act(shown)


@pytest.mark.parametrize("is_first", [False, True])
def test_a_cancelled_call_may_be_made_again(
    server: RunningServer, spec: PolicySpec, is_first: bool
) -> None:
    """And gives what it would have given, wherever it was cancelled."""
    shown, later = random_observations(spec, np.random.default_rng(3), 2, NUM_ROWS)
    with VectorPolicyClient(server.address, NUM_ROWS, seed=8) as client:
        first, second = (client.act(each).log_probs.tobytes() for each in (shown, later))

    async def cancelled_after(num_turns: int) -> bytes:
        async with AsyncVectorPolicyClient(server.address, NUM_ROWS, seed=8, timeout_s=5) as client:
            if not is_first:
                await client.act(shown)
            asked = shown if is_first else later
            call = asyncio.create_task(client.act(asked))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            act = await client.act(asked) if call.cancelled() else call.result()
            return act.log_probs.tobytes()

    told = {asyncio.run(cancelled_after(num_turns)) for num_turns in range(25)}
    assert told == {first if is_first else second}


def test_an_interrupted_call_may_be_made_again(server: RunningServer, spec: PolicySpec) -> None:
    shown = np.ones((NUM_ROWS, spec.observation_dim), np.float32)
    with VectorPolicyClient(server.address, NUM_ROWS, seed=8) as client:
        expected = client.act(shown).log_probs.tobytes()

    with VectorPolicyClient(server.address, NUM_ROWS, seed=8) as client:
        client._transport._pool._connections = Interrupting()
        with pytest.raises(KeyboardInterrupt):
            client.act(shown)
        assert client.act(shown).log_probs.tobytes() == expected


class Interrupting(list[Any]):
    """Where httpcore looks for its connection: there a signal's handler may raise."""

    def __iter__(self) -> Iterator[Any]:
        raise KeyboardInterrupt


def in_child(client: VectorPolicyClient, shown: Any, told: Any) -> None:
    try:
        client.act(shown)
    except RuntimeError as error:
        told.put(str(error))


def closing_in_child(client: VectorPolicyClient, told: Any) -> None:
    try:
        with client:
            raise KeyError("its own")
    except KeyError as error:
        told.put(str(error))


def test_a_forked_process_that_closes_harms_nobody(server: RunningServer, spec: PolicySpec) -> None:
    shown = np.ones((NUM_ROWS, spec.observation_dim), np.float32)
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()
    with VectorPolicyClient(server.address, NUM_ROWS) as client:
        client.act(shown)
        child = fork.Process(target=closing_in_child, args=(client, told))
        child.start()
        child.join(30)
        assert "its own" in told.get()
        assert client.act(shown).step == 1


def test_an_async_client_goes_on_in_another_loop(server: RunningServer, spec: PolicySpec) -> None:
    shown = np.ones((NUM_ROWS, spec.observation_dim), np.float32)
    client = AsyncVectorPolicyClient(server.address, NUM_ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the first loop left its connection open
        assert [asyncio.run(client.act(shown)).step for _ in range(3)] == [0, 1, 2]
        asyncio.run(client.close())
        gc.collect()


def test_a_forked_process_has_to_make_its_own(server: RunningServer, spec: PolicySpec) -> None:
    shown = np.ones((NUM_ROWS, spec.observation_dim), np.float32)
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()
    with VectorPolicyClient(server.address, NUM_ROWS) as client:
        client.act(shown)
        child = fork.Process(target=in_child, args=(client, shown, told))
        child.start()
        child.join(30)
        assert "of the process that made it" in told.get()
        assert client.act(shown).step == 1


@pytest.mark.parametrize(
    "url",
    [*("127.0.0.1:8000", "ftp://127.0.0.1", "http://", ""), "http://a:99999", "http://[::1"],
)
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="is no server's URL"):
        VectorPolicyClient(url, 2)


@pytest.mark.parametrize("name", ["a\nb", " a", ""])
def test_what_no_header_can_hold_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match="printable"):
        VectorPolicyClient("http://127.0.0.1:1", 2, session_id=name)
    with pytest.raises(ValueError, match="printable"):
        VectorPolicyClient("http://127.0.0.1:1", 2, api_key=name)
