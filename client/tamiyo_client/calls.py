"""What clients of vectors do, apart from threads and asyncio: methods are calls to be driven."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tamiyo_client import wire
from tamiyo_client.autoreset import Autoreset, autoreset_mode
from tamiyo_client.exchange import Call, Patience
from tamiyo_client.session import Session
from tamiyo_client.wire import ActionMasks, State, VectorAct

STATES_BEFORE_THEY_WERE_SAID = ({"name": "h"}, {"name": "c"})
"""Of every policy that such a server can have."""


class SessionHandle(NamedTuple):
    """What `predict` gives for a state. That is on the server; this says which one it is."""

    session_id: str
    run: str
    step: int


class VectorCalls:
    """The calls of one session of `num_envs` rows, and which of its rows start next.

    `url` is one server's, or several: the session's name chooses. With `failover`, one that cannot
    be reached is left for the next, where every episode begins anew from zero state.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        num_envs: int,
        *,
        autoreset: Any,
        session_id: str | None,
        api_key: str | None,
        seed: int | None,
        patience: Patience,
        failover: bool,
    ) -> None:
        self.num_envs = num_envs
        self.autoreset = Autoreset(autoreset_mode(autoreset), num_envs)
        self.session = Session(
            [url] if isinstance(url, str) else url,
            num_envs,
            name=session_id,
            api_key=api_key,
            patience=patience,
            failover=failover,
        )
        self._seed = seed
        self._states: list[str] | None = None  # until the server was asked

    def restart(self) -> None:
        """Every row starts, in a new run: what is left to do where the session was lost."""
        self.session.restart()
        self.autoreset.restart()

    def act(
        self,
        observations: npt.ArrayLike,
        action_masks: ActionMasks | None,
        *,
        episode_start: npt.ArrayLike | None = None,
        deterministic: bool = False,
        seeds: Sequence[int] | None = None,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
    ) -> Call[VectorAct]:
        """The next step. `seeds` are of rows that start; `inputs` what only some policies read."""
        starts = self.autoreset.starts
        if episode_start is not None:
            starts = self.autoreset.flags(episode_start)
        if self.session.step == 0:
            starts = np.ones(self.num_envs, dtype=np.bool_)
        tensors = self._tensors(observations, action_masks, inputs)
        wire.allow_something(tensors, self.autoreset.ended)
        if seeds is not None:  # read for rows that start, as all do after a failover
            tensors["seed"] = wire.packed_seeds(seeds)
        seed = self._seed if seeds is None else None
        act = yield from self.session.act(tensors, starts, seed=seed, deterministic=deterministic)
        self.autoreset.acted()
        return act

    def act_from(
        self,
        state: State | None,
        observations: npt.ArrayLike,
        action_masks: ActionMasks | None,
        *,
        step: int,
        deterministic: bool,
        seeds: Sequence[int] | None,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
    ) -> Call[VectorAct]:
        """A step from a state of the caller's, or from zeros, which the answer carries on."""
        tensors = self._tensors(observations, action_masks, inputs)
        if state is not None:
            names = yield from self._state_names()
            if len(state) != len(names):
                carried = ", ".join(names) or "none"
                raise ValueError(f"`state` has {len(state)} arrays; those of the policy: {carried}")
            for name, part in zip(names, state, strict=True):
                tensors[wire.STATE + name] = np.ascontiguousarray(part, dtype=np.float32)
        if seeds is not None:
            tensors["seed"] = wire.packed_seeds(seeds)
        return (yield from self.session.stateless(tensors, step=step, deterministic=deterministic))

    def predict(
        self,
        observation: npt.ArrayLike | Mapping[str, npt.ArrayLike],
        state: SessionHandle | None,
        episode_start: npt.ArrayLike | None,
        deterministic: bool,
        action_masks: ActionMasks | None,
    ) -> Call[tuple[npt.NDArray[np.int64], SessionHandle | None]]:
        """A step as Stable-Baselines3's policies have it; `state` None begins anew.

        Of a policy that has no state it is None always, and nothing begins.
        """
        observations = wire.one_array(observation)
        is_lone = self.num_envs == 1 and observations.ndim == 1
        if is_lone:
            observations, action_masks = observations[None], wire.lone_masks(action_masks)
        if state is None:
            if self._states != []:  # as it may have one, where that is not known yet
                self.restart()
        elif not isinstance(state, SessionHandle) or state != self._handle():
            raise ValueError("`state` is not that of the last answer, which the server has alone")
        no_start = np.zeros(self.num_envs, dtype=np.bool_)
        starts = no_start if episode_start is None else np.atleast_1d(episode_start)
        act = yield from self.act(
            observations, action_masks, episode_start=starts, deterministic=deterministic
        )
        actions = act.multi_discrete
        if len(act.heads) == 1:
            actions = actions[:, 0]
        has_state = bool((yield from self._state_names()))  # of a server that has just answered
        return actions[0] if is_lone else actions, self._handle() if has_state else None

    def policy(self) -> Call[dict[str, Any]]:
        """What `GET /policy` says of the policy, its version and the server's limits."""
        described: dict[str, Any] = json.loads((yield from self.session.policy()))
        return described

    def _state_names(self) -> Call[list[str]]:
        if self._states is None:
            described = yield from self.policy()
            states = described.get("states", STATES_BEFORE_THEY_WERE_SAID)
            self._states = [state["name"] for state in states]
        return self._states

    def _handle(self) -> SessionHandle:
        return SessionHandle(self.session.name, self.session.run, self.session.step)

    def _tensors(
        self,
        observations: npt.ArrayLike,
        action_masks: ActionMasks | None,
        inputs: Mapping[str, npt.ArrayLike] | None,
    ) -> dict[str, wire.Array]:
        return {
            "observation": wire.packed_observations(observations, self.num_envs),
            **wire.packed_masks(action_masks, self.num_envs),
            **wire.packed_inputs(inputs or {}, self.num_envs),
        }
