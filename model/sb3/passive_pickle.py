"""What is in a pickle, read off its opcodes: plain values, and stand-ins for all else.

Nothing is imported, called or built, and only text is hashed: a file that asks for anything of the
kind gets a stand-in that says what it asked for. Time and memory are in proportion to its size.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

from model.checkpoint_file import NOT_RUN, CheckpointError
from model.pickle_contents import PYTHON_2

MOST_OPCODES = 500_000
"""A VecNormalize has about 700, and some 200 more for each key of a Dict."""

LAST_PROTOCOL = 5

MAKES_OF_NOTHING = ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE", "GLOBAL", "PERSID")
"""On the stack, that is."""


@dataclass(eq=False, slots=True, repr=False)
class StandIn:
    """What a pickle names (`arguments` is None), or would make by calling what it names.

    `state` is what it would be built with. Items added to it are dropped. Both names are empty for
    a call of anything but a name.
    """

    module: str
    name: str
    arguments: object = None
    state: object = None

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}"


def read_pickle(content: bytes) -> object:
    """What the first pickle holds: None, booleans, numbers, text, bytes, tuples, lists, stand-ins,
    and dicts, of which only what is under text is kept. Sets come as lists, bytearrays as bytes.

    Raises CheckpointError, whose message goes on from the file's name.
    """
    stack = _Stack()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if number == MOST_OPCODES:
                raise CheckpointError(
                    f"is a pickle of more than {MOST_OPCODES:,} opcodes; {NOT_RUN}"
                )
            stack.take(opcode, argument)
        return stack.pop()
    except CheckpointError:
        raise
    except Exception as error:  # whatever opcodes in disorder make of the stack
        raise CheckpointError(f"is a damaged pickle; {NOT_RUN}") from error


def _named(module: object, name: object) -> StandIn:
    if type(module) is not str or type(name) is not str:
        raise ValueError("a name that is no text")
    return StandIn(PYTHON_2.get(module, module), name)


def _call(maker: object, arguments: object) -> StandIn:
    """Protocols 0 and 1 make an object by `copyreg._reconstructor(class, object, None)`."""
    if not isinstance(maker, StandIn) or type(arguments) is not tuple:
        raise ValueError("a call of what cannot be called, or without a tuple of arguments")
    if (maker.module, maker.name) == ("copyreg", "_reconstructor"):
        maker, arguments = arguments[0], ()
    if not isinstance(maker, StandIn) or maker.arguments is not None:
        return StandIn("", "", arguments)
    return StandIn(maker.module, maker.name, arguments)


def _check_memo(index: int) -> None:
    """Picklers count from 0; numbers of an attacker's choice could make a dict slow."""
    if not 0 <= index < MOST_OPCODES:
        raise ValueError("a place in the memo that no pickler gives")


class _Stack:
    """A pickle's stack and memo, from which each opcode takes, and where it leaves what it makes.

    Raises ValueError, LookupError or TypeError where an opcode does not fit what is there.
    """

    def __init__(self) -> None:
        self._values: list[object] = []
        self._below: list[list[object]] = []
        self._memo: dict[int, object] = {}

    def take(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        match opcode.name:
            case "PROTO" if argument > LAST_PROTOCOL:
                raise CheckpointError(
                    f"is pickled in protocol {argument}, and 0 to {LAST_PROTOCOL} are read; "
                    f"{NOT_RUN}"
                )
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._values[-1]
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                _check_memo(argument)
                self._memo[argument] = self._values[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                self._values.append(self._memo[argument])
            case "NEXT_BUFFER" | "READONLY_BUFFER":
                raise CheckpointError(f"is a pickle whose buffers were left out of it; {NOT_RUN}")
            case "EXT1" | "EXT2" | "EXT4":
                raise CheckpointError(
                    f"is a pickle with numbers for names, known to who wrote it; {NOT_RUN}"
                )
            case "MARK" | "POP" | "POP_MARK" | "DUP":
                self._move(opcode.name)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._values.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BYTEARRAY8":
                self._values.append(bytes(argument))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                self._extend(self._pop(1) if opcode.name == "APPEND" else self._pop_mark())
            case "SETITEM" | "SETITEMS":
                self._update(self._pop(2) if opcode.name == "SETITEM" else self._pop_mark())
            case "BUILD":
                self._build(*self._pop(1))
            case name if opcode.stack_before or name in MAKES_OF_NOTHING:
                made = self._make(name, argument)  # which leaves other values to append to
                self._values.append(made)
            case _:
                self._values.append(argument)

    def pop(self) -> object:
        return self._values.pop()

    def _make(self, opcode: str, argument: Any) -> object:
        match opcode:
            case "EMPTY_LIST" | "EMPTY_SET":
                return []
            case "LIST" | "FROZENSET":
                return self._pop_mark()
            case "EMPTY_TUPLE":
                return ()
            case "TUPLE":
                return tuple(self._pop_mark())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(self._pop(int(opcode[-1])))
            case "EMPTY_DICT":
                return {}
            case "DICT":
                return _entries(self._pop_mark())
            case "GLOBAL":
                return _named(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                return _named(*self._pop(2))
            case "REDUCE" | "NEWOBJ":
                return _call(*self._pop(2))
            case "NEWOBJ_EX":
                maker, arguments, _ = self._pop(3)
                return _call(maker, arguments)
            case "INST":
                return _call(_named(*argument.split(" ", 1)), tuple(self._pop_mark()))
            case "OBJ":
                maker, *items = self._pop_mark()
                return _call(maker, tuple(items))
            case "PERSID":
                return StandIn("", "", (argument,))
            case "BINPERSID":
                return StandIn("", "", tuple(self._pop(1)))
        raise ValueError(f"{opcode} is not known")

    def _move(self, opcode: str) -> None:
        if opcode == "MARK":
            self._below.append(self._values)
            self._values = []
        elif opcode == "DUP":
            self._values.append(self._values[-1])
        elif opcode == "POP" and self._values:
            self._values.pop()
        else:
            self._pop_mark()

    def _pop(self, count: int) -> list[object]:
        return [self._values.pop() for _ in range(count)][::-1]

    def _pop_mark(self) -> list[object]:
        items, self._values = self._values, self._below.pop()
        return items

    def _extend(self, items: list[object]) -> None:
        target = self._values[-1]
        if isinstance(target, list):
            target += items
        elif not isinstance(target, StandIn):
            raise ValueError("an addition to what holds nothing")

    def _update(self, items: list[object]) -> None:
        target = self._values[-1]
        if isinstance(target, dict):
            target |= _entries(items)
        elif not isinstance(target, StandIn):
            raise ValueError("an entry of what has none")

    def _build(self, state: object) -> None:
        target = self._values[-1]
        if not isinstance(target, StandIn) or target.state is not None:
            raise ValueError("a state for what takes none, or has one")
        target.state = state


def _entries(items: list[object]) -> dict[str, object]:
    pairs = zip(items[::2], items[1::2], strict=True)
    return {key: value for key, value in pairs if type(key) is str}
