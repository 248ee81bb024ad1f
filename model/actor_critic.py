"""What every family's policy can do: score one step, and act by the scores.

How a step is scored is the family's; how an action is drawn from the scores is not.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.heads import Choices, HeadTable
from model.policy_inputs import (
    Masks,
    allowed_choices,
    check_allowed,
    check_shape,
    check_state,
    refuse_gradient,
)
from model.recurrence import LayerParameters, State
from model.step_spec import StepSpec


class Scores(NamedTuple):
    """What one step's choice is made from, V(s) float32 `[B]`, the state, and what heads read."""

    choices: Choices
    value: Tensor
    state: State
    output: Tensor


class Act(NamedTuple):
    """One step's result: `{head: int64 [B]}`, `{head: float32 [B]}`, float32 `[B]`, the state."""

    action: dict[str, Tensor]
    log_prob: dict[str, Tensor]
    value: Tensor
    state: State


class ActorCritic(nn.Module):
    """A policy that acts step by step; its spec says what goes in and comes out."""

    spec: StepSpec
    heads: HeadTable

    def initial_state(self, batch_size: int) -> State:
        """Zeros in the module's own dtype and device, one `[B, ...]` for each of the spec's."""
        like = next(self.parameters())
        return tuple(like.new_zeros(batch_size, *state.shape) for state in self.spec.states)

    def step_scores(
        self,
        observation: Tensor,
        state: State | None = None,
        masks: Masks | None = None,
        *,
        blueprint_index: Tensor | None = None,
    ) -> Scores:
        """What one step's action is chosen from.

        `observation` is `[B, D]`. Raises ValueError for a wrong shape or dtype, and for a mask
        that allows nothing, naming head and row. The last is one read from the device; a compiled
        or exported step leaves it out, since no graph can hold it.
        """
        check_shape("observation", observation, (None, self.spec.observation_dim))
        batch_size = observation.shape[0]
        if state is None:
            state = self.initial_state(batch_size)
        else:
            check_state(self.spec, state, batch_size)
        lead = observation.shape[:-1]
        allowed, slot_by_op = allowed_choices(self.spec, self.heads, masks, lead)
        if not torch.compiler.is_compiling():
            check_allowed(self.spec, self.heads, allowed, slot_by_op)
        return self.scores(observation, state, allowed, slot_by_op, blueprint_index)

    def scores(
        self,
        observation: Tensor,
        state: State,
        allowed: Tensor,
        slot_by_op: Tensor | None,
        blueprint_index: Tensor | None,
    ) -> Scores:
        """`step_scores` of what was checked: the family's own part of it.

        `allowed` is bool `[B, heads, width]`, `slot_by_op` `[B, ops, slots]` if it is given.
        """
        raise NotImplementedError  # each family's own

    def extra_output(self, name: str, output: Tensor, op: Tensor) -> Tensor:
        """What else the critic gives of a step that took `op` `[B]`, in the network's units."""
        raise NotImplementedError  # each family's own

    def recurrences(self) -> list[list[LayerParameters]]:
        """The layers of each LSTM, whose (h, c) are the spec's states, two by two."""
        return []

    def recurrence_inputs(
        self, observation: Tensor, blueprint_index: Tensor | None
    ) -> list[Tensor]:
        """What the first layer of each LSTM reads, `[B, input]`."""
        return []

    def get_action(
        self,
        observation: Tensor,
        state: State | None = None,
        masks: Masks | None = None,
        noise: Tensor | None = None,
        *,
        blueprint_index: Tensor | None = None,
    ) -> Act:
        """Takes one step for each row; the results are inference tensors, for acting only.

        `observation` `[B, D]`; `state` one `[B, ...]` for each of the spec's, None is zeros;
        `masks` `{head: bool [B, n]}`; `noise` float32 `[B, num_choices]`, the heads' columns in
        spec order: standard Gumbel noise samples, None gives the most likely action;
        `blueprint_index` int64 `[B, slots]`, where the spec has an embedding, -1 or None for no
        blueprint. Raises ValueError as `step_scores` does, and for an input that requires a
        gradient: none would be recorded (ticket B9-PT-02). Compiled, the results are ordinary
        tensors without gradient.
        """
        refuse_gradient(self.spec, observation, state, noise)
        # Inductor fails on a graph that takes views of inference tensors (torch 2.13).
        is_compiling = torch.compiler.is_compiling()
        with torch.no_grad() if is_compiling else torch.inference_mode():
            choices, value, state, _ = self.step_scores(
                observation, state, masks, blueprint_index=blueprint_index
            )
            if noise is None:
                padded = torch.zeros_like(choices.log_probs)
            else:
                batch_size = observation.shape[0]
                check_shape("noise", noise, (batch_size, sum(self.heads.sizes)))
                padded = self.heads.spread(noise)
            decision = choices.choose(padded)
            return Act(
                self.heads.by_name(decision.action),
                self.heads.by_name(decision.log_prob),
                value,
                state,
            )
