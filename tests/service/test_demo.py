"""The demo plays by the rules, and says so when the other side does not."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from safetensors.numpy import load, save

from export.exporter import export_policy
from model.lifecycle import (
    ADVANCE,
    BLENDING,
    FOSSILIZE,
    FOSSILIZED,
    GERMINATE,
    GERMINATED,
    HOLDING,
    PRUNE,
    TRAINING,
    WAIT,
)
from model.sb3.spec import SB3Spec
from model.spec import PolicySpec
from service.demo.environment import GrowingNetwork
from service.http.json_codec import JsonCodec
from tests.random_inputs import random_policy
from tests.running_server import running_server
from tests.service.gated_server import serving
from tests.specs import TINY_LSTMS, TINY_MLPS

TIMEOUT_S = 60
V1 = PolicySpec.tamiyo_v1(feature_dim=12, hidden_dim=10)
V2 = PolicySpec.tamiyo_v2(feature_dim=12, hidden_dim=16)
every_version = pytest.mark.parametrize("spec", [V1, V2], ids=["V1", "V2"])
SMALL = ("--envs", "5", "--steps", "30", "--json")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service.demo", *arguments]


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def some_legal_action(network: GrowingNetwork, rng: np.random.Generator) -> dict[str, int]:
    """The op at random, then each head that it is relevant to; the others as the spec says."""
    spec, masks = network.spec, network.masks
    op = int(rng.choice(np.flatnonzero(masks["op"])))
    slots = masks["slot_by_op"][op] if spec.has_slot_by_op else masks["slot"]
    action = {"op": op}
    for head in spec.heads:
        mask = slots if head.name == "slot" else masks[head.name]
        if head.name == "op":
            continue
        if head.relevant_ops is None or op in head.relevant_ops:
            action[head.name] = int(rng.choice(np.flatnonzero(mask)))
        elif isinstance(head.forced_index, int):
            action[head.name] = head.forced_index
        else:
            action[head.name] = int(mask.argmax())
    return action


@every_version
@pytest.mark.parametrize("seed", range(5))
def test_every_legal_action_leads_to_a_situation_with_legal_actions(
    spec: PolicySpec, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    network = GrowingNetwork(spec, rng)
    codec = JsonCodec(spec, max_rows=1, max_body_bytes=100_000)
    ops: set[int] = set()
    while not network.is_over:
        block, _ = codec.parse(json.dumps(network.request()).encode())
        assert np.isfinite(block.given[0]).all()
        action = some_legal_action(network, rng)
        assert network.illegal(action) == []
        ops.add(action["op"])
        network.apply(action)
    assert network.epoch == (25 if spec == V1 else 150)
    assert ops >= {WAIT, GERMINATE, PRUNE, ADVANCE}


@every_version
def test_a_seed_grows_from_germination_to_fossil(spec: PolicySpec) -> None:
    """By the ops that the rules allow at each stage; what is not allowed then changes nothing."""
    network = GrowingNetwork(spec, np.random.default_rng(0))
    action = {"slot": 0, "blueprint": 1, "style": 2, "tempo": 0, "alpha_target": 2}
    action |= {"alpha_speed": 0, "alpha_curve": 0}
    stages = []
    for op in (FOSSILIZE, GERMINATE, ADVANCE, FOSSILIZE, ADVANCE, *[WAIT] * 3, ADVANCE, FOSSILIZE):
        network.apply(action | {"op": op})
        seed = network.slots[0]
        stages.append(None if seed is None else seed.stage)
    assert stages[:4] == [None, GERMINATED, TRAINING, TRAINING]
    assert stages[4:] == [*[BLENDING] * 4, HOLDING, FOSSILIZED]
    assert network.slots[0] is not None
    assert network.slots[0].alpha == pytest.approx(1.0)


def test_full_network_allows_no_germination() -> None:
    network = GrowingNetwork(V1, np.random.default_rng(0))
    action = {"op": GERMINATE, "blueprint": 1, "style": 2, "tempo": 0, "alpha_target": 2}
    for slot in range(3):
        assert network.masks["op"][GERMINATE]
        network.apply(action | {"slot": slot})
    assert not network.masks["op"][GERMINATE]


def test_a_seed_in_training_keeps_v2_from_germinating_another() -> None:
    network = GrowingNetwork(V2, np.random.default_rng(0))
    action = {"op": GERMINATE, "slot": 0, "blueprint": 1, "style": 2, "tempo": 0, "alpha_target": 2}
    of_v1 = GrowingNetwork(V1, np.random.default_rng(0))
    for op in (GERMINATE, ADVANCE):
        network.apply(action | {"op": op})
        of_v1.apply(action | {"op": op})
        assert not network.masks["op"][GERMINATE]
        assert of_v1.masks["op"][GERMINATE]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, []),
        ({"op": FOSSILIZE}, ["slot", "op"]),
        ({"slot": 1}, ["slot"]),
        ({"slot": 3}, ["slot"]),
        ({"blueprint": 1}, ["blueprint"]),
        ({"tempo": 0, "alpha_curve": 4}, ["tempo", "alpha_curve"]),
    ],
)
def test_what_breaks_v2_s_rules_is_named(change: dict[str, int], wrong: list[str]) -> None:
    """While waiting, no other head is the policy's to choose."""
    network = GrowingNetwork(V2, np.random.default_rng(0))
    waiting = {"op": WAIT, "slot": 0, "blueprint": 0, "style": 2, "tempo": 1, "alpha_target": 2}
    waiting |= {"alpha_speed": 0, "alpha_curve": 0}
    assert network.illegal(waiting | change) == wrong


