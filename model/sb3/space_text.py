"""Gymnasium's spaces as text: what they print, a mirror has and a command line takes."""

import ast
import re
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeAlias

from model.checkpoint_file import CheckpointError, short
from model.sb3.mirror import Mirror

LONGEST_TEXT = 1_000_000
LARGEST_SIZE = 2**31 - 1
EXAMPLE = "MultiDiscrete([3 4 2])"

TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
    r"""|(?P<number>[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|inf\b|nan\b))"""
    r"""|(?P<word>[A-Za-z_]\w*)|(?P<mark>\.\.\.|[()\[\]{},:=]))""",
    re.DOTALL,
)
SPACE_TYPE = re.compile(r"<class 'gym(?:nasium)?\.spaces\.\w+\.(\w+)'>")
DTYPE = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")


class Discrete(NamedTuple):
    n: int
    start: int = 0


class MultiDiscrete(NamedTuple):
    nvec: tuple[int, ...]
    start: tuple[int, ...]


class MultiBinary(NamedTuple):
    shape: tuple[int, ...]


class Box(NamedTuple):
    """Its bounds are not kept: nothing that is read depends on them."""

    shape: tuple[int, ...]
    dtype: str


class Dict(NamedTuple):
    """In its own order, which is that of the keys unless they were given in another."""

    spaces: tuple[tuple[str, "Space"], ...]


Space: TypeAlias = Discrete | MultiDiscrete | MultiBinary | Box | Dict


def parse_space(text: str) -> Space:
    """The space that prints so; `[3, 4, 2]` is as good as `[3 4 2]`. CheckpointError for others."""
    parser = _Parser(text)
    space = parser.space(is_inner=False)
    parser.end()
    return space


def mirrored_space(mirror: Mirror) -> Space:
    """The space that a mirror describes; CheckpointError for what is none, or not all of one."""
    kind = SPACE_TYPE.fullmatch(mirror.type)
    reader = _MIRRORED.get(kind[1]) if kind else None
    if reader is None:
        raise CheckpointError(f"{short(mirror.type)} is no space that is read")
    return reader(mirror.attributes)


def _mirrored_discrete(attributes: dict[str, object]) -> Space:
    return Discrete(_count(attributes.get("n")), _integer(attributes.get("start", 0)))


def _mirrored_multi_discrete(attributes: dict[str, object]) -> Space:
    nvec = _vector(attributes.get("nvec"))
    return _multi_discrete(nvec, _vector(attributes.get("start", [0] * len(nvec))))


def _mirrored_multi_binary(attributes: dict[str, object]) -> Space:
    n = attributes.get("n")
    is_text = isinstance(n, str) and n.startswith(("[", "("))
    return _multi_binary(_vector(n) if is_text or isinstance(n, list) else (_integer(n),))


def _mirrored_box(attributes: dict[str, object]) -> Space:
    shape = attributes.get("_shape", attributes.get("shape"))
    return _box(_vector(shape), attributes.get("dtype"))


def _mirrored_dict(attributes: dict[str, object]) -> Space:
    spaces = attributes.get("spaces")
    if not isinstance(spaces, str):
        raise CheckpointError(f"{short(spaces)} are no spaces of a Dict")
    parser = _Parser(spaces)
    space = parser.spaces_of_dict()
    parser.end()
    return space


_MIRRORED: dict[str, Callable[[dict[str, object]], Space]] = {
    "Box": _mirrored_box,
    "Dict": _mirrored_dict,
    "Discrete": _mirrored_discrete,
    "MultiBinary": _mirrored_multi_binary,
    "MultiDiscrete": _mirrored_multi_discrete,
}


def _multi_discrete(nvec: tuple[int, ...], start: tuple[int, ...]) -> MultiDiscrete:
    if not nvec or len(nvec) != len(start):
        raise CheckpointError(f"a MultiDiscrete of {short(list(nvec))} is no space")
    return MultiDiscrete(tuple(map(_count, nvec)), start)


def _multi_binary(shape: tuple[int, ...]) -> MultiBinary:
    if not shape:
        raise CheckpointError("a MultiBinary of nothing is no space")
    return MultiBinary(tuple(map(_count, shape)))


def _box(shape: tuple[int, ...], dtype: object) -> Box:
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise CheckpointError(f"a Box of {short(dtype)} is not read")
    if not shape:
        raise CheckpointError("a Box of shape () is not read")
    return Box(tuple(map(_count, shape)), dtype)


def _integer(value: object) -> int:
    """A JSON number, or the text of one of NumPy's."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]{1,19}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{short(value)} is no whole number")
    return value


def _count(value: object) -> int:
    count = _integer(value)
    if not 1 <= count <= LARGEST_SIZE:
        raise CheckpointError(f"{short(count)} is no number of choices or numbers")
    return count


def _vector(value: object) -> tuple[int, ...]:
    """A JSON list, or the text of NumPy's or of a tuple."""
    if isinstance(value, str):
        parser = _Parser(value)
        vector = parser.vector()
        parser.end()
        return vector
    if not isinstance(value, list):
        raise CheckpointError(f"{short(value)} is no list of whole numbers")
    return tuple(map(_integer, value))


