"""The recurrent, factored-action, action-masked actor-critic: acting and evaluating.

Knows nothing of normalisation, artifacts or HTTP. Parameter names and shapes are esper-lite's, so
its state_dict loads with `strict=True`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from model.heads import HeadTable
from model.recurrence import LSTM, State
from model.spec import PolicySpec

Masks = Mapping[str, Tensor]
"""`{head: bool [..., n]}`, True = allowed. A head that is absent has nothing disallowed."""


class Forward(NamedTuple):
    """Raw outputs over a sequence: `{head: [B, T, n]}` unmasked logits, `[B, T]` values, state."""

    logits: dict[str, Tensor]
    value: Tensor
    state: State


class Scores(NamedTuple):
    """What one step's choice is made from: float32 `[B, heads, width]`, `[B]`, and the state."""

    log_probs: Tensor
    value: Tensor
    state: State


class Act(NamedTuple):
    """One step's result: `{head: int64 [B]}`, `{head: float32 [B]}`, float32 `[B]`, `(h, c)`."""

    action: dict[str, Tensor]
    log_prob: dict[str, Tensor]
    value: Tensor
    state: State


class Evaluation(NamedTuple):
    """A sequence's result, all float32 `[B, T]`; entropy is normalised to [0, 1] per head."""

    log_prob: dict[str, Tensor]
    value: Tensor
    entropy: dict[str, Tensor]
    state: State


