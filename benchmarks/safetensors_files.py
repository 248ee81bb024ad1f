"""Fuzzes the reader of safetensors files, in this process; the `safetensors` package is the oracle.

Every good file must be read. Of any other, the reader takes what the package reads too, with the
same content, or refuses it with Malformed and one short sentence; nothing else is ever raised, and
memory is level from half time on.
"""

import json
import re
import time
from collections import Counter
from math import prod
from os import getpid
from pathlib import Path
from random import Random

from safetensors.numpy import load

from benchmarks.mutation import damaged
from benchmarks.process import Memory, resident_mib
from service.errors import Malformed
from service.http.safetensors_file import DTYPES, METADATA, SafetensorsFile, read_file

LONGEST_SENTENCE = 300
SAMPLE_S = 0.5
NAMES = ["observation", "action_mask", "action_mask.op", "state_h", "", "é", '"', "\\", "\n", "x"]
VALUES = [*("trainer-3", "0", "", "-0", '"', "\\", '\\"', "{}", "\0", "\U0001f642", "x" * 300)]
ODD_TEXTS = [
    *("null", "true", "0", "1", "8", "-1", "-0", "1.0", "1e3", str(2**31), str(2**62), str(2**63)),
    *(str(2**64 - 1), str(2**64), "1" * 4300, '""', '"F16"', '"BOOL"', '"F32"', '"\\u0000"'),
    *("[]", "[[]]", "{}", "[0]", "[0,0]", "[8,8]", '{"a":"b","a":"b"}', f'"{"x" * 300}"'),
    *(f"[{'1,' * 64}1]", f"[0,{2**62},4]"),
]
BROKEN_TEXTS = [
    *("", ",", "1,1", "01", "+1", "NaN", "Infinity", "1e400", "1" * 5000, "'x'", "[" * 300),
    *('"\\ud800"', '"\\"', "0," * 70 + "0", "1," * 2000 + "1"),
]
SLIPS_BYTES = [0] * 20 + [-8, -4, -1, 1, 4, 8]
SCALARS = re.compile(r'"[^"]*"|\d+')
MEMBERS = re.compile(r'"[^"]*"\s*:\s*(?:"[^"]*"|\[[^]]*\]|\{[^{}]*\})')
INNERMOST = re.compile(r"\[[^]]*\]|\{[^{}]*\}")


class FileFuzzer:
    """Files, good and not; the same seed, the same files."""

    def __init__(self, seed: str) -> None:
        self._random = Random(seed)

    def file(self) -> tuple[bytes, bool]:
        """A file, and whether it is good."""
        choose = self._random
        is_good = choose.random() < 0.2
        header, data = self._content(is_good)
        separators = choose.choice(((",", ":"), (", ", ": "), (" ,\n", "\t:\r")))
        text = json.dumps(header, ensure_ascii=choose.random() < 0.5, separators=separators)
        if not is_good and choose.random() < 0.8:
            text = self._with_odd_texts(text)
        content = text.encode() + b" " * choose.choice((-len(text.encode()) % 8, 0, 1))
        length = len(content)
        if not is_good and choose.random() < 0.5:
            if choose.random() < 0.7:
                content = damaged(choose, content)
                length = len(content)
            else:
                data = damaged(choose, data)
            if choose.random() < 0.1:
                length = choose.choice(
                    (0, 1, 7, 8, length - 1, length + 1, 2**16, 2**63, 2**64 - 1)
                )
        file = max(length, 0).to_bytes(8, "little") + content + data
        if not is_good and choose.random() < 0.2:
            file = damaged(choose, file)
        return file, is_good

    def _content(self, is_good: bool) -> tuple[dict[str, object], bytes]:
        choose = self._random
        tensors: dict[str, object] = {}
        data = b""
        for name in choose.sample(NAMES, choose.randrange(5)):
            dtype = choose.choice(list(DTYPES))
            shape = [choose.choice((0, 1, 1, 2, 3, 8)) for _ in range(choose.randrange(4))]
            num_values = prod(shape)
            if dtype == "BOOL":
                content = bytes(choose.choices((0, 1), k=num_values))
            else:
                content = choose.randbytes(num_values * DTYPES[dtype].itemsize)
            start = len(data) if is_good else max(0, len(data) + choose.choice(SLIPS_BYTES))
            offsets = [start, start + len(content)]
            tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            data += content
        if choose.random() < 0.7:
            names = choose.sample(NAMES, choose.randrange(4))
            tensors[METADATA] = {name: choose.choice(VALUES) for name in names}
        members = list(tensors.items())
        choose.shuffle(members)
        return dict(members), data

    def _with_odd_texts(self, text: str) -> str:
        """With a number, a string or a whole value that is another, is there twice, or is gone."""
        choose = self._random
        for _ in range(choose.choice((1, 1, 1, 2, 4))):
            matches = (*SCALARS.finditer(text), *INNERMOST.finditer(text))
            spans = [match.span() for match in matches]
            if not spans:
                break
            start, end = choose.choice(spans)
            odd = choose.choice(BROKEN_TEXTS if choose.random() < 0.1 else ODD_TEXTS)
            if choose.random() < 0.3:
                odd = text[slice(*choose.choice(spans))]
            members = list(MEMBERS.finditer(text))
            if members and choose.random() < 0.2:
                start, end = choose.choice(members).span()
                odd = f"{text[start:end]},{choose.choice(members).group()}"
            text = text[:start] + odd + text[end:]
        return text


