"""What is said of a policy: what would be another step is refused, and every contradiction."""

from typing import Any, get_args

import pytest
import torch

from model.sb3.network import Network
from model.sb3.spec import Activation
from tests.model.sb3.saved_models import (
    ACTOR_CRITIC,
    KWARGS,
    MASKABLE,
    NETWORK,
    RECURRENT,
    box,
    data,
    discrete,
    loaded,
    model,
    multi_binary,
    multi_discrete,
    pickled,
    policy_class,
    refusal,
    state_dict,
)

WITHOUT_LSTM = {"net_arch": {"pi": [4], "vf": [5, 6]}}
MLPS = NETWORK._replace(recurrence=None)
TORCH = "torch.nn.modules.activation"


def mlps(network: Network = MLPS, **changes: object) -> bytes:
    said = {"policy_class": policy_class(ACTOR_CRITIC), "policy_kwargs": WITHOUT_LSTM} | changes
    return model(data(**said), state_dict(network))


def kwargs(**changes: object) -> dict[str, object]:
    return KWARGS | changes


def mirrored(**changes: object) -> dict[str, object]:
    return pickled("dict", **kwargs(**changes))


def test_facts_come_with_where_they_were_read() -> None:
    assert loaded(model()).provenance == {
        "policy_class": "data (text mirror)",
        "action_space": "data (text mirror)",
        "observation": "data (text mirror)",
        "activation": "default of the trainer",
        "hidden_dim": "policy.pth (shapes)",
        "num_layers": "policy.pth (shapes)",
        "critic": "policy.pth (shapes)",
        "actor_layers": "policy.pth (shapes)",
        "critic_layers": "policy.pth (shapes)",
        "normalization": "data (JSON)",
        "stable_baselines3": "2.9.2",
    }
    said = loaded(
        mlps(
            policy_class=policy_class("__main__"),
            policy_kwargs=pickled("dict", activation_fn=f"<class '{TORCH}.ReLU'>"),
            action_space=...,
            observation_space=...,
            _last_original_obs=...,
        ),
        action_space="Discrete(9)",
        observation_space="Discrete(3)",
        normaliser="identity",
        any_policy_class=True,
    )
    assert said.provenance == {
        "policy_class": "--any-policy-class",
        "action_space": "--action-space",
        "observation": "--observation-space",
        "activation": "data (text mirror)",
        "actor_layers": "policy.pth (shapes)",
        "critic_layers": "policy.pth (shapes)",
        "normalization": "--normaliser identity",
        "stable_baselines3": "2.9.2",
    }
    assert said.spec.name == "actor-critic"


@pytest.mark.parametrize(
    ("module", "changes", "name"),
    [
        (MASKABLE, {}, "maskable-ppo"),
        (ACTOR_CRITIC, {}, "ppo"),
        (ACTOR_CRITIC, {"clip_range": ...}, "a2c"),
        (ACTOR_CRITIC, {"clip_range": ..., "cg_max_steps": 10}, "actor-critic"),
        (ACTOR_CRITIC, {"clip_range": ..., "gae_lambda": ...}, "actor-critic"),
    ],
)
def test_the_algorithm_names_the_policy(module: str, changes: dict[str, Any], name: str) -> None:
    assert loaded(mlps(policy_class=policy_class(module), **changes)).spec.name == name
    assert loaded(model()).spec.name == "recurrent-ppo"


@pytest.mark.parametrize("activation", get_args(Activation))
def test_an_activation_is_told_by_its_class(activation: str) -> None:
    module = "linear" if activation == "Identity" else "activation"
    said = mirrored(activation_fn=f"<class 'torch.nn.modules.{module}.{activation}'>")
    assert loaded(model(policy_kwargs=said)).spec.activation == activation


