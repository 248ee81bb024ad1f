"""A pickle as plain values: the same as unpickled where it is plain, and nothing run otherwise."""

import collections
import copyreg
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint_file import CheckpointError
from model.sb3.passive_pickle import MOST_OPCODES, StandIn, read_pickle

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 120
GROWTH_BYTES = 400 * 2**20
MARKER = "ran"
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
DAMAGED = "is a damaged pickle; nothing in it was run"

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.tuples()
    | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


class Thing:
    def __init__(self) -> None:
        self.size = 3


class Pair(tuple[int, ...]):
    def __getnewargs_ex__(self) -> tuple[tuple[object, ...], dict[str, object]]:
        return (tuple(self),), {}


def refusal(content: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_pickle(content)
    return str(caught.value)


@pytest.mark.parametrize("protocol", PROTOCOLS[3:])
@given(value=PLAIN)
def test_plain_values_are_as_unpickled(protocol: int, value: object) -> None:
    assert read_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS[:3])
@pytest.mark.parametrize(
    "value",
    [[1, -2, 2**70, True, None, 0.5, "é\n\\", ()], {"a": [{"b": ("c", 1)}]}, [[], {}, (1, 2, 3)]],
    ids=["leaves", "nested", "empty"],
)
def test_plain_values_of_old_protocols_are_as_unpickled(protocol: int, value: object) -> None:
    assert read_pickle(pickle.dumps(value, protocol)) == value


def test_sets_come_as_lists_and_bytearrays_as_bytes() -> None:
    read = read_pickle(pickle.dumps([{1}, frozenset({2}), bytearray(b"ab")], 5))
    assert read == [[1], [2], b"ab"]


