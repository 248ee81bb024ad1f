"""What environments ask of a running server over real HTTP, and what must come back."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from model.spec import PolicySpec
from tamiyo_client.noise import gumbel_noise
from tests.naive import FLOAT_ATOL, LOG_PROB_ATOL, NaivePolicy
from tests.random_inputs import random_masks, random_observations
from tests.running_server import RunningServer

Json = dict[str, Any]
Result = TypeVar("Result")

TIMEOUT_S = 60.0
NUM_ENVIRONMENTS = 8
NUM_STEPS = 15


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


def client_of(server: RunningServer) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.address, timeout=TIMEOUT_S)


async def act(client: httpx.AsyncClient, request: Json) -> Json:
    response = await client.post("/act", json=request)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


class Episodes(NamedTuple):
    """What some environments observe: `[environments, steps, ...]`, and a seed for each."""

    observations: NDArray[np.float32]
    masks: dict[str, NDArray[np.bool_]]
    seeds: NDArray[np.uint64]

    @classmethod
    def random(
        cls, spec: PolicySpec, seed: int, num_environments: int = NUM_ENVIRONMENTS
    ) -> "Episodes":
        rng = np.random.default_rng(seed)
        shape = (num_environments, NUM_STEPS)
        seeds = rng.integers(2**64, size=num_environments, dtype=np.uint64)
        return cls(random_observations(spec, rng, *shape), random_masks(spec, rng, *shape), seeds)

    def request(self, env: int, step: int) -> Json:
        mask = {name: mask[env, step].tolist() for name, mask in self.masks.items()}
        return {
            "observation": self.observations[env, step].tolist(),
            "action_mask": mask,
            "step": step,
            "seed": int(self.seeds[env]),
        }

    def session_request(self, env: int, step: int, prefix: str) -> Json:
        which = {"session_id": f"{prefix}-{env}", "episode": "0", "episode_start": step == 0}
        return self.request(env, step) | which

    def check(self, naive: NaivePolicy, answers: Sequence[Sequence[Json]]) -> None:
        """Every answer, `[environments][steps]`, is the naive policy's."""
        num_environments = len(self.seeds)
        h, c = naive.zero_state(num_environments)
        for step in range(NUM_STEPS):
            steps = np.full(num_environments, step, np.uint64)
            expected = naive.step(
                self.observations[:, step],
                {name: mask[:, step] for name, mask in self.masks.items()},
                gumbel_noise(self.seeds, steps, naive.spec.num_choices),
                h,
                c,
            )
            h, c = expected.h, expected.c
            of_step = [of_env[step] for of_env in answers]
            check_answers(of_step, expected.action, expected.log_prob, expected.value)
            assert [answer["step"] for answer in of_step] == [step] * num_environments


def check_answers(
    answers: Sequence[Json],
    action: NDArray[np.int64],
    log_prob: NDArray[Any],
    value: NDArray[Any],
) -> None:
    """The answers are these arrays' rows; heads are in spec order in both."""
    assert [list(answer["action"].values()) for answer in answers] == action.tolist()
    got = [list(answer["log_prob"].values()) for answer in answers]
    np.testing.assert_allclose(got, log_prob, atol=LOG_PROB_ATOL, rtol=0)
    got_value = [answer["value"] for answer in answers]
    np.testing.assert_allclose(got_value, value, atol=FLOAT_ATOL, rtol=0)


async def play(client: httpx.AsyncClient, episodes: Episodes, env: int, prefix: str) -> list[Json]:
    return [
        await act(client, episodes.session_request(env, step, prefix)) for step in range(NUM_STEPS)
    ]


def stop_under_load(server: RunningServer, episodes: Episodes) -> None:
    """SIGTERM in the middle of it: every request is answered or refused, and the exit code is 0."""
    answers: list[httpx.Response] = []
    errors: list[httpx.TransportError] = []

    async def load(client: httpx.AsyncClient, env: int) -> None:
        for number in range(100_000):
            request = episodes.session_request(env, 0, "load") | {"episode": str(number)}
            try:
                answers.append(await client.post("/act", json=request))
            except httpx.TransportError as error:
                errors.append(error)
                return
            if answers[-1].status_code != 200:
                return
            if len(answers) == 100:
                server.terminate()

    async def all_at_once() -> None:
        async with client_of(server) as client:
            await asyncio.gather(*(load(client, env) for env in range(len(episodes.seeds))))

    run(all_at_once())
    assert server.wait() == 0
    assert "Traceback" not in server.log()
    assert len(answers) >= 100
    assert {answer.status_code for answer in answers} <= {200, 503}
    for error in errors:
        assert not isinstance(error, httpx.TimeoutException)
        assert "incomplete" not in str(error), "an answer was cut off"
