"""The weights as an artifact holds them: the policy's own, whoever wrapped it, and copies."""

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from export.exporter import export_policy
from export.families import family_of
from export.manifest import ArtifactError
from export.tamiyo_step import TamiyoStep
from export.weights import NORMALIZER_PREFIX, WEIGHTS_FILE, pack_weights, rebuild
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.export.gate_cases import small_v1, small_v2, statistics
from tests.gate import gate_of, judged
from tests.random_inputs import random_policy

CPU = torch.device("cpu")
FLOORED = small_v2(extras=True, floors=True, value_scale=3.0)
SPECS = {"v1": small_v1(num_layers=2), "v2": FLOORED}

VERSIONS = {
    ("v1", False): "4b4a6bbb47096491bb1aa311e33c2eff2d1ede9d6ef5385c0fabd94eceb3e0f6",
    ("v1", True): "39b8fc352c0e5e1db47ba9c34a2525dfe804a0fd0a3cfb3d67733d12fe40635d",
    ("v2", False): "1b3726b2ce8f6ffee15eda5e765a2cebfa38da169387bb68a3eb3623acf1debd",
    ("v2", True): "a8b6ee3f7abe877bde182e46259d868d9c35d84403a0eab7fbdfb6a4f13431f3",
}
"""The SHA-256 that earlier releases' exports (54b58f5) gave the weights `by_formula`, without a
normaliser and with one."""


@pytest.fixture(params=SPECS)
def policy(request: pytest.FixtureRequest) -> FactoredRecurrentActorCritic:
    return random_policy(SPECS[request.param])


@pytest.fixture
def floored() -> FactoredRecurrentActorCritic:
    return random_policy(FLOORED)


@pytest.fixture
def normalizer(policy: FactoredRecurrentActorCritic) -> ObservationNormalizer:
    return statistics(policy.spec.observation_dim)


def by_formula(like: Tensor, start: int = 0) -> Tensor:
    """Numbers from -0.5 to 0.5 XX."""
    number = torch.arange(start, start + like.numel(), dtype=torch.int64)
    fraction = (number * 2654435761 % 65536).double() / 65536
    return (fraction - 0.5).float().view(like.shape)


def policy_by_formula(spec: PolicySpec) -> FactoredRecurrentActorCritic:
    policy = FactoredRecurrentActorCritic(spec)
    start = 0
    for weight in policy.state_dict().values():
        weight.copy_(by_formula(weight, start))
        start += weight.numel()
    return policy


@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize(
    ("name", "spec"), [("v1", PolicySpec.tamiyo_v1()), ("v2", PolicySpec.tamiyo_v2())]
)
def test_version_of_weights_is_what_earlier_releases_gave_them(
    name: str, spec: PolicySpec, is_normalized: bool
) -> None:
    statistic = by_formula(torch.zeros(spec.observation_dim))
    normalizer = ObservationNormalizer(statistic, statistic + 1) if is_normalized else None
    content = pack_weights(policy_by_formula(spec), normalizer)
    assert hashlib.sha256(content).hexdigest() == VERSIONS[name, is_normalized]


def test_rebuilt_policy_is_the_one_packed_and_shares_nothing_with_it(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer
) -> None:
    rebuilt = rebuild(pack_weights(policy, normalizer), policy.spec, CPU)
    assert rebuilt.normalizer is not None
    for one, other in ((rebuilt.policy, policy), (rebuilt.normalizer, normalizer)):
        mine, theirs = one.state_dict(), other.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert memory_of(one).isdisjoint(memory_of(other))
        assert not one.training
    assert not any(parameter.requires_grad for parameter in rebuilt.policy.parameters())


def test_policy_without_normaliser_is_rebuilt_without_one(
    policy: FactoredRecurrentActorCritic,
) -> None:
    assert rebuild(pack_weights(policy, None), policy.spec, CPU).normalizer is None