def test_only_what_is_under_text_is_kept_of_a_dict() -> None:
    assert read_pickle(pickle.dumps({"a": 1, 2: 3, b"b": 4, ("c",): 5}, 4)) == {"a": 1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_object_is_a_stand_in_with_its_class_and_state(protocol: int) -> None:
    made = read_pickle(pickle.dumps(Thing(), protocol))
    assert isinstance(made, StandIn)
    assert made.dotted == f"{__name__}.Thing"
    assert made.arguments == ()
    assert made.state == {"size": 3}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_is_a_stand_in_with_its_arguments(protocol: int) -> None:
    made = read_pickle(pickle.dumps(complex(1, 2), protocol))
    assert isinstance(made, StandIn)
    assert (made.module, made.name, made.arguments) == ("builtins", "complex", (1.0, 2.0))
    named = read_pickle(pickle.dumps(copyreg.pickle, protocol))
    assert isinstance(named, StandIn)
    assert (named.module, named.name, named.arguments) == ("copyreg", "pickle", None)


def test_every_way_to_make_an_object_is_a_stand_in() -> None:
    ways: dict[str, bytes] = {
        "REDUCE": b"cm\nn\n(K\x01tR.",
        "INST": b"(K\x01im\nn\n.",
        "OBJ": b"(cm\nn\nK\x01o.",
        "NEWOBJ": b"cm\nn\nK\x01\x85\x81.",
        "NEWOBJ_EX": b"cm\nn\nK\x01\x85}\x92.",
        "STACK_GLOBAL": b"\x8c\x01m\x8c\x01n\x93K\x01\x85R.",
    }
    for name, content in ways.items():
        made = read_pickle(content)
        assert isinstance(made, StandIn), name
        assert (made.module, made.name, made.arguments) == ("m", "n", (1,)), name
    for content in (b"Pid\n.", b"\x8c\x02idQ."):
        made = read_pickle(content)
        assert isinstance(made, StandIn)
        assert (made.dotted, made.arguments) == (".", ("id",))
    made = read_pickle(pickle.dumps(Pair((1, 2)), 4))
    assert isinstance(made, StandIn)
    assert made.arguments == ((1, 2),)


def test_what_a_call_returns_has_no_name_to_be_called_by() -> None:
    made = read_pickle(b"cm\nn\n)R)R.")
    assert isinstance(made, StandIn)
    assert (made.dotted, made.arguments) == (".", ())


def test_what_is_added_to_a_stand_in_is_dropped() -> None:
    made = read_pickle(pickle.dumps(collections.OrderedDict(a=1), 4))
    assert isinstance(made, StandIn)
    assert made.dotted == "collections.OrderedDict"
    made = read_pickle(pickle.dumps(collections.deque([1, 2]), 4))
    assert isinstance(made, StandIn)
    assert made.dotted == "collections.deque"


def test_stack_and_memo_are_python_s() -> None:
    for content in (
        b"K\x01K\x020.",  # POP
        b"K\x01(K\x02K\x031.",  # POP_MARK
        b"K\x01(0.",  # POP of a mark
        b"K\x012\x86.",  # DUP
        b"K\x01p5\nK\x02q\x06r\x07\x00\x00\x00g5\nh\x06j\x07\x00\x00\x00\x87.",
        b"]\x94(h\x00K\x01e0h\x00K\x02a.",
        b"(K\x01K\x02l.",
        b"(\x8c\x01aK\x01d\x8c\x01bK\x02s.",
    ):
        expected, read = pickle.loads(content), read_pickle(content)
        assert repr(read) == repr(expected), content


@pytest.mark.parametrize("opcode", pickletools.opcodes, ids=lambda opcode: opcode.name)
def test_every_opcode_is_known(opcode: pickletools.OpcodeInfo) -> None:
    argument = b"\0" * 8 if opcode.arg is not None and opcode.arg.n != -1 else b"1\n1\n"
    content = b"(((]}]}K\x01K\x02" + opcode.code.encode("latin1") + argument
    try:
        read_pickle(content)
    except CheckpointError as error:
        reason = str(error.__cause__)
    else:
        reason = ""
    assert not reason.endswith("is not known")


# Sentences.


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", DAMAGED),
        (b".", DAMAGED),
        (b"K\x01", DAMAGED),
        (b"\xff", DAMAGED),
        (b"K\x01b.", DAMAGED),
        (b"K\x01K\x02b.", DAMAGED),
        (b"cm\nn\n)R}b}b.", DAMAGED),
        (b"}K\x01a.", DAMAGED),
        (b"](\x8c\x01aK\x01u.", DAMAGED),
        (b"}(\x8c\x01au.", DAMAGED),
        (b"K\x01K\x02R.", DAMAGED),
        (b"cm\nn\nK\x01R.", DAMAGED),
        (b"K\x01K\x02\x93.", DAMAGED),
        (b"ccopyreg\n_reconstructor\n)R.", DAMAGED),
        (b"g7\n.", DAMAGED),
        (b"Np-1\n.", DAMAGED),
        (b"Np99999999\n.", DAMAGED),
        (b"I" + b"9" * 5000 + b"\n.", DAMAGED),
        (b"X\xff\xff\xff\x7fab.", DAMAGED),
        (b"\x8e" + b"\xff" * 7 + b"\x7fab.", DAMAGED),
        (b"\x96" + b"\xff" * 8 + b"ab.", DAMAGED),
        (b"\x8b\xff\xff\xff\x7fab.", DAMAGED),
        (
            b"\x80\x06N.",
            "is pickled in protocol 6, and 0 to 5 are read; nothing in it was run",
        ),
        (
            pickle.dumps(pickle.PickleBuffer(b"x"), 5, buffer_callback=lambda _: False),
            "is a pickle whose buffers were left out of it; nothing in it was run",
        ),
        (b"N\x98.", "is a pickle whose buffers were left out of it; nothing in it was run"),
        *(
            (
                code,
                "is a pickle with numbers for names, known to who wrote it; nothing in it was run",
            )
            for code in (b"\x82\x01.", b"\x83\x01\x00.", b"\x84\x01\x00\x00\x00.")
        ),
        (
            b"N0" * (MOST_OPCODES // 2) + b"N.",
            "is a pickle of more than 500,000 opcodes; nothing in it was run",
        ),
    ],
    ids=lambda value: repr(value[:20]),
)  # fmt: skip
def test_what_cannot_be_read_is_a_sentence(content: bytes, said: str) -> None:
    assert refusal(content) == said


# What is meant to harm, and does not.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


TOUCH = f"touch {MARKER}"
OPEN = f"open({MARKER!r}, 'w').close()"

RUNNERS: dict[str, bytes] = {
    "os.system": b"cos\nsystem\n" + text(TOUCH) + b"\x85R.",
    "posix.system": b"\x8c\x05posix\x8c\x06system\x93" + text(TOUCH) + b"\x85R.",
    "eval": b"cbuiltins\neval\n" + text(OPEN) + b"\x85R.",
    "exec of Python 2": b"c__builtin__\nexec\n" + text(OPEN) + b"\x85R.",
    "an instance": b"(" + text(TOUCH) + b"ios\nsystem\n.",
    "an object": b"(cos\nsystem\n" + text(TOUCH) + b"o.",
    "NEWOBJ_EX": b"csubprocess\nPopen\n" + text(TOUCH) + b"\x85}\x92.",
    "copyreg": b"ccopyreg\n_reconstructor\n(cos\nsystem\n" + text(TOUCH) + b"NtR.",
    "a state": b"cos\nenviron\n}" + text("x") + text("y") + b"sb.",
    "a module": b"cleaves_a_marker\nx\n.",
    "a module's call": b"\x8c\x0fleaves_a_marker\x8c\x01x\x93)R.",
    "within a state": b"cm\nn\n)R}" + text("a") + b"cos\nsystem\n" + text(TOUCH) + b"\x85Rsb.",
}


