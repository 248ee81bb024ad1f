"""A server of before policies said what they carry: everyone it can have carries h and c."""

import json

import numpy as np
from safetensors.numpy import load

from tamiyo_client.calls import VectorCalls
from tamiyo_client.exchange import Patience, Reply, Send

NUM_ROWS = 2


def test_two_states_are_its_h_and_c() -> None:
    calls = VectorCalls(
        "http://older:8000",
        NUM_ROWS,
        autoreset="next_step",
        session_id=None,
        api_key=None,
        seed=None,
        patience=Patience(),
        failover=False,
    )
    ones = np.ones((NUM_ROWS, 1, 4), np.float32)
    shown = np.zeros((NUM_ROWS, 3))
    call = calls.act_from((ones, 0 * ones), shown, None, step=1, deterministic=False, seeds=None)
    asked = next(call)
    assert isinstance(asked, Send)
    assert (asked.method, asked.url) == ("GET", "http://older:8000/policy")
    acted = call.send(Reply(200, {}, json.dumps({"policy_version": "sha256:0"}).encode()))
    call.close()
    assert isinstance(acted, Send)
    sent = load(bytes(acted.body))
    assert {"state_h", "state_c"} <= sent.keys()
    assert (sent["state_h"] == 1).all()
    assert (sent["state_c"] == 0).all()
