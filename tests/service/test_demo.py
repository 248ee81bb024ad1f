"""The demo plays by the rules, and says so when the other side does not."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from export.exporter import export_policy
from export.manifest import Source
from model.spec import PolicySpec
from service.demo.environment import EPISODE_LENGTH, GERMINATE, WAIT, GrowingNetwork
from tests.random_inputs import random_policy
from tests.running_server import running_server

TIMEOUT_S = 60
V1 = PolicySpec.tamiyo_v1(feature_dim=12, hidden_dim=10)
SMALL = ("--envs", "5", "--steps", "30", "--json")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service.demo", *arguments]


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_legal_action_leads_to_a_situation_with_legal_actions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = GrowingNetwork(V1, rng)
    while not network.is_over:
        masks = network.masks()
        assert all(any(mask) for mask in masks.values())
        assert masks["op"][WAIT]
        observation = np.array(network.observe())
        assert observation.shape == (V1.observation_dim,)
        assert np.isfinite(observation).all()
        action = {
            head.name: int(rng.choice(np.flatnonzero(masks.get(head.name, [True] * head.size))))
            for head in V1.heads
        }
        network.apply(action)
    assert network.epoch == EPISODE_LENGTH


def test_full_network_allows_no_germination() -> None:
    network = GrowingNetwork(V1, np.random.default_rng(0))
    action = {"op": GERMINATE, "blueprint": 1, "tempo": 0, "alpha_target": 2}
    for slot in range(3):
        assert network.masks()["op"][GERMINATE]
        network.apply(action | {"slot": slot})
    assert not network.masks()["op"][GERMINATE]


def test_demo_plays_against_a_real_server_and_finds_every_answer_legal(tmp_path: Path) -> None:
    source = Source(kind="preset", name="v1", seed=0)
    export_policy(
        random_policy(V1),
        None,
        tmp_path / "v1",
        name="v1",
        source=source,
        formats=("torchscript",),
        max_batch_size=8,
    )
    with running_server(tmp_path / "v1") as server:
        done = demo("--url", server.address, *SMALL)
        again = demo("--url", server.address, *SMALL)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["actions"] == sum(summary["ops"].values()) == 150
    assert summary["episodes"] == 5
    assert (summary["errors"], summary["broken_masks"]) == ({}, [])
    assert 30 <= sum(summary["batches_by_size"].values()) <= 150
    assert json.loads(again.stdout)["ops"].keys() == summary["ops"].keys()


async def demo_against(status: int, op: int) -> tuple[int, dict[str, object]]:
    """The demo's exit code and figures against a server that gives every request one answer."""

    async def policy(request: web.Request) -> web.Response:
        return web.json_response({"spec": V1.model_dump(mode="json")})

    async def act(request: web.Request) -> web.Response:
        if status != 200:
            return web.json_response({"error": "no", "error_type": "internal"}, status=status)
        action = {head.name: 2 for head in V1.heads} | {"op": op}
        return web.json_response({"action": action})

    async def nothing(request: web.Request) -> web.Response:
        return web.Response(text="")

    app = web.Application()
    app.router.add_get("/policy", policy)
    app.router.add_get("/metrics", nothing)
    app.router.add_post("/act", act)
    app.router.add_delete("/sessions/{name}", nothing)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        process = await asyncio.create_subprocess_exec(
            *command("--url", f"http://127.0.0.1:{runner.addresses[0][1]}", *SMALL),
            stdout=subprocess.PIPE,
        )
        printed, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    finally:
        await runner.cleanup()
    assert process.returncode is not None
    return process.returncode, json.loads(printed)


def test_an_answer_that_breaks_a_mask_is_named_and_fails_the_demo() -> None:
    code, summary = asyncio.run(demo_against(200, op=4))  # FOSSILIZE, with no seed in HOLDING
    assert code == 1
    broken = summary["broken_masks"]
    assert isinstance(broken, list)
    assert all("op 4" in line for line in broken)
    assert broken


def test_legal_answers_alone_do_not_fail_it() -> None:
    code, summary = asyncio.run(demo_against(200, op=WAIT))
    assert (code, summary["broken_masks"]) == (0, [])


def test_failed_requests_are_counted_by_kind_and_fail_the_demo() -> None:
    code, summary = asyncio.run(demo_against(500, op=WAIT))
    assert code == 1
    assert summary["errors"] == {"500 internal": 150}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--url", "http://127.0.0.1:9"], "does not answer"),
        (["--envs", "0"], "is not a positive number"),
        (["--steps", "many"], "is not a positive number"),
    ],
)
def test_bad_arguments_are_exit_code_two_and_a_sentence(arguments: list[str], says: str) -> None:
    done = demo(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_policy_the_demo_cannot_play_is_refused_in_a_sentence(artifact: Path) -> None:
    with running_server(artifact) as server:
        done = demo("--url", server.address)
    assert done.returncode == 2
    assert "the demo plays Tamiyo V1" in done.stderr