READ = ", ".join(get_args(Activation))
NO_ARGUMENTS = "and a class of torch.nn without arguments is read"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"<class '{TORCH}.PReLU'>", f"{TORCH}.PReLU, and of torch.nn are read {READ}"),
        (f"<class '{TORCH}.Softmax'>", f"{TORCH}.Softmax, and of torch.nn are read {READ}"),
        ("<class '__main__.Tanh'>", f"__main__.Tanh, and of torch.nn are read {READ}"),
        ("<function <lambda> at 0x7f>", f"'<function <lambda> at 0x7f>', {NO_ARGUMENTS}"),
        ("functools.partial(ELU, alpha=2)", f"'functools.partial(ELU, alpha=2)', {NO_ARGUMENTS}"),
        (None, f"None, {NO_ARGUMENTS}"),
    ],
    ids=["trained", "across", "own", "lambda", "partial", "none"],
)
def test_other_activations_are_refused(text: object, said: str) -> None:
    content = model(policy_kwargs=mirrored(activation_fn=text))
    assert refusal(content) == f"its activation is {said}"


FLAG = (
    "--any-policy-class reads it as one of Stable-Baselines3's own, which its weights then have to "
    "fit"
)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            policy_class("__main__"),
            f"its policy is a class of '__main__', which may do anything; {FLAG}",
        ),
        (
            policy_class("sb3_contribution.policies"),
            f"its policy is a class of 'sb3_contribution.policies', which may do anything; {FLAG}",
        ),
        (..., f"its data does not say of what module its policy is; {FLAG}"),
        ("MlpPolicy", f"its data does not say of what module its policy is; {FLAG}"),
        (pickled("abc.ABCMeta"), f"its data does not say of what module its policy is; {FLAG}"),
    ],
    ids=["own", "named alike", "none", "text", "no module"],
)
def test_a_class_that_is_not_the_trainers_takes_a_flag(entry: object, said: str) -> None:
    content = model(policy_class=entry)
    assert refusal(content) == said
    checkpoint = loaded(content, any_policy_class=True)
    assert checkpoint.spec == loaded(model()).spec.model_copy(update={"name": "actor-critic"})


def test_the_flag_takes_unknown_arguments_but_no_other_shapes() -> None:
    own = {"policy_class": policy_class("__main__")}
    said = {"policy_kwargs": {"depth": 3}} | own
    assert loaded(model(**said), any_policy_class=True).spec == loaded(model()).spec.model_copy(
        update={"name": "actor-critic"}
    )
    wrong = model(**own, policy_kwargs=kwargs(lstm_hidden_size=3))
    assert refusal(wrong, any_policy_class=True) == (
        "its lstm_hidden_size is 3 in its data and 2 in its policy.pth"
    )
    more = model(weights=state_dict() | {"embedding": state_dict()["value_net.bias"]}, **own)
    assert refusal(more, any_policy_class=True) == (
        "its policy.pth holds 'embedding', which is not read"
    )


