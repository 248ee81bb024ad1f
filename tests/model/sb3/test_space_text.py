"""Spaces as they are printed, mirrored and typed."""

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint_file import CheckpointError
from model.sb3.mirror import Mirror
from model.sb3.space_text import (
    Box,
    Dict,
    Discrete,
    MultiBinary,
    MultiDiscrete,
    Space,
    mirrored_space,
    parse_space,
)
from tests.model.sb3.saved_models import box, dict_of, discrete, multi_binary, multi_discrete

NO_SPACE = "is no space as it is printed, such as MultiDiscrete([3 4 2])"


def mirrored(entry: dict[str, object]) -> Space:
    attributes = {key: value for key, value in entry.items() if key[0] != ":"}
    return mirrored_space(Mirror(str(entry[":type:"]), attributes))


def refused(text: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse_space(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("Discrete(5)", Discrete(5)),
        ("Discrete(5, start=-1)", Discrete(5, -1)),
        ("Discrete(5, start=2, dtype=int32)", Discrete(5, 2)),
        ("MultiDiscrete([3 4 2])", MultiDiscrete((3, 4, 2), (0, 0, 0))),
        ("MultiDiscrete([ 3 14])", MultiDiscrete((3, 14), (0, 0))),
        ("MultiDiscrete([3\n 4])", MultiDiscrete((3, 4), (0, 0))),
        ("MultiDiscrete([3, 4, 2])", MultiDiscrete((3, 4, 2), (0, 0, 0))),
        (" MultiDiscrete((3,4))  ", MultiDiscrete((3, 4), (0, 0))),
        ("MultiDiscrete([3 4], start=[1 0])", MultiDiscrete((3, 4), (1, 0))),
        ("MultiBinary(4)", MultiBinary((4,))),
        ("MultiBinary((4, 2))", MultiBinary((4, 2))),
        ("MultiBinary([4 2])", MultiBinary((4, 2))),
        ("Box(-1.0, 1.0, (6,), float32)", Box((6,), "float32")),
        ("Box(-inf, inf, (2, 3), float64)", Box((2, 3), "float64")),
        ("Box(0, 255, (3, 8, 8), uint8)", Box((3, 8, 8), "uint8")),
        ("Box([-1.e+00 -2.], [[1.]\n ... \n [2.]], (2,), float32)", Box((2,), "float32")),
        ("Dict()", Dict(())),
        (
            "Dict('mode': Discrete(3), 'vec': Box(-1.0, 1.0, (6,), float32))",
            Dict((("mode", Discrete(3)), ("vec", Box((6,), "float32")))),
        ),
        ("""Dict("it's": Discrete(3), 'a\\'"b': Discrete(2))""", None),
        ("{'a': Discrete(1)}", None),
    ],
)
def test_a_space_is_read_as_it_is_printed(text: str, space: Space | None) -> None:
    if space is not None:
        assert parse_space(text) == space
    elif text[0] == "{":
        assert refused(text) == f'"{text}" {NO_SPACE}'
    else:
        assert parse_space(text) == Dict((("it's", Discrete(3)), ("a'\"b", Discrete(2))))


@pytest.mark.parametrize(
    ("entry", "space"),
    [
        (discrete("5", "2"), Discrete(5, 2)),
        (discrete(5, 0), Discrete(5)),
        (multi_discrete(), MultiDiscrete((3, 4, 2), (0, 0, 0))),
        (multi_discrete("[ 3 14\n  2]", "[0 0 1]"), MultiDiscrete((3, 14, 2), (0, 0, 1))),
        (multi_binary(4), MultiBinary((4,))),
        (multi_binary("4"), MultiBinary((4,))),
        (multi_binary([4, 2]), MultiBinary((4, 2))),
        (multi_binary("(4, 2)"), MultiBinary((4, 2))),
        (multi_binary("[4 2]"), MultiBinary((4, 2))),
        (box([2, 3], "int8"), Box((2, 3), "int8")),
        (dict_of("{'a': Discrete(3)}"), Dict((("a", Discrete(3)),))),
        (dict_of("OrderedDict([('a', Discrete(3))])"), Dict((("a", Discrete(3)),))),
        (dict_of("OrderedDict({'a': Discrete(3)})"), Dict((("a", Discrete(3)),))),
        (dict_of("OrderedDict()"), None),
    ],
)
def test_a_space_is_read_as_it_is_mirrored(entry: dict[str, object], space: Space | None) -> None:
    if space is None:
        with pytest.raises(CheckpointError, match="is no space as it is printed"):
            mirrored(entry)
    else:
        assert mirrored(entry) == space
        of_gym = entry | {":type:": str(entry[":type:"]).replace("gymnasium", "gym")}
        assert mirrored(of_gym) == space


