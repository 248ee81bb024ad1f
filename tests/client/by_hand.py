"""Single environments driven by hand, in JSON: what a vector's rows have to equal."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray


class Told(NamedTuple):
    """An answer as lists, in the policy's order."""

    action: list[int]
    log_prob: list[float]
    value: float


class ByHand:
    """One environment's session, whose caller says what starts, and with which seed."""

    def __init__(self, http: httpx.Client, name: str) -> None:
        self._http = http
        self._name = name
        self._episode = 0
        self._step = 0

    def act(
        self,
        observation: NDArray[np.float32],
        *,
        seed: int | None = None,
        mask: Mapping[str, Any] | None = None,
        deterministic: bool = False,
    ) -> Told:
        """One step; with a seed, the first of an episode."""
        body: dict[str, Any] = {"session_id": self._name, "observation": observation.tolist()}
        if seed is not None:
            self._episode, self._step = self._episode + 1, 0
            body |= {"episode_start": True, "seed": seed}
        body |= {"episode": str(self._episode), "step": self._step, "deterministic": deterministic}
        if mask is not None:
            body["action_mask"] = {
                head: np.asarray(of_head).tolist() for head, of_head in mask.items()
            }
        answer = self._http.post("/act", json=body).raise_for_status().json()
        self._step += 1
        return Told([*answer["action"].values()], [*answer["log_prob"].values()], answer["value"])
