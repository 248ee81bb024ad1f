import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from model.spec import PolicySpec
from model.step_spec import HeadSpec

V1_HEADS = {
    "slot": 3,
    "blueprint": 13,
    "style": 4,
    "tempo": 3,
    "alpha_target": 3,
    "alpha_speed": 4,
    "alpha_curve": 3,
    "op": 6,
}


def spec_of(
    *heads: HeadSpec, op_head: str = "op", sizes: dict[str, int] | None = None
) -> PolicySpec:
    dims = {"observation_dim": 3, "feature_dim": 4, "hidden_dim": 5, "num_layers": 1}
    dims |= sizes or {}
    return PolicySpec.model_validate({"name": "test", "heads": heads, "op_head": op_head} | dims)


OP = HeadSpec(name="op", size=3)


@st.composite
def specs(draw: st.DrawFn) -> PolicySpec:
    sizes = st.integers(min_value=1, max_value=10**6)
    num_ops = draw(st.integers(min_value=1, max_value=12))
    names = draw(st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True), unique=True))
    heads = [HeadSpec(name="op", size=num_ops)]
    for name in names:
        if name in ("op", "value"):
            continue
        size = draw(sizes)
        if draw(st.booleans()):
            heads.append(HeadSpec(name=name, size=size))
            continue
        ops = draw(st.lists(st.integers(min_value=0, max_value=num_ops - 1), unique=True))
        forced = draw(st.integers(min_value=0, max_value=size - 1))
        heads.append(HeadSpec(name=name, size=size, relevant_ops=tuple(ops), forced_index=forced))
    return PolicySpec(
        name=draw(st.text()),
        observation_dim=draw(sizes),
        feature_dim=draw(sizes),
        hidden_dim=draw(st.integers(min_value=2, max_value=10**6)),
        num_layers=draw(sizes),
        heads=tuple(draw(st.permutations(heads))),
    )


@given(specs())
def test_json_round_trip_loses_nothing(spec: PolicySpec) -> None:
    again = PolicySpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.head_names == spec.head_names


@given(specs())
def test_sizes_follow_the_heads(spec: PolicySpec) -> None:
    assert spec.num_choices == sum(spec.head_sizes)
    assert spec.heads[spec.op_index].name == spec.op_head


def test_tamiyo_v1_is_as_described() -> None:
    spec = PolicySpec.tamiyo_v1()
    assert dict(zip(spec.head_names, spec.head_sizes, strict=True)) == V1_HEADS
    assert spec.head_names == tuple(V1_HEADS)
    assert (spec.observation_dim, spec.feature_dim, spec.hidden_dim, spec.num_layers) == (
        140,
        128,
        128,
        1,
    )
    assert spec.num_choices == 39
    assert spec.op_index == 7
    ruled = {head.name: head for head in spec.heads if head.relevant_ops is not None}
    assert set(ruled) == {"style"}
    assert ruled["style"].relevant_ops == (1, 2)
    assert ruled["style"].forced_index == 2


@pytest.mark.parametrize(
    ("field", "head_field"), [("name", "name"), ("hidden_dim", "size"), ("heads", "relevant_ops")]
)
def test_spec_cannot_be_changed(field: str, head_field: str) -> None:
    spec = PolicySpec.tamiyo_v1()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(spec, field, getattr(spec, field))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(spec.heads[0], head_field, getattr(spec.heads[0], head_field))


@pytest.mark.parametrize("name", ["", "Slot", "0slot", "slot head", "slot.head", "slöt", "slot\n"])
def test_head_name_that_is_no_identifier_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        HeadSpec(name=name, size=2)


@pytest.mark.parametrize("size", [0, -1])
def test_head_without_choices_is_refused(size: int) -> None:
    with pytest.raises(ValidationError, match="size"):
        HeadSpec(name="slot", size=size)


def test_head_needs_relevant_ops_and_forced_index_together() -> None:
    with pytest.raises(ValidationError, match="'style' needs both"):
        HeadSpec(name="style", size=4, relevant_ops=(1,))
    with pytest.raises(ValidationError, match="'style' needs both"):
        HeadSpec(name="style", size=4, forced_index=1)


def test_head_is_forced_to_one_of_its_choices() -> None:
    with pytest.raises(ValidationError, match="forced to 4 of 4"):
        HeadSpec(name="style", size=4, relevant_ops=(1,), forced_index=4)
    with pytest.raises(ValidationError, match="forced_index"):
        HeadSpec(name="style", size=4, relevant_ops=(1,), forced_index=-1)


def test_relevant_ops_are_ops_there_are() -> None:
    beyond = HeadSpec(name="style", size=4, relevant_ops=(0, 3), forced_index=0)
    with pytest.raises(ValidationError, match="'style' names op 3, there are 3"):
        spec_of(beyond, OP)
    with pytest.raises(ValidationError, match="relevant_ops"):
        HeadSpec(name="style", size=4, relevant_ops=(-1,), forced_index=0)


def test_heads_have_different_names() -> None:
    with pytest.raises(ValidationError, match="same name: slot, slot, op"):
        spec_of(HeadSpec(name="slot", size=2), HeadSpec(name="slot", size=3), OP)


def test_no_head_takes_the_value_heads_name() -> None:
    """Its parameters would be the value's: `value_head` is a name of the network's own."""
    with pytest.raises(ValidationError, match="no head can be called 'value'"):
        spec_of(OP, HeadSpec(name="value", size=2))


def test_op_head_exists_and_is_never_forced() -> None:
    with pytest.raises(ValidationError, match="no head 'op'"):
        spec_of(HeadSpec(name="slot", size=2))
    with pytest.raises(ValidationError, match="no head 'kind'"):
        spec_of(OP, op_head="kind")
    with pytest.raises(ValidationError, match="'op' decides"):
        spec_of(HeadSpec(name="op", size=3, relevant_ops=(0,), forced_index=0))


@pytest.mark.parametrize(
    ("field", "value"),
    [("observation_dim", 0), ("feature_dim", 0), ("hidden_dim", 1), ("num_layers", 0)],
)
def test_dimension_too_small_for_a_network_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValidationError, match=field):
        spec_of(OP, sizes={field: value})


def test_slots_by_op_and_blueprints_come_together() -> None:
    """The exported step takes them as its last two inputs, by position."""
    for change in ({"has_slot_by_op": False}, {"blueprint_embedding_dim": None}):
        document = PolicySpec.tamiyo_v2().model_dump() | change
        with pytest.raises(ValidationError, match="come together"):
            PolicySpec.model_validate(document)


def test_a_critic_that_would_have_layers_of_no_width_is_refused() -> None:
    PolicySpec.tamiyo_v2(hidden_dim=8)
    with pytest.raises(ValidationError, match="hidden_dim is at least 8, not 7"):
        PolicySpec.tamiyo_v2(hidden_dim=7)


def test_unknown_field_is_refused() -> None:
    document = PolicySpec.tamiyo_v1().model_dump() | {"dropout": 0.1}
    with pytest.raises(ValidationError, match="dropout"):
        PolicySpec.model_validate(document)


def test_importing_the_spec_imports_no_torch() -> None:
    program = "import sys, model.spec; print(*(name for name in sys.modules if name == 'torch'))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
