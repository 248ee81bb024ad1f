"""What broken, careless and hostile clients make of good requests. Pure: a generator in, bytes out.

A stream is what one connection sends: some requests, each of them good or not, in pieces, and how
it ends. Nothing here asks for HEAD, whose answers cannot be told apart without knowing the request.
"""

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from model.spec import PolicySpec
from service.bench.pool import POOL_SIZE, Pool

NUM_NAMES = 64
LAST = b"GET /healthz HTTP/1.1\r\nHost: fuzz\r\nConnection: close\r\n\r\n"
ENDINGS = {
    "asks for the end": 50,
    "shuts its side": 20,
    "waits": 10,
    "closes": 10,
    "resets": 10,
}
ODD_VALUES = [
    *("null", "true", "false", "0", "1", "-1", "2", "0.5", "-0.0", "1.0", "1e3", "1e39", "1e400"),
    *("NaN", "-Infinity", str(2**53 + 1), str(2**63), str(2**64 - 1), str(2**64), "1" + "0" * 5000),
    *('""', '"1"', '"true"', '"\\ud800"', '"\\u0000"', '"\U0001f642"', f'"{"x" * 257}"'),
    *("[]", "[[]]", "[null]", "[0,1]", "{}", '{"op":[]}', '{"op":[2]}', '{"x":null}', "[" * 300),
    *('{"h":[[0]],"c":[[0]]}', '{"h":[],"c":[],"x":0}', "", "nul", "//", "'x'", "1 2"),
]
ODD_DTYPES = ["f8", "f4", "f2", "i8", "u8", "u1", "?"]
ODD_TENSORS = ["observation", "seed", "state_h", "state_c", "action_mask.op", "noise", "x"]
ODD_TARGETS = [
    *("/act?x=1", "/%61ct", "//act", "/act/", "/act%00", "/act#x", "*", "act", "", "/../act"),
    *("http://fuzz/act", "http://[/act", "/sessions/%0A", "/sessions/", "/sessions/%ff%fe"),
    *("/" + "x" * 3000, "/act\t", "/\u00e9", "/docs", "/openapi.json", "/metrics", "/policy", "/"),
]
ODD_HEADERS = [
    *("Content-Length: 0", "Content-Length: 5", "Content-Length: -1", "Content-Length: +3"),
    *("Content-Length: 0x10", "Content-Length: ", "Content-Length: 99999999999999999"),
    *(f"Content-Length: {2**64}", "Content-Length: \u00b2", "Content-Length: 1, 1"),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: x"),
    *("Expect: 100-continue", "Expect: else", "Upgrade: h2c", "Upgrade: websocket"),
    *("Connection: Upgrade", "Connection: close", "Connection: keep-alive", "Connection: x, close"),
    *("Content-Type: text/plain", "Content-Type: ", "Content-Type: application/json;charset=x"),
    *("Content-Encoding: gzip", "Content-Encoding: identity", "Accept: text/html"),
    *("X-Session-Id: other", "X-Session-Id: ", "X-Session-Id: fuzz-1", "Host: ", "Host: a b"),
    *(": empty", "no colon", "Sp ace: 1", "X-Nul: \0", "X-Return: a\rb", "X: a\r\n folded"),
    *("X-Long: " + "x" * 9000, "X-Longer: " + "x" * 70_000, "X-Many: 1\r\n" * 300 + "X: 1"),
]
Members = list[tuple[str, str]]


class Stream(NamedTuple):
    """`num_answers` is known where every request is good and the connection ends in good order.

    The first `num_good` requests are good: nothing in their answers may be about their form.
    """

    pieces: list[bytes]
    ending: str
    num_good: int
    num_answers: int | None

    @property
    def content(self) -> bytes:
        return b"".join(self.pieces)


