"""NVIDIA's own client of the Open Inference Protocol against a running server, sync and asyncio.

It is an oracle of the wire: nothing of ours encodes or decodes on this side of it.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

from export.exporter import export_policy
from tests.random_inputs import random_masks, random_observations, random_policy
from tests.running_server import RunningServer, running_server
from tests.specs import TINY_V1

triton = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
triton_aio = pytest.importorskip("tritonclient.http.aio", reason="tritonclient is not installed")

MODEL = "tiny"
NUM_ROWS, NUM_STEPS = 3, 5
OUTPUTS = ("action", "log_prob", "value")
KEY = "k" * 20
DATATYPES = {"float32": "FP32", "bool": "BOOL", "uint64": "UINT64"}
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("triton")
    artifact, keys = directory / MODEL, directory / "act.keys"
    export_policy(
        random_policy(TINY_V1), None, artifact, name=MODEL, formats=("onnx",), max_batch_size=8
    )
    keys.write_text(KEY)
    keys.chmod(0o600)
    with running_server(artifact, "--act-keys", str(keys)) as running:
        yield running
        assert running.stop() == 0
        assert "Traceback" not in running.log()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Any]:
    with triton.InferenceServerClient(address_of(server)) as client:
        yield client


def address_of(server: RunningServer) -> str:
    """As these clients have it, who know no scheme."""
    return server.address.removeprefix("http://")


def headers() -> dict[str, str]:
    """Of every request; the client adds its own to what it is given."""
    return {"Authorization": f"Bearer {KEY}"}


def steps(seed: int = 0) -> list[Arrays]:
    """What some environments bring, step by step."""
    rng = np.random.default_rng(seed)
    observations = random_observations(TINY_V1, rng, NUM_STEPS, NUM_ROWS)
    masks = random_masks(TINY_V1, rng, NUM_STEPS, NUM_ROWS)
    return [
        {"observation": observations[at]}
        | {f"action_mask.{head}": mask[at] for head, mask in masks.items()}
        for at in range(NUM_STEPS)
    ]


def inputs(arrays: Arrays, *, binary_data: bool = True) -> list[Any]:
    given = []
    for name, array in arrays.items():
        tensor = triton.InferInput(name, [*array.shape], DATATYPES[array.dtype.name])
        tensor.set_data_from_numpy(array, binary_data=binary_data)
        given.append(tensor)
    return given


def by_act(server: RunningServer, session_id: str, seed: int) -> list[Arrays]:
    """What the same session is told by way of `POST /act`."""
    told = []
    for step, arrays in enumerate(steps()):
        said = {"session_id": session_id, "step": str(step), "seed": str(seed)}
        starts = {"episode_start": np.ones(NUM_ROWS, np.bool_)} if step == 0 else {}
        answer = httpx.post(
            f"{server.address}/act",
            content=save({**arrays, **starts}, said),
            headers={**headers(), "Content-Type": "application/vnd.safetensors"},
        )
        assert answer.status_code == 200, answer.text
        told.append(load(answer.content))
    return told


def as_told(result: Any) -> Arrays:
    return {name: result.as_numpy(name) for name in OUTPUTS}


def check(got: list[Arrays], expected: list[Arrays]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in other.items():
            assert one[name].dtype == array.dtype
            np.testing.assert_array_equal(one[name], array)


def test_it_finds_the_server_and_the_model_ready(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL, headers=headers())
    assert client.is_model_ready(MODEL, "1", headers=headers())
    assert not client.is_model_ready("other", headers=headers())
    assert not client.is_model_ready(MODEL), "that takes a key"
    assert client.get_server_metadata(headers=headers())["name"] == "tamiyo-serve"


def test_it_reads_what_the_model_takes_and_gives(client: Any) -> None:
    metadata = client.get_model_metadata(MODEL, headers=headers())
    assert metadata["name"] == MODEL
    by_name = {of["name"]: of for of in metadata["inputs"]}
    assert by_name["observation"]["shape"] == [-1, TINY_V1.observation_dim]
    assert [of["name"] for of in metadata["outputs"]][:3] == [*OUTPUTS]


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary_data", [True, False])
def test_a_sequence_is_told_what_the_same_session_is_by_act(
    server: RunningServer, client: Any, binary_data: bool, compression: str | None
) -> None:
    wanted = [triton.InferRequestedOutput(name, binary_data=binary_data) for name in OUTPUTS]
    name = f"{binary_data} {compression}"
    told = []
    for step, arrays in enumerate(steps()):
        result = client.infer(
            MODEL,
            inputs(arrays, binary_data=binary_data),
            outputs=wanted,
            request_id=f"{step}",
            sequence_id=name,
            sequence_start=step == 0,
            sequence_end=step == NUM_STEPS - 1,
            headers=headers(),
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
            parameters={"seed": 2**64 - 1, "step": step},
        )
        answer = result.get_response()
        assert answer["id"] == f"{step}"
        assert answer["parameters"]["step"] == step
        assert answer["parameters"]["heads"] == ",".join(TINY_V1.head_names)
        told.append(as_told(result))
    check(told, by_act(server, f"by act, {name}", seed=2**64 - 1))


def test_a_stateless_request_gives_the_state_and_takes_it_back(client: Any) -> None:
    """As a sequence does, whose rows bring the same seeds."""
    seeds = {"seed": np.arange(NUM_ROWS, dtype=np.uint64)}
    of_sequence, carried, state = [], [], Arrays()
    for step, arrays in enumerate(steps(1)):
        starts = {"sequence_id": 9, "sequence_start": step == 0}
        first = seeds if step == 0 else {}
        result = client.infer(MODEL, inputs({**arrays, **first}), headers=headers(), **starts)
        assert result.as_numpy("state_h") is None
        of_sequence.append(as_told(result))
        given = inputs({**arrays, **seeds, **state})
        result = client.infer(MODEL, given, headers=headers(), parameters={"step": step})
        state = {name: result.as_numpy(name) for name in ("state_h", "state_c")}
        carried.append(as_told(result))
    check(carried, of_sequence)


def test_it_hears_what_was_wrong_in_our_own_words(client: Any) -> None:
    (first, *_) = steps()
    for change, status, sentence in (
        ({"sequence_id": 77}, "404", "session '77' was never started"),
        ({"parameters": {"temperature": 2}}, "400", "`parameters.temperature` is not a field"),
        ({"headers": {}}, "401", "there is no key"),
        ({"model_name": "other"}, "404", "there is no model 'other', only 'tiny'"),
        ({"model_version": "2"}, "404", "there is no version '2'"),
        ({"inputs": []}, "422", "`inputs` has 0 values"),
    ):
        asked: dict[str, Any] = {
            "model_name": MODEL,
            "inputs": inputs(first),
            "headers": headers(),
        } | change
        with pytest.raises(triton.InferenceServerException) as refused:
            client.infer(**asked)
        assert refused.value.status() == status
        assert sentence in refused.value.message()


def test_many_at_once_over_asyncio_are_told_what_each_is_alone(server: RunningServer) -> None:
    names = [f"aio-{index}" for index in range(8)]

    async def sequence(client: Any, name: str) -> list[Arrays]:
        told = []
        for step, arrays in enumerate(steps()):
            result = await client.infer(
                MODEL,
                inputs(arrays),
                sequence_id=name,
                sequence_start=step == 0,
                headers=headers(),
                response_compression_algorithm="gzip",
                parameters={"seed": names.index(name)},
            )
            told.append(as_told(result))
        return told

    async def all_of_them() -> list[list[Arrays]]:
        async with triton_aio.InferenceServerClient(address_of(server)) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready(MODEL, headers=headers())
            metadata = await client.get_model_metadata(MODEL, headers=headers())
            assert metadata["name"] == MODEL
            with pytest.raises(triton.InferenceServerException, match="there is no key"):
                await client.infer(MODEL, inputs(steps()[0]))
            return await asyncio.gather(*(sequence(client, name) for name in names))

    for index, told in enumerate(asyncio.run(asyncio.wait_for(all_of_them(), 60))):
        check(told, by_act(server, f"by act, aio-{index}", seed=index))
