"""Clients of one environment: a vector of one row, without the leading axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tamiyo_client import wire
from tamiyo_client.calls import VectorCalls
from tamiyo_client.client import Awaiting, Blocking, Client
from tamiyo_client.exchange import Call, Patience
from tamiyo_client.wire import Act, ActionMasks, State

if TYPE_CHECKING:
    import ssl


class _Single(Client):
    """What both kinds of client keep, and do without the server."""

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        api_key: str | None = None,
        session_id: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 20,
        failover: bool = False,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """A session of one environment at `url`, or at one of several.

        A call takes at most `timeout_s`, and is sent `retries` times more than once.
        """
        calls = VectorCalls(
            url,
            1,
            autoreset="same_step",  # a lone environment is reset by its loop
            session_id=session_id,
            api_key=api_key,
            seed=None,
            patience=Patience(timeout_s, retries),
            failover=failover,
        )
        super().__init__(calls, ssl_context)

    def observe(self, terminated: bool | np.bool_, truncated: bool | np.bool_) -> None:
        """What the environment said of its last action: where it is over, the next `act` starts."""
        self._calls.autoreset.observe([bool(terminated)], [bool(truncated)])

    def reset(self) -> None:
        """The caller has reset the environment: the next `act` starts an episode."""
        self._calls.autoreset.reset()

    def _act(
        self,
        observation: npt.ArrayLike,
        action_mask: ActionMasks | None,
        episode_start: bool | None,
        deterministic: bool,
        seed: int | None,
        inputs: Mapping[str, npt.ArrayLike] | None,
    ) -> Call[Act]:
        act = yield from self._calls.act(
            wire.lone(observation),
            wire.lone_masks(action_mask),
            episode_start=None if episode_start is None else [episode_start],
            deterministic=deterministic,
            seeds=None if seed is None else [seed],
            inputs={name: wire.lone(given) for name, given in (inputs or {}).items()},
        )
        return Act.of(act)

    def _act_from(
        self,
        state: State | None,
        observation: npt.ArrayLike,
        action_mask: ActionMasks | None,
        step: int,
        deterministic: bool,
        seed: int | None,
        inputs: Mapping[str, npt.ArrayLike] | None,
    ) -> Call[Act]:
        act = yield from self._calls.act_from(
            state,
            wire.lone(observation),
            wire.lone_masks(action_mask),
            step=step,
            deterministic=deterministic,
            seeds=None if seed is None else [seed],
            inputs={name: wire.lone(given) for name, given in (inputs or {}).items()},
        )
        return Act.of(act)


class PolicyClient(_Single, Blocking):
    """Steps one environment. Not to be shared by threads."""

    def act(
        self,
        observation: npt.ArrayLike,
        action_mask: ActionMasks | None = None,
        *,
        episode_start: bool | None = None,
        deterministic: bool = False,
        seed: int | None = None,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
    ) -> Act:
        """What to do, shown `observation` `[D]`.

        The first call starts an episode, and so does one after `observe` told of an end, or with
        `episode_start`. `seed` is the episode's, heeded at its start; without one the server
        derives it. `inputs` are what only some policies read: `blueprint_index`,
        `slot_by_op_mask`.

        Raises SessionLost where the server has no state to go on from, which `restart` forgets,
        and what else `tamiyo_client.errors` has; ValueError where the arrays are not a row.
        """
        return self._transport.run(
            self._act(observation, action_mask, episode_start, deterministic, seed, inputs)
        )

    def act_from(
        self,
        state: State | None,
        observation: npt.ArrayLike,
        action_mask: ActionMasks | None = None,
        *,
        step: int = 0,
        deterministic: bool = False,
        seed: int | None = None,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
    ) -> Act:
        """A step from a state of the caller's, zeros where None; the answer's `state` goes on."""
        return self._transport.run(
            self._act_from(state, observation, action_mask, step, deterministic, seed, inputs)
        )


class AsyncPolicyClient(_Single, Awaiting):
    """`PolicyClient` for asyncio: one call at a time, any number of clients."""

    async def act(
        self,
        observation: npt.ArrayLike,
        action_mask: ActionMasks | None = None,
        *,
        episode_start: bool | None = None,
        deterministic: bool = False,
        seed: int | None = None,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
    ) -> Act:
        """As `PolicyClient.act`."""
        return await self._transport.run(
            self._act(observation, action_mask, episode_start, deterministic, seed, inputs)
        )

    async def act_from(
        self,
        state: State | None,
        observation: npt.ArrayLike,
        action_mask: ActionMasks | None = None,
        *,
        step: int = 0,
        deterministic: bool = False,
        seed: int | None = None,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
    ) -> Act:
        """As `PolicyClient.act_from`."""
        return await self._transport.run(
            self._act_from(state, observation, action_mask, step, deterministic, seed, inputs)
        )
