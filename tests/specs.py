"""Specs of policies small enough to export in a moment, for tests that serve them."""

from model.spec import PolicySpec

TINY_V1 = PolicySpec.tamiyo_v1(
    num_slots=2, observation_dim=11, feature_dim=12, hidden_dim=10, num_layers=1
)
TINY_V2 = PolicySpec.tamiyo_v2(
    num_slots=2, observation_dim=7, feature_dim=12, hidden_dim=16, num_layers=2, value_scale=3.0
)