def test_a_mirror_before_starts_and_of_gym_s_first_boxes_is_read() -> None:
    assert mirrored_space(Mirror("<class 'gym.spaces.discrete.Discrete'>", {"n": 3})) == Discrete(3)
    kind = "<class 'gym.spaces.multi_discrete.MultiDiscrete'>"
    assert mirrored_space(Mirror(kind, {"nvec": "[3 4]"})) == MultiDiscrete((3, 4), (0, 0))
    kind = "<class 'gym.spaces.box.Box'>"
    assert mirrored_space(Mirror(kind, {"shape": [2], "dtype": "float32"})) == Box((2,), "float32")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", f"'' {NO_SPACE}"),
        ("MultiDiscrete", f"'MultiDiscrete' {NO_SPACE}"),
        ("MultiDiscrete([3 4)", f"'MultiDiscrete([3 4)' {NO_SPACE}"),
        ("Discrete(5) 7", f"'Discrete(5) 7' {NO_SPACE}"),
        ("Discrete(5);", f"'Discrete(5);' {NO_SPACE}"),
        ("Discrete(5, begin=1)", f"'Discrete(5, begin=1)' {NO_SPACE}"),
        ("Box(6,)", f"'Box(6,)' {NO_SPACE}"),
        ("Box([0, 1, (2,), float32", f"'Box([0, 1, (2,), float32' {NO_SPACE}"),
        ("Dict('a' Discrete(3))", f"\"Dict('a' Discrete(3))\" {NO_SPACE}"),
        ("Dict('\\ud800': Discrete(3))", f"\"Dict('\\\\ud800': Discrete(3))\" {NO_SPACE}"),
        ("Tuple(Discrete(3))", "Tuple is no space that is read"),
        ("os.system(1)", f"'os.system(1)' {NO_SPACE}"),
        ("Discrete(0)", "0 is no number of choices or numbers"),
        ("Discrete(-3)", "-3 is no number of choices or numbers"),
        ("Discrete(2147483648)", "2147483648 is no number of choices or numbers"),
        ("Discrete(3.0)", "'3.0' is no whole number"),
        ("Discrete(" + "9" * 30 + ")", f"'{'9' * 30}' is no whole number"),
        ("MultiDiscrete([])", "a MultiDiscrete of [] is no space"),
        ("MultiDiscrete([3 4], start=[1])", "a MultiDiscrete of [3, 4] is no space"),
        ("MultiDiscrete([3 4], start=1)", "a MultiDiscrete of [3, 4] is no space"),
        (
            "MultiDiscrete([[3 4]\n [2 2]])",
            "'MultiDiscrete([[3 4]\\n [2 2]])' has rows, and one is read",
        ),
        (
            "MultiDiscrete([2 2 ... 2 2])",
            "'MultiDiscrete([2 2 ... 2 2])' leaves numbers out, as NumPy prints more than 1000",
        ),
        ("MultiBinary(())", "a MultiBinary of nothing is no space"),
        ("Box(0.0, 1.0, (), float32)", "a Box of shape () is not read"),
        ("Box(0.0, 1.0, (0,), float32)", "0 is no number of choices or numbers"),
        ("Box(0.0, 1.0, (6,), object)", "a Box of 'object' is not read"),
        (
            "Dict('a': Dict('b': Discrete(3)))",
            "\"Dict('a': Dict('b': Discrete(3)))\" has a Dict within, and Dicts are read one deep",
        ),
        (
            "Dict('a': Tuple(Discrete(3)))",
            "\"Dict('a': Tuple(Discrete(3)))\" has a Tuple within, and Dicts are read one deep",
        ),
        (" " * 1_000_001, "a space of 1000001 letters is not read"),
    ],
    ids=lambda value: value[:24],
)
def test_other_text_is_refused(text: str, said: str) -> None:
    assert refused(text) == said


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (discrete(None), "None is no whole number"),
        (discrete(True), "True is no whole number"),
        (multi_discrete("[2 2 ... 2 2]"), "'[2 2 ... 2 2]' leaves numbers out, as NumPy prints "
         "more than 1000"),
        (multi_binary([]), "a MultiBinary of nothing is no space"),
        (box([6], "object"), "a Box of 'object' is not read"),
        ({":type:": "<class 'gymnasium.spaces.box.Box'>"}, "None is no list of whole numbers"),
        (dict_of({}), "{} are no spaces of a Dict"),
        ({":type:": "<class 'gymnasium.spaces.text.Text'>"}, "\"<class 'gymnasium.spaces.text."
         "Text'>\" is no space that is read"),
        ({":type:": "<class '__main__.Box'>"}, "\"<class '__main__.Box'>\" is no space that is "
         "read"),
    ],
)  # fmt: skip
def test_other_mirrors_are_refused(entry: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        mirrored(entry)
    assert str(caught.value) == said


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=300))
def test_numpy_s_own_text_is_read_whatever_its_widths_and_lines(nvec: list[int]) -> None:
    space = mirrored(multi_discrete(str(np.array(nvec)), str(np.zeros_like(nvec))))
    assert space == MultiDiscrete(tuple(nvec), (0,) * len(nvec))


@given(st.text(alphabet="DictBoxMultinary()[]{}',:=0123456789. \n\\-\"", max_size=60))
def test_any_text_is_a_space_or_refused(text: str) -> None:
    with contextlib.suppress(CheckpointError):
        assert parse_space(text) == parse_space(f" {text} ")


def test_gymnasium_prints_what_is_read() -> None:
    spaces = pytest.importorskip("gymnasium.spaces")
    low = np.arange(6, dtype=np.float32).reshape(2, 3)
    printed: list[tuple[Any, Space]] = [
        (spaces.Discrete(3, start=2), Discrete(3, 2)),
        (spaces.MultiDiscrete(np.arange(1, 200)), MultiDiscrete(tuple(range(1, 200)), (0,) * 199)),
        (spaces.MultiDiscrete([3, 4], start=[1, 2]), MultiDiscrete((3, 4), (1, 2))),
        (spaces.MultiBinary(4), MultiBinary((4,))),
        (spaces.MultiBinary((4, 2)), MultiBinary((4, 2))),
        (spaces.Box(low, np.float32(np.inf), (2, 3)), Box((2, 3), "float32")),
        (spaces.Box(-3, 3, (2,), np.int64), Box((2,), "int64")),
    ]
    for space, expected in printed:
        assert parse_space(str(space)) == expected
    whole = spaces.Dict({str(number): space for number, (space, _) in enumerate(printed)})
    inner = tuple((str(number), expected) for number, (_, expected) in enumerate(printed))
    assert parse_space(str(whole)) == mirrored(dict_of(str(whole.spaces))) == Dict(inner)