class Fuzzer:
    """Streams for one policy; the same seed, the same streams."""

    def __init__(self, spec: PolicySpec, seed: str) -> None:
        self._random = Random(seed)
        pool = Pool.random(spec, 0)
        self._arrays = pool.by_name()
        bodies = pool.bodies(spec)
        self._inputs = [
            [(name, json.dumps(value)) for name, value in json.loads(b"{%b}" % body).items()]
            for body in bodies
        ]

    def stream(self) -> Stream:
        choose = self._random
        num_requests = choose.choice((1, 1, 1, 2, 3, 6))
        share_broken = choose.choice((0.0, 0.3, 1.0))
        broken = [choose.random() < share_broken for _ in range(num_requests)]
        content = b"".join(map(self._request, broken))
        num_good = broken.index(True) if any(broken) else num_requests
        if any(broken) and choose.random() < 0.2:
            content, num_good = damaged(choose, content), 0
        ending = choose.choices(list(ENDINGS), list(ENDINGS.values()))[0]
        if ending == "asks for the end":
            content += LAST
        elif ending in ("closes", "resets") and choose.random() < 0.7:
            content = content[: choose.randrange(len(content) + 1)]
        is_whole = num_good == num_requests and ending == "asks for the end"
        num_answers = num_requests + 1 if is_whole else None
        return Stream(self._in_pieces(content), ending, num_good, num_answers)

    def _request(self, is_broken: bool) -> bytes:
        choose = self._random
        method, target, body = "POST", "/act", self._text(self._members())
        if choose.random() < 0.3:
            return self._vector(is_broken and choose.random() < 0.8)
        if choose.random() < 0.15:
            method, body = choose.choice((("GET", ""), ("DELETE", "")))
            target = f"/sessions/{self._name()}"
            if method == "GET":
                target = choose.choice(("/healthz", "/readyz", "/metrics", "/policy"))
        content = body.encode()
        headers = ["Host: fuzz", "Content-Type: application/json"]
        if choose.random() < 0.2:
            head, content = ["Transfer-Encoding: chunked"], self._chunked(content, False)
        else:
            head = [f"Content-Length: {len(content)}"]
        version = "HTTP/1.1"
        if is_broken:
            match choose.randrange(6):
                case 0 | 1 if method == "POST":
                    content = self._text(self._with_odd_members(self._members())).encode()
                    head = [f"Content-Length: {len(content)}"]
                case 2 if method == "POST":
                    content = damaged(choose, content)
                    if choose.random() < 0.7:
                        head = [f"Content-Length: {len(content)}"]
                case 3:
                    head, content = (
                        ["Transfer-Encoding: chunked"],
                        self._chunked(body.encode(), True),
                    )
                case 4:
                    headers, head = self._with_odd_headers(headers, head)
                case _:
                    method = choose.choice((method, "GET", "PUT", "post", "OPTIONS", "FOO", ""))
                    target = choose.choice((target, *ODD_TARGETS))
                    version = choose.choice((version, "HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "X", ""))
        lines = [f"{method} {target} {version}", *headers, *head, "", ""]
        return "\r\n".join(lines).encode() + content

    def _vector(self, is_broken: bool) -> bytes:
        """A request of several environments, in safetensors."""
        choose = self._random
        num_rows = choose.choice((1, 2, 3, 8, 40))
        first = choose.randrange(POOL_SIZE)
        rows = (first + np.arange(num_rows)) % POOL_SIZE
        tensors = {name: array[rows] for name, array in self._arrays.items()}
        metadata = {}
        if choose.random() < 0.7:
            # The number of rows, which is fixed for a run, in the name.
            metadata["session_id"] = f"fuzz-{num_rows}-{choose.randrange(NUM_NAMES)}"
            if choose.random() < 0.5:
                tensors["episode_start"] = np.ones(num_rows, dtype=np.bool_)
                metadata["run"] = f"{choose.randrange(3)}"
            elif choose.random() < 0.7:
                metadata["step"] = f"{choose.randrange(1, 4)}"
                tensors["episode_start"] = rows % 7 == 0
        if choose.random() < 0.3:
            metadata["seed"] = choose.choice(("0", "7", f"{2**64 - 1}"))
        if choose.random() < 0.2:
            metadata["deterministic"] = choose.choice(("true", "false"))
        if is_broken:
            with np.errstate(all="ignore"):
                self._make_odd(tensors, metadata)
        content = save({name: np.ascontiguousarray(a) for name, a in tensors.items()}, metadata)
        if is_broken and choose.random() < 0.5:
            content = damaged(choose, content)
        lines = [
            "POST /act HTTP/1.1",
            "Host: fuzz",
            "Content-Type: application/vnd.safetensors",
            *choose.choice(([], ["Accept: application/json"])),
            f"Content-Length: {len(content)}",
            *("", ""),
        ]
        return "\r\n".join(lines).encode() + content

    def _make_odd(self, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
        choose = self._random
        for _ in range(choose.choice((1, 1, 2, 4))):
            name = choose.choice([*tensors, *ODD_TENSORS])
            array = tensors.get(name, np.zeros(3, dtype=np.float32))
            match choose.randrange(8):
                case 0:
                    tensors.pop(name, None)
                case 1:
                    tensors[name] = array.astype(choose.choice(ODD_DTYPES))
                case 2:
                    tensors[name] = array[: choose.randrange(len(array) + 1)]
                case 3:
                    tensors[name] = array.repeat(choose.choice((2, 60)), axis=0)
                case 4:
                    tensors[name] = array.reshape(choose.choice(((-1,), (1, -1), (-1, 1))))
                case 5:
                    tensors[name] = np.full_like(array, choose.choice((0, 1, 77)))
                case 6 if array.dtype == np.float32:
                    tensors[name] = array * np.float32(choose.choice(("nan", "inf", "1e38")))
                case _:
                    field = choose.choice(("session_id", "run", "step", "seed", "timeout_ms", "x"))
                    metadata[field] = choose.choice(ODD_VALUES)

    def _name(self) -> str:
        return f"fuzz-{self._random.randrange(NUM_NAMES)}"

    def _members(self) -> Members:
        """A request's fields and their values, as JSON texts."""
        choose = self._random
        members = list(choose.choice(self._inputs))
        if choose.random() < 0.2:
            members = [member for member in members if member[0] != "action_mask"]
        if choose.random() < 0.7:
            members.append(("session_id", json.dumps(self._name())))
            if choose.random() < 0.5:
                members.append(("episode_start", "true"))
                members.append(("episode", f'"{choose.randrange(3)}"'))
            elif choose.random() < 0.7:
                members.append(("step", str(choose.randrange(4))))
        if choose.random() < 0.3:
            members.append(("seed", str(choose.choice((0, 7, 2**64 - 1)))))
        if choose.random() < 0.2:
            members.append(("deterministic", choose.choice(("true", "false"))))
        if choose.random() < 0.2:
            members.append(("timeout_ms", choose.choice(("1e-6", "0.5", "5000", "1e300"))))
        choose.shuffle(members)
        return members

    @staticmethod
    def _text(members: Members) -> str:
        return "{" + ",".join(f'"{name}":{value}' for name, value in members) + "}"

    def _with_odd_members(self, members: Members) -> Members:
        choose = self._random
        for _ in range(choose.choice((1, 1, 1, 2, 5))):
            at = choose.randrange(len(members))
            name, value = members[at]
            odd = choose.choice(ODD_VALUES)
            match choose.randrange(9):
                case 0 if len(members) > 1:
                    del members[at]
                case 1:
                    members.insert(
                        choose.randrange(len(members)), (name, choose.choice((odd, value)))
                    )
                case 2:
                    depth = choose.choice((1, 2, 50, 5000))
                    members[at] = (name, "[" * depth + value + "]" * depth)
                case 3:
                    key = choose.choice((name, "h", "op"))
                    members[at] = (name, f'{{"{key}":{value}}}')
                case 4:
                    members[at] = (choose.choice(("x", "sesion_id", "", "h\\n", "x" * 500)), value)
                case 5 | 6:
                    numbers = list(re.finditer(r"-?\d[\d.e+-]*|true|false", value))
                    if numbers:
                        start, end = choose.choice(numbers).span()
                        members[at] = (name, value[:start] + odd + value[end:])
                case 7:
                    members.append((choose.choice(("state", "seed", "step", "episode", "x")), odd))
                case _:
                    members[at] = (name, odd)
        if choose.random() < 0.01:
            members.append(("x", f'"{"x" * choose.choice((250_000, 400_000))}"'))
        return members

    def _with_odd_headers(self, headers: list[str], head: list[str]) -> tuple[list[str], list[str]]:
        choose = self._random
        for _ in range(choose.choice((1, 1, 2, 4))):
            match choose.randrange(4):
                case 0 if headers:
                    headers.pop(choose.randrange(len(headers)))
                case 1:
                    head = []
                case _:
                    headers.insert(choose.randrange(len(headers) + 1), choose.choice(ODD_HEADERS))
        return headers, head

    def _chunked(self, content: bytes, is_broken: bool) -> bytes:
        choose = self._random
        size = choose.choice((1, 7, 100, 1000, 100_000))
        size = max(size, len(content) // 200)
        chunks = [content[at : at + size] for at in range(0, len(content), size)]
        texts = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks] + [b"0\r\n\r\n"]
        if choose.random() < 0.2:
            texts[0] = texts[0].replace(b"\r\n", b";name=value\r\n", 1)
            texts[-1] = b"0\r\nX-Trailer: 1\r\n\r\n"
        if is_broken:
            at = choose.randrange(len(texts))
            odd: list[Callable[[bytes], bytes]] = [
                lambda text: b"-" + text,
                lambda text: b"+" + text,
                lambda text: b"g" + text,
                lambda text: b"f" * 20 + text,
                lambda text: b"f" + text,
                lambda text: text[1:],
                lambda text: text[:-2],
                lambda text: text + b"\r\n",
                lambda text: text.replace(b"\r\n", b"\n"),
                lambda text: text.replace(b"\r\n", b";" + b"x" * 20_000 + b"\r\n", 1),
                lambda text: b"",
                lambda text: b"0\r\n\r\n",
                lambda text: b"0\r\nX-Long: " + b"x" * 70_000 + b"\r\n\r\n",
            ]
            texts[at] = choose.choice(odd)(texts[at])
        return b"".join(texts)

    def _in_pieces(self, content: bytes) -> list[bytes]:
        choose = self._random
        num_cuts = choose.choice((0, 0, 1, 2, 20))
        cuts = sorted(choose.choices(range(len(content) + 1), k=num_cuts))
        return [content[at:to] for at, to in zip([0, *cuts], [*cuts, len(content)], strict=True)]


def damaged(choose: Random, content: bytes) -> bytes:
    """With some bytes deleted, repeated, put in, cut off or changed."""
    result = bytearray(content or b" ")
    for _ in range(choose.choice((1, 1, 2, 8))):
        at, other = sorted(choose.choices(range(len(result) + 1), k=2))
        match choose.randrange(6):
            case 0:
                result[at:other] = b""
            case 1:
                result[at:at] = result[at : min(other, at + 3000)]
            case 2:
                result[at:at] = choose.randbytes(choose.choice((1, 3, 50)))
            case 3:
                result = result[:other]
            case _ if at < len(result):
                result[at] ^= 1 << choose.randrange(8)
        result = result or bytearray(b" ")
    return bytes(result)