def test_compiled_policy_has_the_weights_of_the_plain_one(
    policy: FactoredRecurrentActorCritic,
) -> None:
    compiled = torch.compile(policy, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert any("_orig_mod" in name for name in compiled.state_dict())
    assert pack_weights(compiled, None) == pack_weights(policy, None)


@pytest.mark.parametrize("part", ["feature_net", "lstm", "op_head"])
def test_policy_with_a_compiled_part_has_the_weights_of_the_plain_one(
    policy: FactoredRecurrentActorCritic, part: str
) -> None:
    partly = copy.deepcopy(policy)
    setattr(partly, part, torch.compile(partly.get_submodule(part), backend="eager"))
    assert any("_orig_mod" in name for name in partly.state_dict())
    assert dict(load(pack_weights(partly, None))).keys() == policy.state_dict().keys()
    rebuilt = rebuild(pack_weights(partly, None), policy.spec, CPU).policy.state_dict()
    assert all(torch.equal(rebuilt[name], weight) for name, weight in policy.state_dict().items())


def test_two_weights_of_one_name_are_refused(policy: FactoredRecurrentActorCritic) -> None:
    policy.add_module("_orig_mod", nn.ModuleDict({"feature_net": policy.feature_net}))
    with pytest.raises(ValueError, match=r"two weights called 'feature_net\.0\.weight'.*_orig_mod"):
        pack_weights(policy, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    policy: FactoredRecurrentActorCritic, bad: float
) -> None:
    policy.get_parameter("op_head.2.bias").data[1] = bad
    with pytest.raises(ValueError, match=r"'op_head\.2\.bias' holds NaN or infinity"):
        pack_weights(policy, None)


def test_a_normaliser_of_other_features_is_refused_before_anything_is_written(
    policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    others = statistics(policy.spec.observation_dim + 1)
    with pytest.raises(
        ValueError, match=r"the normaliser is for \d+ features, and the policy reads"
    ):
        export_policy(policy, others, tmp_path / "it", name="it")
    assert list(tmp_path.iterdir()) == []


def test_a_normaliser_that_is_not_finite_is_refused_by_feature(
    policy: FactoredRecurrentActorCritic,
) -> None:
    spoilt = statistics(policy.spec.observation_dim)
    spoilt.var[3] = torch.nan
    with pytest.raises(ValueError, match="statistics of feature 3 are"):
        pack_weights(policy, spoilt)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_policy_of_another_dtype_is_packed_in_float32(
    policy: FactoredRecurrentActorCritic, dtype: torch.dtype
) -> None:
    cast = copy.deepcopy(policy).to(dtype)
    packed = load(pack_weights(cast, None))
    for name, weight in cast.state_dict().items():
        if weight.is_floating_point():
            assert weight.dtype == dtype
            assert torch.equal(packed[name], weight.float())
            assert packed[name].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floors_of_a_policy_that_was_cast_are_those_of_its_spec(
    floored: FactoredRecurrentActorCritic, dtype: torch.dtype
) -> None:
    """The cast rounds the buffer that holds them, and casting back does not mend it."""
    cast = floored.to(dtype).float()
    of_spec = torch.tensor([[head.probability_floor] for head in FLOORED.heads])
    assert not torch.equal(cast.heads.floor, of_spec)
    rebuilt = rebuild(pack_weights(cast, None), FLOORED, CPU)
    assert torch.equal(rebuilt.policy.heads.floor, of_spec)
    step = family_of(FLOORED).step(*rebuilt, "fp32")
    assert torch.equal(step.heads.floor, of_spec)


def test_step_of_a_policy_that_was_cast_has_its_specs_floors_whoever_packs_it(
    floored: FactoredRecurrentActorCritic,
) -> None:
    gate = gate_of(floored.half().float(), max_batch_size=64)
    with torch.inference_mode():
        judged(gate, TamiyoStep(floored, None).eval())


def test_normaliser_in_float64_is_packed_in_float32(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer
) -> None:
    wide = copy.deepcopy(normalizer).double()
    assert wide.mean.dtype == torch.float64
    assert pack_weights(policy, wide) == pack_weights(policy, normalizer)


def test_normaliser_is_beside_the_policy_under_a_prefix(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer
) -> None:
    packed = load(pack_weights(policy, normalizer))
    beside = packed.keys() - policy.state_dict().keys()
    assert beside == {f"{NORMALIZER_PREFIX}mean", f"{NORMALIZER_PREFIX}var"}


def test_packed_step_shares_no_memory_with_its_policy(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer
) -> None:
    step = TamiyoStep(policy, normalizer)
    assert memory_of(step).isdisjoint(memory_of(policy) | memory_of(normalizer))


def memory_of(module: nn.Module) -> set[int]:
    """Where its parameters and buffers lie, those that no state_dict has included."""
    return {
        array.untyped_storage().data_ptr()
        for array in (*module.parameters(), *module.buffers())
        if array.numel() > 0
    }


def overwrite(module: nn.Module) -> None:
    with torch.no_grad():
        for array in (*module.parameters(), *module.buffers()):
            array.zero_()


@torch.inference_mode()
def test_step_answers_as_before_once_its_policy_is_overwritten(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer
) -> None:
    step = TamiyoStep(policy, normalizer).eval()
    inputs = step.example(batch_size=3)
    before = step(*inputs)
    overwrite(policy)
    overwrite(normalizer)
    assert all(map(torch.equal, step(*inputs), before))


@pytest.mark.parametrize("stage", ["exporting torchscript", "running the policy's own episodes"])
def test_policy_that_is_overwritten_during_its_export_is_exported_as_it_was(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.measurement.SECONDS_PER_BATCH_SIZE", 0.01)
    policy = random_policy(FLOORED)
    normalizer = statistics(FLOORED.observation_dim)
    weights = pack_weights(policy, normalizer)

    def learn(what: str) -> None:
        if what.startswith(stage):
            overwrite(policy)
            overwrite(normalizer)

    export_policy(
        policy,
        normalizer,
        tmp_path / "it",
        name="it",
        formats=("torchscript",),
        max_batch_size=64,
        on_stage=learn,
    )
    assert not policy.get_parameter("op_head.2.weight").any()
    assert (tmp_path / "it" / WEIGHTS_FILE).read_bytes() == weights


def test_torchs_random_numbers_are_left_alone(policy: FactoredRecurrentActorCritic) -> None:
    before = torch.get_rng_state()
    rebuild(pack_weights(policy, None), policy.spec, CPU)
    TamiyoStep(policy, None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "content", [b"", b"not a file of weights", b"\xff" * 64], ids=["empty", "text", "ones"]
)
def test_content_that_is_no_file_of_weights_is_refused(content: bytes) -> None:
    with pytest.raises(ArtifactError, match="the weights are not those of the spec"):
        rebuild(content, FLOORED, CPU)


def test_weights_of_another_spec_are_refused(floored: FactoredRecurrentActorCritic) -> None:
    content = pack_weights(floored, None)
    with pytest.raises(ArtifactError, match="the weights are not those of the spec"):
        rebuild(content, small_v2(num_layers=2), CPU)
