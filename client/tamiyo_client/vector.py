"""Clients of environments that step together, as gymnasium's vector environments do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tamiyo_client.calls import VectorCalls
from tamiyo_client.client import Awaiting, Blocking, Client
from tamiyo_client.exchange import Patience
from tamiyo_client.wire import ActionMasks, State, VectorAct

if TYPE_CHECKING:
    import ssl


class _Vector(Client):
    """What both kinds of client keep, and do without the server."""

    def __init__(
        self,
        url: str | Sequence[str],
        num_envs: int,
        *,
        autoreset_mode: Any = "next_step",
        api_key: str | None = None,
        seed: int | None = None,
        session_id: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 20,
        failover: bool = False,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """A session of `num_envs` rows at `url`, or at one of several.

        `autoreset_mode` is gymnasium's, its name, or a vector environment that says it. `seed` is
        the run's: row i's e-th episode draws with `row_seed(seed, i, e)`; without one the server
        derives it. A call takes at most `timeout_s`, and is sent `retries` times more than once.
        """
        calls = VectorCalls(
            url,
            num_envs,
            autoreset=autoreset_mode,
            session_id=session_id,
            api_key=api_key,
            seed=seed,
            patience=Patience(timeout_s, retries),
            failover=failover,
        )
        super().__init__(calls, ssl_context)

    @property
    def num_envs(self) -> int:
        """Rows of every call."""
        return self._calls.num_envs

    @property
    def starts(self) -> npt.NDArray[np.bool_]:
        """`[n]`: which rows start an episode with the next `act`."""
        return self._calls.autoreset.starts

    def observe(self, terminated: npt.ArrayLike, truncated: npt.ArrayLike) -> None:
        """What the environments said of the action they were just given, `[n]` each.

        Which rows start at which `act` follows from the autoreset mode. Raises ValueError for
        another length.
        """
        self._calls.autoreset.observe(terminated, truncated)

    def reset(self, rows: npt.ArrayLike | None = None) -> None:
        """The caller has reset these rows, `[n]`, or all of them: they start at the next `act`."""
        self._calls.autoreset.reset(rows)


class VectorPolicyClient(_Vector, Blocking):
    """Steps `num_envs` environments with one request. Not to be shared by threads."""

    def act(
        self,
        observations: npt.ArrayLike,
        action_masks: ActionMasks | None = None,
        *,
        episode_start: npt.ArrayLike | None = None,
        deterministic: bool = False,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
    ) -> VectorAct:
        """What to do in each environment, shown `observations` `[n, ...]`.

        `episode_start` `[n]` says which rows start, where `observe` does not. `inputs` are what
        only some policies read: `blueprint_index`, `slot_by_op_mask`.

        Raises SessionLost where the server has no state to go on from, which `restart` forgets,
        and what else `tamiyo_client.errors` has; ValueError where the arrays are not n rows.
        """
        return self._transport.run(
            self._calls.act(
                observations,
                action_masks,
                episode_start=episode_start,
                deterministic=deterministic,
                inputs=inputs,
            )
        )

    def act_from(
        self,
        state: State | None,
        observations: npt.ArrayLike,
        action_masks: ActionMasks | None = None,
        *,
        step: int = 0,
        deterministic: bool = False,
        seeds: Sequence[int] | None = None,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
    ) -> VectorAct:
        """A step from a state of the caller's, zeros where None; the answer's `state` goes on.

        No session is part of it, as for a learner's burn-in. `seeds` `[n]` and `step` say what is
        drawn: row i's is `gumbel_noise(seeds[i], step)`. Raises as `act` does.
        """
        return self._transport.run(
            self._calls.act_from(
                state,
                observations,
                action_masks,
                step=step,
                deterministic=deterministic,
                seeds=seeds,
                inputs=inputs,
            )
        )

    def predict(
        self,
        observation: npt.ArrayLike | Mapping[str, npt.ArrayLike],
        state: Any = None,
        episode_start: npt.ArrayLike | None = None,
        deterministic: bool = False,
        action_masks: ActionMasks | None = None,
    ) -> tuple[npt.NDArray[np.int64], Any]:
        """A step as Stable-Baselines3's `predict` has it, for `evaluate_policy` and the like.

        `state` is an opaque handle: None begins anew, and else it has to be the last answer's. Of a
        policy without memory it is None always.
        Raises TypeError for a dict of observations: a policy of one reads it flat, as
        gymnasium's `FlattenObservation` lays it out.
        """
        return self._transport.run(
            self._calls.predict(observation, state, episode_start, deterministic, action_masks)
        )


class AsyncVectorPolicyClient(_Vector, Awaiting):
    """`VectorPolicyClient` for asyncio: one call at a time, any number of clients."""

    async def act(
        self,
        observations: npt.ArrayLike,
        action_masks: ActionMasks | None = None,
        *,
        episode_start: npt.ArrayLike | None = None,
        deterministic: bool = False,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
    ) -> VectorAct:
        """As `VectorPolicyClient.act`."""
        return await self._transport.run(
            self._calls.act(
                observations,
                action_masks,
                episode_start=episode_start,
                deterministic=deterministic,
                inputs=inputs,
            )
        )

    async def act_from(
        self,
        state: State | None,
        observations: npt.ArrayLike,
        action_masks: ActionMasks | None = None,
        *,
        step: int = 0,
        deterministic: bool = False,
        seeds: Sequence[int] | None = None,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
    ) -> VectorAct:
        """As `VectorPolicyClient.act_from`."""
        return await self._transport.run(
            self._calls.act_from(
                state,
                observations,
                action_masks,
                step=step,
                deterministic=deterministic,
                seeds=seeds,
                inputs=inputs,
            )
        )
