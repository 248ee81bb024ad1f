"""Specs of policies small enough to export in a moment, for tests that serve them."""

from model.sb3.spec import Recurrence, SB3Spec
from model.spec import PolicySpec
from model.step_spec import HeadSpec

TINY_V1 = PolicySpec.tamiyo_v1(
    num_slots=2, observation_dim=11, feature_dim=12, hidden_dim=10, num_layers=1
)
TINY_V2 = PolicySpec.tamiyo_v2(
    num_slots=2, observation_dim=7, feature_dim=12, hidden_dim=16, num_layers=2, value_scale=3.0
)
TINY_MLPS = SB3Spec(
    family="mlps",
    name="tiny-mlps",
    observation_dim=11,
    heads=(HeadSpec(name="action_0", size=3), HeadSpec(name="action_1", size=5)),
    actor_layers=(12,),
    critic_layers=(13,),
    activation="Tanh",
)
"""Without a state."""
TINY_LSTMS = SB3Spec(
    family="mlps",
    name="tiny-lstms",
    observation_dim=9,
    heads=(HeadSpec(name="action", size=4),),
    actor_layers=(12,),
    critic_layers=(13,),
    activation="ReLU",
    recurrence=Recurrence(hidden_dim=10, num_layers=2, critic="lstm"),
)
"""With a state of four arrays."""
