"""Stable-Baselines3's actor and critic, acting: its parameter names, its numbers.

MaskablePPO's, PPO's and A2C's are two MLPs that read the observation; RecurrentPPO's read what one
or two LSTMs make of it. Facts: sb3-contrib 2.9.2, `RecurrentActorCriticPolicy.forward`.
"""

from itertools import pairwise

from torch import Tensor, nn

from model.actor_critic import ActorCritic, Scores
from model.heads import HeadTable
from model.linear import Linear
from model.recurrence import LSTM, LayerParameters, State
from model.sb3.spec import SB3Spec


class SB3Policy(ActorCritic):
    """observation -> LSTM, if any -> MLP -> logits; and the same beside it for the value.

    Its state_dict is the part of the trainer's that a step needs, and loads with `strict=True`.
    """

    spec: SB3Spec

    def __init__(self, spec: SB3Spec) -> None:
        super().__init__()
        self.spec = spec
        self.heads = HeadTable(spec)
        width = spec.observation_dim
        self.lstm_critic: LSTM | None = None
        self.critic: Linear | None = None
        self.lstm_actor: LSTM | None = None
        recurrence = spec.recurrence
        if recurrence is not None:
            sizes = (width, recurrence.hidden_dim, recurrence.num_layers)
            self.lstm_actor = LSTM(*sizes)
            if recurrence.critic == "lstm":
                self.lstm_critic = LSTM(*sizes)
            elif recurrence.critic == "linear":
                self.critic = Linear(width, recurrence.hidden_dim)
            width = recurrence.hidden_dim
        self.mlp_extractor = nn.ModuleDict(
            {
                "policy_net": _mlp(width, spec.actor_layers, spec.activation),
                "value_net": _mlp(width, spec.critic_layers, spec.activation),
            }
        )
        self.action_net = Linear((width, *spec.actor_layers)[-1], spec.num_choices)
        self.value_net = Linear((width, *spec.critic_layers)[-1], 1)

    def scores(
        self,
        observation: Tensor,
        state: State,
        allowed: Tensor,
        slot_by_op: Tensor | None,
        blueprint_index: Tensor | None,
    ) -> Scores:
        if blueprint_index is not None:
            raise ValueError("blueprint_index is given, and this policy reads none")
        actor, critic, state = self._recur(observation, state)
        actor = self.mlp_extractor["policy_net"](actor)
        critic = self.mlp_extractor["value_net"](critic)
        logits = self.heads.spread(self.action_net(actor))
        value = self.value_net(critic).squeeze(-1).float()
        return Scores(self.heads.choices(logits, allowed, None), value, state, actor)

    def _recur(self, x: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """What the MLPs of actor and critic read, and the state."""
        if self.lstm_actor is None:
            return x, x, state
        actor, new_state = self.lstm_actor.step(x, state[:2])
        critic = actor
        if self.critic is not None:
            critic = self.critic(x)
        elif self.lstm_critic is not None:
            critic, of_critic = self.lstm_critic.step(x, state[2:])
            new_state = (*new_state, *of_critic)
        return actor, critic, new_state

    def recurrences(self) -> list[list[LayerParameters]]:
        lstms = (self.lstm_actor, self.lstm_critic)
        return [lstm.layer_parameters() for lstm in lstms if lstm is not None]

    def recurrence_inputs(
        self, observation: Tensor, blueprint_index: Tensor | None
    ) -> list[Tensor]:
        return [observation for _ in self.recurrences()]


def _mlp(width: int, layers: tuple[int, ...], activation: str) -> nn.Sequential:
    """Every layer is followed by the activation, the last too."""
    modules: list[nn.Module] = []
    for before, after in pairwise((width, *layers)):
        modules += [Linear(before, after), getattr(nn, activation)()]
    return nn.Sequential(*modules)
