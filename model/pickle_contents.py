"""What a pickle of torch.save names, and in which entry, read off its opcodes.

Nothing is imported, built, hashed or called: each opcode only notes what it would make of what.
"""

import pickletools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import torch

from model.numpy_pickles import NUMPY_NAMES, is_plain_dtype

DATA = NUMPY_NAMES | {
    "_codecs.encode",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch._tensor._rebuild_from_type_v2",
}
"""What makes data and nothing else; torch's dtypes, storages and `_rebuild_` functions do too."""

HASHES_ITS_ARGUMENT = {"builtins.set", "collections.Counter", "collections.OrderedDict"}
CALLS_ITS_ARGUMENT = {"copyreg._reconstructor", "copyreg.__newobj_ex__"}

PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""How the protocol that torch.save writes spells these modules."""

MODULE_STATE = {"_parameters", "_modules"}
SHOWN_KEYS = 5


class Foreign(NamedTuple):
    """A part of a pickle that is no data: the entry it is, and what would make it.

    `entry` is dotted, and empty for the whole; `is_module` says that it is a torch module.
    """

    entry: str
    maker: str
    is_module: bool


class Entry(NamedTuple):
    """A key, and the entry it is in: a chain, so that deep nesting costs no copies."""

    outer: "Entry | None"
    key: object

    def dotted(self) -> str:
        keys = []
        entry: Entry | None = self
        while entry is not None:
            keys.append(str(entry.key))
            entry = entry.outer
        return ".".join(reversed(keys[-SHOWN_KEYS:]))


@dataclass(eq=False, slots=True)
class Made:
    """What a pickle would make: by calling `maker`, or a plain container, which has no maker.

    `parts` are what it is made of, each under its key in a mapping, or else under None. Of lists
    and mappings only what is made itself is kept.
    """

    maker: str | None = None
    parts: list[tuple[object, object]] = field(default_factory=list)

    def add(self, key: object, value: object) -> None:
        _check_hashable(key)
        self.parts += [(None, key)] if isinstance(key, Made) else []
        self.parts += [(key, value)] if isinstance(value, Made) else []


def first_foreign(pickle: BinaryIO) -> Foreign | None:
    """The first part that is no data, or None. Leaves the stream behind the pickle.

    Raises what `pickletools` does, ValueError, LookupError or AttributeError where the pickle is
    damaged, and ValueError where it hashes what is nested, which may take for ever.
    """
    waiting: list[tuple[Entry | None, object]] = [(None, _contents(pickle))]
    seen: set[int] = set()
    while waiting:
        entry, value = waiting.pop()
        if not isinstance(value, Made) or id(value) in seen:
            continue
        seen.add(id(value))
        if value.maker is not None and not _is_data(value.maker, value):
            return Foreign(entry.dotted() if entry else "", value.maker, _is_module(value))
        waiting += [
            (entry if key is None else Entry(entry, key), part)
            for key, part in reversed(value.parts)
        ]
    return None


def _is_data(maker: str, value: Made) -> bool:
    if maker == "builtins.bytearray":  # given a number, it is as many bytes as that says
        return all(map(_is_text_or_bytes, _arguments(value)))
    if maker in DATA or maker.startswith("torch._utils._rebuild_"):
        return True
    module, _, name = maker.rpartition(".")
    if module == "torch.storage" or (module == "torch" and name.endswith("Storage")):
        return True
    of_torch = getattr(torch, name, None) if module == "torch" else None
    return isinstance(of_torch, torch.dtype | torch.qscheme)


def _is_text_or_bytes(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Made) and value.maker == "_codecs.encode")


def _is_module(value: Made) -> bool:
    return any(
        isinstance(part, Made)
        and {key for key, _ in part.parts if type(key) is str} >= MODULE_STATE
        for _, part in value.parts
    )


def _arguments(call: Made) -> list[object]:
    arguments = call.parts[0][1]
    if not isinstance(arguments, Made):
        raise ValueError("a call without a tuple of arguments")
    return [argument for _, argument in arguments.parts]


def _check_hashable(key: object) -> None:
    """Tuples of tuples are refused: the hash of a few bytes of them may take for ever."""
    if isinstance(key, Made) and key.maker is None:
        for _, part in key.parts:
            if isinstance(part, Made) and part.maker is None:
                raise ValueError("a nested key")


def _call(maker: object, arguments: object) -> Made:
    if not isinstance(maker, Made) or maker.maker is None:
        raise ValueError("a call of what cannot be called")
    called = Made(maker.maker, [(None, arguments)])
    if called.maker in CALLS_ITS_ARGUMENT:
        real = _arguments(called)[0]
        called.maker = real.maker if isinstance(real, Made) else called.maker
    if called.maker == "numpy.dtype" and not is_plain_dtype(_arguments(called)[0]):
        called.maker = f"numpy.dtype({_arguments(called)[0]!r})"
    if called.maker in HASHES_ITS_ARGUMENT:
        for argument in _arguments(called):
            for _, part in argument.parts if isinstance(argument, Made) else ():
                _check_hashable(part)
    return called


def _named(argument: str) -> Made:
    module, _, name = argument.partition(" ")
    return Made(f"{PYTHON_2.get(module, module)}.{name}")


def _storage(persistent_id: object) -> object:
    """A tensor's storage; before torch 1.6, also a module's class with its source."""
    if isinstance(persistent_id, Made) and (None, "module") in persistent_id.parts[:1]:
        return persistent_id.parts[1][1]
    return Made(parts=[(None, persistent_id)])


def _contents(pickle: BinaryIO) -> object:
    stack = _Stack()
    for opcode, argument, _ in pickletools.genops(pickle):
        stack.take(opcode, argument)
    return stack.pop()


class _Stack:
    """A pickle's stack and memo, from which each opcode takes, and where it leaves what it makes.

    Knows the opcodes of protocol 2, as `torch.load` does. Raises ValueError at any other.
    """

    def __init__(self) -> None:
        self._values: list[object] = []
        self._below: list[list[object]] = []
        self._memo: dict[int, object] = {}

    def take(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        match opcode.name:
            case "MARK":
                self._below.append(self._values)
                self._values = []
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._values[-1]
            case "BINGET" | "LONG_BINGET":
                self._values.append(self._memo[argument])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_SET" | "EMPTY_TUPLE":
                self._values.append(Made())
            case "TUPLE":
                self._push_tuple(self._pop_mark())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._push_tuple(self._pop(int(opcode.name[-1])))
            case "APPEND" | "APPENDS":
                items = self._pop_mark() if opcode.name == "APPENDS" else self._pop(1)
                self._add([None] * len(items), items)
            case "SETITEM" | "SETITEMS":
                items = self._pop_mark() if opcode.name == "SETITEMS" else self._pop(2)
                self._add(items[::2], items[1::2])
            case "BUILD":
                self._add([None], self._pop(1))
            case "GLOBAL":
                self._values.append(_named(argument))
            case "REDUCE" | "NEWOBJ":
                self._values.append(_call(*self._pop(2)))
            case "BINPERSID":
                self._values.append(_storage(self.pop()))
            case _ if opcode.stack_before and opcode.name != "STOP":
                raise ValueError(f"{opcode.name} is no opcode of protocol 2")
            case _:
                self._values += [argument] * len(opcode.stack_after)

    def pop(self) -> object:
        return self._values.pop()

    def _pop(self, count: int) -> list[object]:
        return [self._values.pop() for _ in range(count)][::-1]

    def _pop_mark(self) -> list[object]:
        items, self._values = self._values, self._below.pop()
        return items

    def _push_tuple(self, items: list[object]) -> None:
        self._values.append(Made(parts=[(None, item) for item in items]))

    def _add(self, keys: Sequence[object], values: Sequence[object]) -> None:
        target = self._values[-1]
        if not isinstance(target, Made):
            raise ValueError("an addition to what holds nothing")
        for key, value in zip(keys, values, strict=True):
            target.add(key, value)