@pytest.mark.parametrize(
    "module",
    [
        *("stable_baselines3.dqn.policies", "stable_baselines3.sac.policies"),
        *("stable_baselines3.td3.policies", "sb3_contrib.qrdqn.policies"),
    ],
)
def test_other_algorithms_are_refused_by_name(module: str) -> None:
    content = model(policy_class=policy_class(module))
    said = (
        f"its policy is of {module}, and policies of RecurrentPPO, MaskablePPO, PPO and A2C are "
        "read"
    )
    assert refusal(content) == refusal(content, any_policy_class=True) == said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"policy_kwargs": ...},
            "its data has no policy_kwargs, and its policy may be of any kind",
        ),
        (
            {"policy_kwargs": pickled("__main__.Arguments", net_arch=[4])},
            "its data has no policy_kwargs, and its policy may be of any kind",
        ),
        (
            {"policy_kwargs": kwargs(depth=3, attention=True)},
            f"its policy was given 'attention', 'depth', which {RECURRENT} does not know",
        ),
        ({"use_sde": True}, "it explores by gSDE, and continuous actions are not exported"),
        (
            {"policy_kwargs": kwargs(use_sde=True)},
            "it explores by gSDE, and continuous actions are not exported",
        ),
        (
            {"policy_kwargs": kwargs(squash_output=True)},
            "it squashes its output, and continuous actions are not exported",
        ),
        (
            {"policy_kwargs": mirrored(features_extractor_class="<class '__main__.Scaled'>")},
            "its observations go through __main__.Scaled, and those of FlattenExtractor and "
            "CombinedExtractor are read",
        ),
        (
            {"policy_kwargs": kwargs(lstm_kwargs={"batch_first": True})},
            "its LSTM was given batch_first=True, which is not read",
        ),
        (
            {"policy_kwargs": kwargs(lstm_kwargs={"proj_size": 1})},
            "its LSTM was given proj_size=1, which is not read",
        ),
        (
            {"policy_kwargs": mirrored(lstm_kwargs="{'dtype': torch.float64}")},
            "its lstm_kwargs are \"{'dtype': torch.float64}\", and no plain JSON",
        ),
        ({"action_space": ...}, "its data has no action space; --action-space says it"),
        (
            {"observation_space": "a"},
            "its data has no observation space; --observation-space says it",
        ),
        (
            {"action_space": multi_discrete("[2 2 ... 2]")},
            "its action space: '[2 2 ... 2]' leaves numbers out, as NumPy prints more than 1000; "
            "--action-space says it",
        ),
        (
            {"action_space": box([3])},
            "its action space is a Box, and continuous actions are not exported",
        ),
        (
            {"observation_space": box([4])},
            "its observation space has 4 numbers, and its policy.pth reads 3",
        ),
        (
            {"action_space": discrete(8)},
            "its action space takes 8 rows of action_net, which has 9",
        ),
        (
            {"action_space": multi_binary(2**31 - 1)},
            "its action space takes 2147483647 rows of action_net, which has 9",
        ),
        (
            {"policy_kwargs": kwargs(net_arch=[4])},
            "its net_arch is ([4], [4]) in its data and ([4], [5, 6]) in its policy.pth",
        ),
        (
            {"policy_kwargs": {"lstm_hidden_size": 2, "n_lstm_layers": 2}},
            "its net_arch is ([64, 64], [64, 64]) in its data and ([4], [5, 6]) in its policy.pth",
        ),
        (
            {"policy_kwargs": kwargs(n_lstm_layers=1)},
            "its n_lstm_layers is 1 in its data and 2 in its policy.pth",
        ),
        (
            {"policy_kwargs": kwargs(enable_critic_lstm=False)},
            "its enable_critic_lstm is False in its data and True in its policy.pth",
        ),
        (
            {"policy_kwargs": kwargs(shared_lstm=True)},
            "its shared_lstm is True in its data and False in its policy.pth",
        ),
        (
            {"policy_class": policy_class(ACTOR_CRITIC)},
            f"its policy is of {ACTOR_CRITIC}, and its policy.pth holds an LSTM",
        ),
        (
            {"_last_original_obs": pickled("numpy.ndarray")},
            "was trained with VecNormalize, whose statistics are not in it: --normaliser FILE "
            "brings the vec_normalize.pkl saved beside it, --normaliser identity says that there "
            "are none",
        ),
        (
            {"_last_original_obs": ...},
            "may have been trained with VecNormalize, whose statistics are not in it: --normaliser "
            "FILE brings the vec_normalize.pkl saved beside it, --normaliser identity says that "
            "there are none",
        ),
    ],
    ids=[
        *("no arguments", "arguments of another type", "unknown arguments", "gSDE", "gSDE told"),
        *("squashed", "own extractor", "batch first", "projection", "LSTM of another dtype"),
        *("no actions", "no observations", "ellipsis", "continuous"),
        *("observation's size", "actions' size", "a great many heads", "MLPs", "default MLPs"),
        *("LSTM layers", "critic's LSTM", "shared LSTM", "LSTM of others", "normalised"),
        "perhaps normalised",
    ],
)  # fmt: skip
def test_what_would_be_another_step_is_refused(changes: dict[str, Any], said: str) -> None:
    assert refusal(model(**changes)) == said


def test_an_lstm_is_missed_where_it_should_be() -> None:
    content = mlps(policy_class=policy_class(RECURRENT))
    assert refusal(content) == f"its policy is of {RECURRENT}, and its policy.pth holds no LSTM"