class _Parser:
    """Takes a space off its text, token by token."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST_TEXT:
            raise CheckpointError(f"a space of {len(text)} letters is not read")
        self._text = text
        self._end = 0
        self._next()

    def space(self, is_inner: bool) -> Space:
        kind = self._take("word")
        if kind in ("Dict", "Tuple") and is_inner:
            raise CheckpointError(f"{self._shown} has a {kind} within, and Dicts are read one deep")
        if kind not in _MIRRORED:
            raise CheckpointError(f"{kind} is no space that is read")
        self._take("mark", "(")
        space = self._SPACES[kind](self)
        self._take("mark", ")")
        return space

    def spaces_of_dict(self) -> Dict:
        """What a Dict's own mapping prints: `{...}`, or `OrderedDict([...])` before."""
        if self._is("word", "OrderedDict"):
            self._take("word")
            self._take("mark", "(")
            space = self._pairs() if self._is("mark", "[") else self._braced()
            self._take("mark", ")")
            return space
        return self._braced()

    def vector(self) -> tuple[int, ...]:
        """Whole numbers in brackets, with commas or without."""
        close = ")" if self._is("mark", "(") else "]"
        self._take("mark", "(" if close == ")" else "[")
        numbers = []
        while not self._is("mark", close):
            if self._is("mark", "..."):
                raise CheckpointError(
                    f"{self._shown} leaves numbers out, as NumPy prints more than 1000"
                )
            if self._is("mark", "["):
                raise CheckpointError(f"{self._shown} has rows, and one is read")
            numbers.append(self._number())
            if self._is("mark", ","):
                self._take("mark")
        self._take("mark", close)
        return tuple(numbers)

    def end(self) -> None:
        if self._kind:
            raise self._error()

    def _discrete(self) -> Space:
        n = self._number()
        options = self._options()
        return Discrete(_count(n), _integer(options.get("start", 0)))

    def _multi_discrete(self) -> Space:
        nvec = self.vector()
        start = self._options().get("start", (0,) * len(nvec))
        return _multi_discrete(nvec, start if isinstance(start, tuple) else ())

    def _multi_binary(self) -> Space:
        has_shape = self._is("mark", "(") or self._is("mark", "[")
        return _multi_binary(self.vector() if has_shape else (self._number(),))

    def _box(self) -> Space:
        for _ in ("low", "high"):
            self._skip_bound()
            self._take("mark", ",")
        shape = self.vector()
        self._take("mark", ",")
        return _box(shape, self._take("word"))

    def _dict(self) -> Space:
        return self.spaces_of_dict() if self._is("mark", "{") else Dict(self._items(")"))

    _SPACES: ClassVar[dict[str, Callable[["_Parser"], Space]]] = {
        "Box": _box,
        "Dict": _dict,
        "Discrete": _discrete,
        "MultiBinary": _multi_binary,
        "MultiDiscrete": _multi_discrete,
    }

    def _braced(self) -> Dict:
        self._take("mark", "{")
        items = self._items("}")
        self._take("mark", "}")
        return Dict(items)

    def _items(self, close: str) -> tuple[tuple[str, Space], ...]:
        items = []
        while not self._is("mark", close):
            key = self._key()
            self._take("mark", ":")
            items.append((key, self.space(is_inner=True)))
            if not self._is("mark", close):
                self._take("mark", ",")
        return tuple(items)

    def _pairs(self) -> Dict:
        self._take("mark", "[")
        items = []
        while not self._is("mark", "]"):
            self._take("mark", "(")
            key = self._key()
            self._take("mark", ",")
            items.append((key, self.space(is_inner=True)))
            self._take("mark", ")")
            if not self._is("mark", "]"):
                self._take("mark", ",")
        self._take("mark", "]")
        return Dict(tuple(items))

    def _key(self) -> str:
        literal = self._take("text")
        try:
            key = str(ast.literal_eval(literal))
            key.encode()
        except (SyntaxError, ValueError):
            raise self._error() from None
        return key

    def _options(self) -> dict[str, int | tuple[int, ...]]:
        """`start=...` and `dtype=...`, of which the second changes nothing."""
        options: dict[str, int | tuple[int, ...]] = {}
        while self._is("mark", ","):
            self._take("mark")
            name = self._take("word")
            self._take("mark", "=")
            if name == "dtype":
                self._take("word")
            elif name == "start":
                options[name] = self.vector() if self._is("mark", "[") else self._number()
            else:
                raise self._error()
        return options

    def _skip_bound(self) -> None:
        """A number or an array, of which it does not matter whether it is whole."""
        if self._is("number"):
            self._next()
            return
        self._take("mark", "[")
        depth = 1
        while depth:
            if self._is("word") or self._is("text") or not self._kind:
                raise self._error()
            depth += self._is("mark", "[") - self._is("mark", "]")
            self._next()

    def _number(self) -> int:
        return _integer(self._take("number"))

    def _is(self, kind: str, value: str | None = None) -> bool:
        return self._kind == kind and value in (None, self._value)

    def _take(self, kind: str, value: str | None = None) -> str:
        if not self._is(kind, value):
            raise self._error()
        taken = self._value
        self._next()
        return taken

    def _next(self) -> None:
        found = TOKEN.match(self._text, self._end)
        if found is None:
            if self._text[self._end :].strip():
                raise self._error()
            self._kind, self._value = "", ""
            return
        self._kind = found.lastgroup or ""
        self._value = found[self._kind]
        self._end = found.end()

    @property
    def _shown(self) -> str:
        return short(self._text)

    def _error(self) -> CheckpointError:
        return CheckpointError(f"{self._shown} is no space as it is printed, such as {EXAMPLE}")