def test_telemetry_a_policy_reads_is_zero() -> None:
    with_telemetry = PolicySpec.tamiyo_v1(observation_dim=218)
    plain, more = (
        GrowingNetwork(spec, np.random.default_rng(0)).request()["observation"]
        for spec in (V1, with_telemetry)
    )
    assert more == [*plain, *[0.0] * 78]


@every_version
def test_demo_plays_against_a_real_server_and_finds_every_answer_legal(
    spec: PolicySpec, tmp_path: Path
) -> None:
    export_policy(
        random_policy(spec),
        None,
        tmp_path / "policy",
        name="policy",
        formats=("onnx",),
        max_batch_size=8,
    )
    with running_server(tmp_path / "policy") as server:
        done = demo("--url", server.address, *SMALL)
        again = demo("--url", server.address, *SMALL)
        in_two = demo("--url", server.address, "--rows", "3", *SMALL)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["actions"] == sum(summary["ops"].values()) == 150
    assert summary["episodes"] == (5 if spec == V1 else 0)
    assert (summary["errors"], summary["broken_masks"]) == ({}, [])
    assert summary["batches_by_size"]["8.0"] == 30
    assert json.loads(again.stdout)["ops"] == summary["ops"]
    assert json.loads(in_two.stdout)["actions"] == 150


async def demo_against(status: int, op: int) -> tuple[int, dict[str, object]]:
    """The demo's exit code and figures against a server that gives every request one answer."""

    async def policy(request: web.Request) -> web.Response:
        return web.json_response({"spec": V1.model_dump(mode="json")})

    async def act(request: web.Request) -> web.Response:
        if status != 200:
            return web.json_response({"error": "no", "error_type": "internal"}, status=status)
        num_rows = len(load(await request.read())["observation"])
        action = np.full((num_rows, len(V1.heads)), 2)
        action[:, V1.op_index] = op
        nothing = np.zeros(action.shape, np.float32)
        tensors = {"action": action, "log_prob": nothing, "value": nothing[:, 0].copy()}
        metadata = {"step": "0", "policy_version": "none", "heads": ",".join(V1.head_names)}
        return web.Response(body=save(tensors, metadata))

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


@pytest.mark.parametrize("op", [FOSSILIZE, 9, -1])  # with no seed in HOLDING; and no op at all
def test_an_answer_that_breaks_a_mask_is_named_and_fails_the_demo(op: int) -> None:
    code, summary = asyncio.run(demo_against(200, op=op))
    assert code == 1
    broken = summary["broken_masks"]
    assert isinstance(broken, list)
    assert all(f"op {op}" in line for line in broken)
    assert len(broken) == 150


def test_legal_answers_alone_do_not_fail_it() -> None:
    code, summary = asyncio.run(demo_against(200, op=WAIT))
    assert (code, summary["broken_masks"]) == (0, [])


def test_failed_requests_are_counted_by_kind_and_fail_the_demo() -> None:
    code, summary = asyncio.run(demo_against(500, op=WAIT))
    assert code == 1
    assert summary["errors"] == {"500 internal": 30}


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


@pytest.mark.parametrize("of", [TINY_MLPS, TINY_LSTMS], ids=lambda of: of.name)
def test_policy_of_another_family_is_refused_in_a_sentence(of: SB3Spec, tmp_path: Path) -> None:
    with serving(of, tmp_path) as server:
        done = demo("--url", server.address)
    assert done.returncode == 2
    assert f"demo: the policy '{of.name}' reads {of.observation_dim} features" in done.stderr
    assert done.stderr.count("\n") == 1
