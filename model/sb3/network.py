"""What a state_dict's names and shapes say of the network: LSTMs, the critic's way, MLPs.

Torch-free. Facts: stable-baselines3 and sb3-contrib 2.9.2.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from model.checkpoint_file import CheckpointError, names, short
from model.sb3.spec import Recurrence

Shape = tuple[int, ...]

EXTRACTORS = ("features_extractor.", "pi_features_extractor.", "vf_features_extractor.")
SHARED_LAYERS = "mlp_extractor.shared_net."
LSTM_PART = re.compile(r"lstm_actor\.weight_ih_l(0|[1-9][0-9]{0,3})")


class Network(NamedTuple):
    """Its sizes; `rows` are those of `action_net`, one a logit."""

    observation_dim: int
    rows: int
    actor_layers: tuple[int, ...]
    critic_layers: tuple[int, ...]
    recurrence: Recurrence | None


def read_network(shapes: Mapping[str, Shape]) -> Network:
    """The network whose state_dict has exactly these names and shapes.

    Raises CheckpointError for every other: an extractor with weights, layers that actor and critic
    share, continuous actions, and a tensor that is missing, unknown or of another shape.
    """
    _refuse_what_is_known(shapes)
    network = Network(
        observation_dim=_observation_dim(shapes),
        rows=_size(shapes, "action_net.weight", 0),
        actor_layers=_mlp(shapes, "policy_net"),
        critic_layers=_mlp(shapes, "value_net"),
        recurrence=_recurrence(shapes),
    )
    expected = expected_shapes(network)
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise CheckpointError(f"its policy.pth holds no {names(missing)}")
    unknown = [name for name in shapes if name not in expected]
    if unknown:
        raise CheckpointError(f"its policy.pth holds {names(unknown)}, which is not read")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"{name} is of shape {shapes[name]}, and the others take {shape} of it"
            )
    return network


def expected_shapes(network: Network) -> dict[str, Shape]:
    """The state_dict's names and shapes."""
    recurrence = network.recurrence
    shapes: dict[str, Shape] = {}
    width = network.observation_dim
    if recurrence is not None:
        width = recurrence.hidden_dim
        shapes |= _lstm("lstm_actor", network.observation_dim, recurrence)
        if recurrence.critic == "lstm":
            shapes |= _lstm("lstm_critic", network.observation_dim, recurrence)
        if recurrence.critic == "linear":
            shapes |= _linear("critic", network.observation_dim, width)
    for mlp, last, layers, outputs in (
        ("policy_net", "action_net", network.actor_layers, network.rows),
        ("value_net", "value_net", network.critic_layers, 1),
    ):
        before = width
        for index, size in enumerate(layers):
            shapes |= _linear(f"mlp_extractor.{mlp}.{2 * index}", before, size)
            before = size
        shapes |= _linear(last, before, outputs)
    return shapes


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _lstm(name: str, inputs: int, recurrence: Recurrence) -> dict[str, Shape]:
    hidden = recurrence.hidden_dim
    shapes: dict[str, Shape] = {}
    for layer in range(recurrence.num_layers):
        shapes |= {
            f"{name}.weight_ih_l{layer}": (4 * hidden, hidden if layer else inputs),
            f"{name}.weight_hh_l{layer}": (4 * hidden, hidden),
            f"{name}.bias_ih_l{layer}": (4 * hidden,),
            f"{name}.bias_hh_l{layer}": (4 * hidden,),
        }
    return shapes


def _refuse_what_is_known(shapes: Iterable[str]) -> None:
    for name in shapes:
        if name.startswith(EXTRACTORS):
            raise CheckpointError(
                f"its observations go through an extractor with weights ({short(name)}), as images "
                "do, and those that are only flattened are read"
            )
        if name.startswith(SHARED_LAYERS):
            raise CheckpointError(
                f"its actor and critic share layers ({short(name)}), as before version 1.8, and "
                "separate ones are read"
            )
        if name == "log_std":
            raise CheckpointError("it has a log_std, and continuous actions are not exported")


def _observation_dim(shapes: Mapping[str, Shape]) -> int:
    for name in ("lstm_actor.weight_ih_l0", "mlp_extractor.policy_net.0.weight"):
        if name in shapes:
            return _size(shapes, name, 1)
    return _size(shapes, "action_net.weight", 1)


def _recurrence(shapes: Mapping[str, Shape]) -> Recurrence | None:
    layers = [found[1] for name in shapes if (found := LSTM_PART.fullmatch(name))]
    if not layers:
        return None
    if any(name.startswith("lstm_critic.") for name in shapes):
        critic = "lstm"
    else:
        critic = "linear" if "critic.weight" in shapes else "shared"
    return Recurrence.model_validate(
        {
            "hidden_dim": _size(shapes, "lstm_actor.weight_hh_l0", 1),
            "num_layers": len(layers),
            "critic": critic,
        }
    )


def _mlp(shapes: Mapping[str, Shape], name: str) -> tuple[int, ...]:
    sizes: list[int] = []
    while (weight := f"mlp_extractor.{name}.{2 * len(sizes)}.weight") in shapes:
        sizes.append(_size(shapes, weight, 0))
    return tuple(sizes)


def _size(shapes: Mapping[str, Shape], name: str, axis: int) -> int:
    if name not in shapes:
        raise CheckpointError(f"its policy.pth holds no {short(name)}")
    shape = shapes[name]
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{name} is of shape {shape}, and no matrix")
    return shape[axis]
