"""What `data` says of a policy where its weights' shapes do not tell, and where each fact stood.

Facts: stable-baselines3 and sb3-contrib 2.9.2, the policies' constructors.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast, get_args

from model.checkpoint_file import CheckpointError, names, short
from model.sb3.mirror import Mirror
from model.sb3.network import Network
from model.sb3.space_text import Space, mirrored_space, parse_space
from model.sb3.spaces import choices
from model.sb3.spec import Activation

JSON = "data (JSON)"
TEXT_MIRROR = "data (text mirror)"
DEFAULT = "default of the trainer"

RECURRENT = "sb3_contrib.common.recurrent.policies"
MASKABLE = "sb3_contrib.common.maskable.policies"
ACTOR_CRITIC = "stable_baselines3.common.policies"
OWN_MODULES = (ACTOR_CRITIC, MASKABLE, RECURRENT)
OF_THE_TRAINER = ("stable_baselines3.", "sb3_contrib.")
SUPPORTED = "RecurrentPPO, MaskablePPO, PPO and A2C"
ANY_NAME = "actor-critic"

OPTIONS = {"action_space": "--action-space", "observation_space": "--observation-space"}

TORCH_CLASS = re.compile(r"<class 'torch\.nn\.modules\.\w+\.(\w+)'>")
ANY_CLASS = re.compile(r"<class '([\w.<>]+)'>")
FLATTENING = {
    "<class 'stable_baselines3.common.torch_layers.FlattenExtractor'>",
    "<class 'stable_baselines3.common.torch_layers.CombinedExtractor'>",
}

WITHOUT_EFFECT = {
    "features_extractor_kwargs",
    "full_std",
    "log_std_init",
    "normalize_images",
    "optimizer_class",
    "optimizer_kwargs",
    "ortho_init",
    "sde_net_arch",
    "share_features_extractor",
    "use_expln",
}
"""On a step of discrete actions whose observation is flattened and no image."""
SIZES = {
    "lstm_hidden_size": 256,
    "n_lstm_layers": 1,
    "shared_lstm": False,
    "enable_critic_lstm": True,
}
"""What a recurrent policy is told of its LSTMs, and the defaults."""
WITH_EFFECT = {
    *SIZES,
    "activation_fn",
    "features_extractor_class",
    "lstm_kwargs",
    "net_arch",
    "squash_output",
    "use_sde",
}
LSTM_AS_READ = {"bias": True, "batch_first": False, "bidirectional": False, "proj_size": 0}
"""Of torch's own arguments; dropout is no part of a step."""
NET_ARCH = {"pi": [64, 64], "vf": [64, 64]}


class Description(NamedTuple):
    """`policy_module` is one of `OWN_MODULES`, or None for a class of the user's own.

    `was_normalized` is None where the file does not say.
    """

    name: str
    policy_module: str | None
    policy_kwargs: Mapping[str, object]
    action_space: Space
    num_choices: int
    observation_space: Space
    activation: Activation
    was_normalized: bool | None
    provenance: dict[str, str]


def read_description(
    attributes: Mapping[str, object],
    *,
    action_space: str | None,
    observation_space: str | None,
    any_policy_class: bool,
) -> Description:
    """What a model's attributes say, with the spaces that its user says.

    Raises CheckpointError for policies of other trainers, for a class of the user's own unless
    `any_policy_class`, for what the step would do beyond what is read, and for facts that are
    missing or contradict each other.
    """
    provenance: dict[str, str] = {}
    module = _policy_module(attributes, any_policy_class)
    provenance["policy_class"] = "--any-policy-class" if module is None else TEXT_MIRROR
    kwargs, where = _policy_kwargs(attributes)
    unknown = kwargs.keys() - WITH_EFFECT - WITHOUT_EFFECT
    if unknown and module is not None:
        raise CheckpointError(
            f"its policy was given {names(sorted(unknown))}, which {module} does not know"
        )
    action, provenance["action_space"] = _space(attributes, "action_space", action_space)
    num_choices = choices(action)
    observation, provenance["observation"] = _space(
        attributes, "observation_space", observation_space
    )
    _refuse_other_steps(attributes, kwargs)
    provenance["activation"] = where if "activation_fn" in kwargs else DEFAULT
    original = "_last_original_obs"
    return Description(
        name=_name(module, attributes),
        policy_module=module,
        policy_kwargs=kwargs,
        action_space=action,
        num_choices=num_choices,
        observation_space=observation,
        activation=_activation(kwargs),
        was_normalized=attributes[original] is not None if original in attributes else None,
        provenance=provenance,
    )


def check_network(description: Description, network: Network) -> None:
    """Raises CheckpointError where the description has other sizes than the weights."""
    module, kwargs = description.policy_module, description.policy_kwargs
    recurrence = network.recurrence
    if module is not None and (recurrence is not None) != (module == RECURRENT):
        has = "an LSTM" if recurrence else "no LSTM"
        raise CheckpointError(f"its policy is of {module}, and its policy.pth holds {has}")
    said = _net_arch(kwargs, has_default=module is not None)
    held = (list(network.actor_layers), list(network.critic_layers))
    if said is not None and said != held:
        raise _contradiction("net_arch", said, held)
    if recurrence is None:
        return
    sizes: dict[str, object] = {
        "lstm_hidden_size": recurrence.hidden_dim,
        "n_lstm_layers": recurrence.num_layers,
        "shared_lstm": recurrence.critic == "shared",
        "enable_critic_lstm": recurrence.critic == "lstm",
    }
    defaults = SIZES if module is not None else sizes
    for name, value in sizes.items():
        said_size = kwargs.get(name, defaults[name])
        if isinstance(said_size, int) and said_size != value:
            raise _contradiction(name, said_size, value)