@pytest.mark.parametrize("name", RUNNERS)
def test_nothing_is_imported_or_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves_a_marker.py").write_text(f"{OPEN}\nx = dict\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, environ = set(sys.modules), dict(os.environ)
    assert isinstance(read_pickle(RUNNERS[name]), StandIn)
    assert not (tmp_path / MARKER).exists()
    assert set(sys.modules) == modules
    assert dict(os.environ) == environ


def colliding(number: int) -> bytes:
    """Integers of one hash."""
    each = (b"\x8a\x0c" + (k * (2**61 - 1)).to_bytes(12, "little") for k in range(1, number))
    return b"".join(each)


SIZE = 30 * 2**20
FEW = MOST_OPCODES - 10

BOMBS: dict[str, Callable[[], bytes]] = {
    "many sets": lambda: b"\x8f" * FEW + b".",
    "many dicts": lambda: b"(" + b"}" * FEW + b"t.",
    "many marks": lambda: b"(" * FEW + b"N.",
    "many stand-ins": lambda: b"cm\nn\n\x940" + b"h\x00)R" * (FEW // 3 - 2) + b".",
    "nested tuples": lambda: b")" + b"\x85" * FEW + b".",
    "nested lists": lambda: b"(" * (FEW // 2) + b"l" * (FEW // 2) + b".",
    "nested stand-ins": lambda: b"cm\nn\n\x94)R" + b"0h\x00h\x00\x85R" * 9 + b".",
    "nested states": lambda: b"cm\nn\n)R" * (FEW // 4) + b"b" * (FEW // 4 - 1) + b".",
    "doubled tuples": lambda: b")" + b"2\x86" * (FEW // 2) + b".",
    "doubled keys": lambda: b"})" + b"2\x86" * 60 + b"Ns.",
    "a list in itself": lambda: b"]\x94" + b"h\x00a" * (FEW // 2) + b".",
    "a long integer": lambda: b"\x8b" + struct.pack("<i", SIZE) + b"\x7f" * SIZE + b".",
    "a long integer as key": lambda: (
        b"\x8b" + struct.pack("<i", SIZE) + b"\x7f" * SIZE + b"\x940}" + b"h\x00Ns" * 100_000 + b"."
    ),
    "wide text": lambda: (
        b"X" + struct.pack("<I", SIZE) + "\U0001f600".encode() + b"a" * (SIZE - 4) + b"."
    ),
    "long names": lambda: (
        b"X" + struct.pack("<I", SIZE) + b"a" * SIZE + b"\x94" + b"h\x00\x93h\x00" * 100_000 + b"."
    ),
    "colliding members": lambda: b"\x8f(" + colliding(FEW) + b"\x90.",
    "colliding dict": lambda: (
        b"(" + b"N".join(b"\x8a\x0c" + (k * (2**61 - 1)).to_bytes(12, "little")
                         for k in range(FEW // 2 - 2)) + b"Nd."
    ),
    "a frame": lambda: b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "a length": lambda: b"\x8d" + b"\xff" * 7 + b"\x7fN.",
    "a place in the memo": lambda: b"Nr\xff\xff\xff\xff.",
}  # fmt: skip


def test_memory_and_time_are_in_proportion_to_the_file(tmp_path: Path) -> None:
    """In a process that dies of more; the time is what the whole may take."""
    for index, bomb in enumerate(BOMBS.values()):
        (tmp_path / f"{index}.pkl").write_bytes(bomb())
    code = (
        "import resource, sys; from pathlib import Path; import model.checkpoint_file\n"
        "from model.sb3.passive_pickle import CheckpointError, read_pickle\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        f"limit = size + {GROWTH_BYTES}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        f"for index in range({len(BOMBS)}):\n"
        "    content = Path(sys.argv[1], f'{index}.pkl').read_bytes()\n"
        "    try: print('read', type(read_pickle(content)).__name__)\n"
        "    except CheckpointError as error:\n"
        "        print(repr(error.__cause__) if error.__cause__ else error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    said = dict(zip(BOMBS, done.stdout.splitlines(), strict=True))
    assert not [name for name, line in said.items() if "MemoryError" in line]
    assert not [name for name, line in said.items() if "Recursion" in line]
    refused = {"a length", "a place in the memo"}
    assert {name for name, line in said.items() if not line.startswith("read")} == refused