def fault(body: bytes | bytearray, is_good: bool) -> tuple[str, str]:
    """What is wrong with the reader's answer, nothing as a rule; and the kind of answer."""
    try:
        file = read_file(body)
    except Malformed as error:
        sentence = str(error)
        kind = re.sub(r"(not JSON|dtype` is)\b.*", r"\1 ...", sentence)
        kind = re.sub(
            r"^`.*?(\.shape|\.dtype|\.data_offsets)?` (is|has|ends|starts)", r"`_\1` \2", kind
        )
        kind = re.sub(r"\d+", "_", kind)
        if is_good:
            return f"a good file refused: {sentence}", kind
        if not sentence.isprintable() or len(sentence) > LONGEST_SENTENCE:
            return f"no sentence: {sentence!r}", kind
        return "", kind
    except Exception as error:  # what is looked for: the reader raises Malformed and nothing else
        return f"another exception: {type(error).__name__}", "raised"
    return "" if is_as_the_package_reads(file, bytes(body)) else "content of its own", "read"


def is_as_the_package_reads(file: SafetensorsFile, body: bytes) -> bool:
    try:
        expected = load(body)
    except Exception:  # whatever the package raises: it does not read what we read
        return False
    length = int.from_bytes(body[:8], "little")
    return (
        {name: (t.dtype, t.shape, t.tobytes()) for name, t in file.tensors.items()}
        == {name: (t.dtype, t.shape, t.tobytes()) for name, t in expected.items()}
    ) and file.metadata == json.loads(body[8 : 8 + length]).get(METADATA, {})


def fuzz_files(seconds: float, seed: int, failures: Path) -> bool:
    """Whether everything held."""
    fuzzer = FileFuzzer(f"{seed}")
    kinds: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    samples_mib: list[float] = []
    start_s = time.monotonic()
    while (now_s := time.monotonic()) < start_s + seconds:
        if now_s - start_s >= SAMPLE_S * len(samples_mib):
            samples_mib.append(resident_mib(getpid()))
        content, is_good = fuzzer.file()
        body = bytearray(content) if kinds.total() % 2 else content
        what, kind = fault(body, is_good)
        kinds[kind] += 1
        if what:
            wrong[what] += 1
            if wrong[what] == 1:
                failures.mkdir(parents=True, exist_ok=True)
                path = failures / f"file-{len(wrong)}.safetensors"
                path.write_bytes(content)
                print(f"FAILED: {what}, {path}", flush=True)
    memory = Memory.of(samples_mib)
    if not memory.is_level:
        wrong["memory that grows"] += 1
    print(f"safetensors files: {kinds.total():,} in {seconds:.0f} s")
    for kind, number in kinds.most_common():
        print(f"  {number:,}: {kind}")
    print(f"  {memory}")
    for what, number in wrong.items():
        print(f"  FAILED: {what}, {number} times")
    return not wrong
