"""Names and shapes: every network that the trainers build, and a sentence for every other."""

from typing import Literal

import pytest

from model.checkpoint_file import CheckpointError
from model.sb3.network import Network, Shape, expected_shapes, read_network
from model.sb3.spec import Recurrence
from tests.model.sb3.saved_models import NETWORK

LAYERS = {"none": (), "one": (4,), "three": (4, 6, 5)}


@pytest.mark.parametrize("critic_layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("actor_layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("num_layers", [1, 2, 11])
@pytest.mark.parametrize("critic", ["lstm", "shared", "linear", None])
def test_every_network_is_known_by_its_shapes(
    critic: Literal["lstm", "shared", "linear"] | None,
    num_layers: int,
    actor_layers: tuple[int, ...],
    critic_layers: tuple[int, ...],
) -> None:
    recurrence = None
    if critic is not None:
        recurrence = Recurrence(hidden_dim=2, num_layers=num_layers, critic=critic)
    network = Network(3, 9, actor_layers, critic_layers, recurrence)
    assert read_network(expected_shapes(network)) == network


def test_the_shapes_are_those_of_the_facts() -> None:
    recurrence = Recurrence(hidden_dim=8, num_layers=1, critic="linear")
    assert expected_shapes(Network(6, 9, (10,), (7,), recurrence)) == {
        "lstm_actor.weight_ih_l0": (32, 6),
        "lstm_actor.weight_hh_l0": (32, 8),
        "lstm_actor.bias_ih_l0": (32,),
        "lstm_actor.bias_hh_l0": (32,),
        "critic.weight": (8, 6),
        "critic.bias": (8,),
        "mlp_extractor.policy_net.0.weight": (10, 8),
        "mlp_extractor.policy_net.0.bias": (10,),
        "action_net.weight": (9, 10),
        "action_net.bias": (9,),
        "mlp_extractor.value_net.0.weight": (7, 8),
        "mlp_extractor.value_net.0.bias": (7,),
        "value_net.weight": (1, 7),
        "value_net.bias": (1,),
    }


EXTRACTOR = (
    "its observations go through an extractor with weights ({!r}), as images do, and those that "
    "are only flattened are read"
)
CNN = ("features_extractor.cnn.0.weight", "pi_features_extractor.a", "vf_features_extractor.b")
POLICY_1 = "mlp_extractor.policy_net.1.weight"
SHARED = "mlp_extractor.shared_net.0.weight"


@pytest.mark.parametrize(
    ("added", "said"),
    [
        *(({name: (3,)}, EXTRACTOR.format(name)) for name in CNN),
        (
            {SHARED: (3, 3)},
            f"its actor and critic share layers ({SHARED!r}), as before version 1.8, and separate "
            "ones are read",
        ),
        ({"log_std": (3,)}, "it has a log_std, and continuous actions are not exported"),
        ({POLICY_1: (3,)}, f"its policy.pth holds {POLICY_1!r}, which is not read"),
        ({"critic.weight": (2, 3)}, "its policy.pth holds 'critic.weight', which is not read"),
        (
            {"lstm_actor.weight_ih_l0_reverse": (8, 3), "b": (), "c": (), "d": ()},
            "its policy.pth holds 'lstm_actor.weight_ih_l0_reverse', 'b', 'c' and others, which is "
            "not read",
        ),
        ({"q_net.0.weight": (4, 4)}, "its policy.pth holds 'q_net.0.weight', which is not read"),
        (
            {"lstm_actor.weight_ih_l7": (8, 2)},
            "its policy.pth holds no 'lstm_actor.weight_ih_l2', 'lstm_actor.weight_hh_l2', "
            "'lstm_actor.bias_ih_l2' and others",
        ),
        (
            {"value_net.weight": (1, 7)},
            "value_net.weight is of shape (1, 7), and the others take (1, 6) of it",
        ),
        (
            {"lstm_critic.weight_ih_l0": (8, 4)},
            "lstm_critic.weight_ih_l0 is of shape (8, 4), and the others take (8, 3) of it",
        ),
        (
            {"lstm_actor.weight_hh_l0": (8, 2, 1)},
            "lstm_actor.weight_hh_l0 is of shape (8, 2, 1), and no matrix",
        ),
        ({"action_net.weight": (0, 4)}, "action_net.weight is of shape (0, 4), and no matrix"),
    ],
    ids=[
        *("extractor", "actor's extractor", "critic's extractor", "shared layers", "log_std"),
        *("a layer between", "two critics", "both directions", "q_net", "layers with a gap"),
        *("value of others", "critic of others", "no matrix", "nothing"),
    ],
)
def test_other_networks_are_refused(added: dict[str, Shape], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_network(expected_shapes(NETWORK) | added)
    assert str(caught.value) == said


@pytest.mark.parametrize("name", sorted(expected_shapes(NETWORK)))
def test_nothing_that_is_missing_goes_unseen(name: str) -> None:
    shapes = {other: shape for other, shape in expected_shapes(NETWORK).items() if other != name}
    with pytest.raises(CheckpointError):
        read_network(shapes)


def test_a_missing_bias_is_named() -> None:
    shapes = expected_shapes(NETWORK)
    del shapes["lstm_actor.bias_ih_l1"], shapes["action_net.bias"]
    with pytest.raises(CheckpointError) as caught:
        read_network(shapes)
    said = "its policy.pth holds no 'lstm_actor.bias_ih_l1', 'action_net.bias'"
    assert str(caught.value) == said


def test_an_empty_state_dict_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        read_network({})
    assert str(caught.value) == "its policy.pth holds no 'action_net.weight'"