@pytest.mark.parametrize(
    "changes",
    [
        {"policy_kwargs": kwargs(lstm_kwargs={"dropout": 0.5, "bias": True, "proj_size": 0})},
        {"policy_kwargs": kwargs(lstm_kwargs=None, ortho_init=False, normalize_images=False)},
        {"policy_kwargs": kwargs(share_features_extractor=False, optimizer_kwargs={"eps": 1e-5})},
        {"policy_kwargs": kwargs(net_arch=[{"pi": [4], "vf": [5, 6]}])},
        {"policy_kwargs": mirrored(net_arch="{'pi': [np.int64(4)], 'vf': [5, 6]}")},
        {
            "policy_kwargs": mirrored(
                features_extractor_class="<class 'stable_baselines3.common.torch_layers."
                "FlattenExtractor'>",
                optimizer_class="<class 'torch.optim.adamw.AdamW'>",
            )
        },
        {"use_sde": ...},
    ],
    ids=["dropout", "initialised", "unshared", "as before 1.8", "NumPy's", "flattened", "no gSDE"],
)
def test_what_changes_no_step_changes_nothing(changes: dict[str, Any]) -> None:
    assert loaded(model(**changes)).spec == loaded(model()).spec


def test_what_the_user_says_fills_in_and_repeats_but_does_not_contradict() -> None:
    spec = loaded(model()).spec
    assert loaded(model(), action_space="MultiDiscrete([3, 4, 2])").spec == spec
    assert loaded(model(), observation_space="Box(-9, 9, (3,), float32)").spec == spec
    torn = model(action_space=multi_discrete("[3 ... 2]"), observation_space=pickled("Own"))
    said = {"action_space": "MultiDiscrete([3 4 2])", "observation_space": "Box(0, 1, (3,), int8)"}
    assert loaded(torn, **said).spec == spec
    assert refusal(model(), action_space="MultiDiscrete([2 4 3])") == (
        "--action-space says MultiDiscrete(nvec=(2, 4, 3), start=(0, 0, 0)), and its data "
        "MultiDiscrete(nvec=(3, 4, 2), start=(0, 0, 0))"
    )
    assert refusal(model(), observation_space="Discrete(3)") == (
        "--observation-space says Discrete(n=3, start=0), and its data Box(shape=(3,), "
        "dtype='float32')"
    )
    assert refusal(model(), observation_space="Discrete") == (
        "--observation-space: 'Discrete' is no space as it is printed, such as "
        "MultiDiscrete([3 4 2])"
    )


@pytest.mark.parametrize(
    ("module", "rows", "wrong", "is_doubled"),
    [(MASKABLE, 6, 3, False), (ACTOR_CRITIC, 3, 6, True)],
)
def test_a_choice_of_two_has_the_rows_that_its_trainer_gives_it(
    module: str, rows: int, wrong: int, is_doubled: bool
) -> None:
    said: dict[str, Any] = {"action_space": multi_binary(3)}
    right, other = (MLPS._replace(rows=number) for number in (rows, wrong))
    checkpoint = loaded(mlps(right, policy_class=policy_class(module), **said))
    unknown = mlps(right, policy_class=policy_class("__main__"), **said)
    of_own_class = loaded(unknown, any_policy_class=True)
    for name in ("action_net.weight", "action_net.bias"):
        saved, read = state_dict(right)[name], checkpoint.state_dict[name]
        assert torch.equal(read[1::2] if is_doubled else read, saved)
        assert not (is_doubled and read[::2].any())
        assert torch.equal(read, of_own_class.state_dict[name])
    assert checkpoint.spec.head_sizes == (2, 2, 2)
    assert refusal(mlps(other, policy_class=policy_class(module), **said)) == (
        f"its action space takes {rows} rows of action_net, which has {wrong}"
    )


def test_the_attributes_that_are_read_are_the_only_ones_needed() -> None:
    assert loaded(model(data(clip_range=..., gae_lambda=..., use_sde=...))).spec == (
        loaded(model()).spec
    )