def _policy_module(attributes: Mapping[str, object], any_policy_class: bool) -> str | None:
    mirror = attributes.get("policy_class")
    module = mirror.attributes.get("__module__") if isinstance(mirror, Mirror) else None
    if isinstance(module, str) and module in OWN_MODULES:
        return module
    if isinstance(module, str) and module.startswith(OF_THE_TRAINER):
        raise CheckpointError(
            f"its policy is of {short(module)[1:-1]}, and policies of {SUPPORTED} are read"
        )
    if any_policy_class:
        return None
    if module is None:
        raise CheckpointError(
            "its data does not say of what module its policy is; --any-policy-class reads it as "
            "one of Stable-Baselines3's own, which its weights then have to fit"
        )
    raise CheckpointError(
        f"its policy is a class of {short(module)}, which may do anything; --any-policy-class "
        "reads it as one of Stable-Baselines3's own, which its weights then have to fit"
    )


def _policy_kwargs(attributes: Mapping[str, object]) -> tuple[Mapping[str, object], str]:
    kwargs = attributes.get("policy_kwargs")
    if isinstance(kwargs, dict):
        return kwargs, JSON
    if isinstance(kwargs, Mirror) and kwargs.type == "<class 'dict'>":
        return kwargs.attributes, TEXT_MIRROR
    raise CheckpointError("its data has no policy_kwargs, and its policy may be of any kind")


def _space(attributes: Mapping[str, object], name: str, said: str | None) -> tuple[Space, str]:
    """The file's own, which what the user says may only repeat, or else the user's."""
    option, words = OPTIONS[name], name.replace("_", " ")
    given = None
    if said is not None:
        try:
            given = parse_space(said)
        except CheckpointError as error:
            raise CheckpointError(f"{option}: {error}") from error
    mirror = attributes.get(name)
    if isinstance(mirror, Mirror):
        try:
            read = mirrored_space(mirror)
        except CheckpointError as error:
            if given is None:
                raise CheckpointError(f"its {words}: {error}; {option} says it") from error
        else:
            if given not in (None, read):
                raise CheckpointError(f"{option} says {short(given)}, and its data {short(read)}")
            return read, TEXT_MIRROR
    if given is None:
        raise CheckpointError(f"its data has no {words}; {option} says it")
    return given, option


def _refuse_other_steps(attributes: Mapping[str, object], kwargs: Mapping[str, object]) -> None:
    """What else would change a step."""
    if attributes.get("use_sde") not in (None, False) or kwargs.get("use_sde") not in (None, False):
        raise CheckpointError("it explores by gSDE, and continuous actions are not exported")
    if kwargs.get("squash_output", False) is not False:
        raise CheckpointError("it squashes its output, and continuous actions are not exported")
    extractor = kwargs.get("features_extractor_class")
    if extractor is not None and extractor not in FLATTENING:
        raise CheckpointError(
            f"its observations go through {_class_name(extractor)}, and those of FlattenExtractor "
            "and CombinedExtractor are read"
        )
    lstm = kwargs.get("lstm_kwargs")
    if lstm is None:
        return
    if not isinstance(lstm, dict):
        raise CheckpointError(f"its lstm_kwargs are {short(lstm)}, and no plain JSON")
    for key, value in lstm.items():
        if key != "dropout" and (key not in LSTM_AS_READ or value != LSTM_AS_READ[key]):
            raise CheckpointError(f"its LSTM was given {key}={short(value)}, which is not read")


def _activation(kwargs: Mapping[str, object]) -> Activation:
    if "activation_fn" not in kwargs:
        return "Tanh"
    said = kwargs["activation_fn"]
    if not isinstance(said, str) or not ANY_CLASS.fullmatch(said):
        raise CheckpointError(
            f"its activation is {short(said)}, and a class of torch.nn without arguments is read"
        )
    found = TORCH_CLASS.fullmatch(said)
    if found is None or found[1] not in get_args(Activation):
        raise CheckpointError(
            f"its activation is {_class_name(said)}, and of torch.nn are read "
            f"{', '.join(get_args(Activation))}"
        )
    return cast(Activation, found[1])


def _class_name(said: object) -> str:
    found = ANY_CLASS.fullmatch(said) if isinstance(said, str) else None
    return short(found[1])[1:-1] if found else short(said)


def _name(module: str | None, attributes: Mapping[str, object]) -> str:
    """The algorithm's, which shows in what it is set to."""
    if module == RECURRENT:
        return "recurrent-ppo"
    if module == MASKABLE:
        return "maskable-ppo"
    if module == ACTOR_CRITIC and "clip_range" in attributes:
        return "ppo"
    is_a2c = "gae_lambda" in attributes and "cg_max_steps" not in attributes
    return "a2c" if module == ACTOR_CRITIC and is_a2c else ANY_NAME


def _net_arch(
    kwargs: Mapping[str, object], has_default: bool
) -> tuple[list[int], list[int]] | None:
    """The actor's layers and the critic's; None where the shapes alone tell."""
    said: Any = kwargs.get("net_arch")
    if said is None and has_default:
        said = NET_ARCH
    if isinstance(said, list) and len(said) == 1 and isinstance(said[0], dict):
        said = said[0]  # as before version 1.8
    actor, critic = (said.get(key, []) if isinstance(said, dict) else said for key in ("pi", "vf"))
    return (actor, critic) if _are_sizes(actor) and _are_sizes(critic) else None


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) for size in value)


def _contradiction(name: str, said: object, held: object) -> CheckpointError:
    return CheckpointError(
        f"its {name} is {short(said)} in its data and {short(held)} in its policy.pth"
    )