class FactoredRecurrentActorCritic(nn.Module):
    """observation -> Linear, LayerNorm, ReLU -> LSTM -> LayerNorm -> one MLP per head, and V(s).

    `get_action` takes one step without gradient; `evaluate_actions` takes sequences with it.
    """

    def __init__(self, spec: PolicySpec) -> None:
        super().__init__()
        self.spec = spec
        self.heads = HeadTable(spec)
        self.observation_dim = spec.observation_dim
        self.state_shape = (spec.num_layers, spec.hidden_dim)
        self.feature_net = nn.Sequential(
            nn.Linear(spec.observation_dim, spec.feature_dim),
            nn.LayerNorm(spec.feature_dim),
            nn.ReLU(),
        )
        self.lstm = LSTM(spec.feature_dim, spec.hidden_dim, spec.num_layers)
        self.lstm_ln = nn.LayerNorm(spec.hidden_dim)
        for head in spec.heads:
            self.add_module(f"{head.name}_head", _mlp(spec.hidden_dim, head.size))
        self.value_head = _mlp(spec.hidden_dim, 1)
        self.reset_parameters()

    def head_mlps(self) -> list[nn.Sequential]:
        """The heads' networks in spec order."""
        return [cast(nn.Sequential, getattr(self, f"{name}_head")) for name in self.heads.names]

    def reset_parameters(self) -> None:
        """esper-lite's initialisation: orthogonal weights, zero biases, near-uniform heads."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, math.sqrt(2))
                nn.init.zeros_(module.bias)
        for mlp in self.head_mlps():
            nn.init.orthogonal_(cast(Tensor, mlp[-1].weight), 0.01)
        nn.init.orthogonal_(cast(Tensor, self.value_head[-1].weight), 1.0)
        self.lstm.reset_parameters()

    def initial_state(self, batch_size: int) -> State:
        """Zeros in the module's own dtype and device: `(h, c)`, each `[B, layers, hidden]`."""
        like = self.value_head[-1].get_parameter("bias")
        shape = (batch_size, *self.state_shape)
        return like.new_zeros(shape), like.new_zeros(shape)

    def forward(self, observations: Tensor, state: State | None = None) -> Forward:
        """Logits and values over `observations` `[B, T, D]`, before any mask."""
        logits, value, state = self._sequence(observations, state)
        return Forward(self._by_head(logits, self.heads.sizes), value, state)

    def step_scores(
        self, observation: Tensor, state: State | None = None, masks: Masks | None = None
    ) -> Scores:
        """The masked log-probabilities of one step, from which an action is chosen.

        `observation` is `[B, D]`. Raises ValueError for a wrong shape or dtype, and for a mask
        that allows nothing, naming head and row. The last is one read from the device; a compiled
        or exported step leaves it out, since no graph can hold it.
        """
        self._check("observation", observation, (None, self.observation_dim))
        batch_size = observation.shape[0]
        if state is None:
            state = self.initial_state(batch_size)
        else:
            self._check_state(state, batch_size)
        allowed = self._allowed(masks, observation.shape[:-1])
        if not torch.compiler.is_compiling():
            self._check_allowed(allowed)
        y, state = self.lstm.step(self.feature_net(observation), state)
        logits, value = self._decode(y)
        log_probs = self.heads.log_probs(self.heads.spread(logits), allowed)
        return Scores(log_probs, value, state)

    def get_action(
        self,
        observation: Tensor,
        state: State | None = None,
        masks: Masks | None = None,
        noise: Tensor | None = None,
    ) -> Act:
        """Takes one step for each row; the results are inference tensors, for acting only.

        `observation` `[B, D]`; `state` `(h, c)` each `[B, layers, hidden]`, None is zeros; `masks`
        `{head: bool [B, n]}`; `noise` float32 `[B, num_choices]`, the heads' columns in spec order:
        standard Gumbel noise samples, None gives the most likely action. Raises ValueError as
        `step_scores` does, and for an input that requires a gradient: none would be recorded
        (ticket B9-PT-02). Compiled, the results are ordinary tensors without gradient.
        """
        self._refuse_gradient(observation, state, noise)
        # Inductor fails on a graph that takes views of inference tensors (torch 2.13).
        is_compiling = torch.compiler.is_compiling()
        with torch.no_grad() if is_compiling else torch.inference_mode():
            log_probs, value, state = self.step_scores(observation, state, masks)
            if noise is None:
                padded = torch.zeros_like(log_probs)
            else:
                batch_size = observation.shape[0]
                self._check("noise", noise, (batch_size, sum(self.heads.sizes)))
                padded = self.heads.spread(noise)
            decision = self.heads.choose(log_probs, padded)
            return Act(
                self._by_head(decision.action), self._by_head(decision.log_prob), value, state
            )

    def evaluate_actions(
        self,
        observations: Tensor,
        actions: Mapping[str, Tensor],
        masks: Masks | None = None,
        state: State | None = None,
    ) -> Evaluation:
        """Log-probs, values and entropies of stored actions, with gradient: the learner's half.

        `observations` `[B, T, D]`, `actions` `{head: int64 [B, T]}` for every head, `masks`
        `{head: bool [B, T, n]}`, `state` at the first step. A head that does not matter for a
        step's op has log-prob 0 and entropy 0 whatever was stored for it. Raises ValueError for
        wrong shapes, an action out of range or a mask with nothing allowed, naming head and row;
        and, while gradients are on, for inference tensors (what `get_action` returns): store a
        `.clone()` of them instead.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _refuse_inference("observations", [observations])
            _refuse_inference("actions", actions.values())
            _refuse_inference("masks", (masks or {}).values())
            _refuse_inference("state", state or ())
        self._check("observations", observations, (None, None, self.observation_dim))
        lead = observations.shape[:-1]
        action = self._packed_actions(actions, lead)
        allowed = self._allowed(masks, lead)
        if not torch.compiler.is_compiling():
            self._check_allowed(allowed)
            self._check_in_range(action)
        logits, value, state = self._sequence(observations, state)
        log_probs = self.heads.log_probs(self.heads.spread(logits), allowed)
        entropy = self.heads.entropy(log_probs, allowed, action[..., self.heads.op_index])
        return Evaluation(
            self._by_head(self.heads.log_prob_of(log_probs, action)),
            value,
            self._by_head(entropy),
            state,
        )

    def _sequence(
        self, observations: Tensor, state: State | None
    ) -> tuple[Tensor, Tensor, State]:  # [B, T, num_choices], [B, T]
        self._check("observations", observations, (None, None, self.observation_dim))
        batch_size = observations.shape[0]
        if state is None:
            state = self.initial_state(batch_size)
        else:
            self._check_state(state, batch_size)
        y, state = self.lstm(self.feature_net(observations), state)
        logits, value = self._decode(y)
        return logits, value, state

    def _decode(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = self.lstm_ln(y)
        logits = torch.cat([mlp(y) for mlp in self.head_mlps()], dim=-1)
        return logits, self.value_head(y).squeeze(-1).float()

    def _by_head(self, packed: Tensor, sizes: list[int] | None = None) -> dict[str, Tensor]:
        parts = packed.unbind(-1) if sizes is None else torch.split(packed, sizes, -1)
        return dict(zip(self.heads.names, parts, strict=True))

    def _allowed(self, masks: Masks | None, lead: torch.Size) -> Tensor:
        if not masks:
            return self.heads.valid.expand(*lead, *self.heads.valid.shape)
        self._check_names("masks", masks)
        everything = self.heads.valid.new_ones(())
        columns = []
        for name, size in zip(self.heads.names, self.heads.sizes, strict=True):
            mask = masks.get(name)
            if mask is None:
                mask = everything.expand(*lead, size)
            elif mask.dtype != torch.bool:
                raise ValueError(f"mask {name!r} is {mask.dtype}, not torch.bool (True = allowed)")
            else:
                self._check(f"mask {name!r}", mask, (*lead, size))
            columns.append(mask)
        return self.heads.spread(torch.cat(columns, dim=-1)) & self.heads.valid

    def _packed_actions(self, actions: Mapping[str, Tensor], lead: torch.Size) -> Tensor:
        self._check_names("actions", actions)
        for name in self.heads.names:
            if name not in actions:
                raise ValueError(f"actions have no head {name!r}")
            if actions[name].dtype != torch.int64:
                raise ValueError(f"action {name!r} is {actions[name].dtype}, not torch.int64")
            self._check(f"action {name!r}", actions[name], tuple(lead))
        return torch.stack([actions[name] for name in self.heads.names], dim=-1)

    def _check_names(self, what: str, by_head: Mapping[str, Tensor]) -> None:
        for name in by_head:
            if name not in self.heads.names:
                known = ", ".join(self.heads.names)
                raise ValueError(f"{what} name an unknown head {name!r}; the heads are {known}")

    def _check_allowed(self, allowed: Tensor) -> None:
        empty = ~allowed.any(-1)
        if empty.any():
            *row, head = empty.nonzero()[0].tolist()
            raise ValueError(f"mask {self.heads.names[head]!r} allows nothing in row {_row(row)}")

    def _check_in_range(self, action: Tensor) -> None:
        sizes = torch.tensor(self.heads.sizes, device=action.device)
        outside = (action < 0) | (action >= sizes)
        if outside.any():
            *row, head = outside.nonzero()[0].tolist()
            raise ValueError(
                f"action {self.heads.names[head]!r} is {int(action[(*row, head)])} in row "
                f"{_row(row)}; the head has {self.heads.sizes[head]} choices"
            )

    def _check_state(self, state: State, batch_size: int) -> None:
        for name, part in zip(("h", "c"), state, strict=True):
            self._check(f"state {name}", part, (batch_size, *self.state_shape))

    @staticmethod
    def _check(what: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
        matches = tensor.ndim == len(shape) and all(
            want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
        )
        if not matches:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{what} has shape {tuple(tensor.shape)}, expected ({wanted})")

    @staticmethod
    def _refuse_gradient(observation: Tensor, state: State | None, noise: Tensor | None) -> None:
        named = {"observation": observation, "noise": noise}
        if state is not None:
            named |= {"state h": state[0], "state c": state[1]}
        for name, tensor in named.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, and get_action records none: detach() it, "
                    "or use evaluate_actions to train"
                )


def _mlp(hidden_dim: int, size: int) -> nn.Sequential:
    width = hidden_dim // 2
    return nn.Sequential(nn.Linear(hidden_dim, width), nn.ReLU(), nn.Linear(width, size))


def _refuse_inference(what: str, tensors: Iterable[Tensor]) -> None:
    if any(tensor.is_inference() for tensor in tensors):
        raise ValueError(
            f"{what} came out of inference mode (get_action), and no gradient can pass through: "
            "give evaluate_actions a .clone() made outside inference mode"
        )


def _row(index: list[int]) -> str:
    return str(index[0]) if len(index) == 1 else str(tuple(index))
