"""The file of `push --api-key-file`: its key is one that the service takes from the same file."""

import re
from pathlib import Path
from typing import Any

import pytest

from export import commands
from export.__main__ import main
from service.http.key_file import KeyFile, digest_of
from tamiyo_client import PolicyError

KEY, OTHER = "k" * 20, "o" * 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "admin.keys"


def push(path: Path) -> None:
    main(["push", "--preset", "tamiyo-v1", "--to", "http://127.0.0.1:1", f"--api-key-file={path}"])


@pytest.mark.parametrize(
    "content",
    [
        KEY,
        f"{KEY} admin\n{OTHER} other\n",
        f"# {OTHER}\n\n  # {OTHER}\n\t#{OTHER}\n  {KEY}\t Zo\u00eb\n",
        f"# the lab's\r\n{KEY}\r\n{OTHER}\r\n",
        f"# the lab's\r{KEY}\r{OTHER}\r",
    ],
    ids=["alone", "named", "below comments", "CRLF", "CR"],
)
def test_it_is_the_first_key_of_the_file_as_the_service_reads_it(
    path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(content.encode())
    sent = []

    def pushed(*arguments: Any, **_: Any) -> None:
        sent.append(arguments[3])
        raise PolicyError("that is enough")

    monkeypatch.setattr(commands, "load_source", lambda options: (None, None, None))
    monkeypatch.setattr(commands, "push_policy", pushed)
    with pytest.raises(SystemExit):
        push(path)
    assert sent == [KEY]
    assert KeyFile(path).name_of(digest_of(KEY.encode())) is not None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no key"),
        (f"# {KEY}\n  # {KEY}\n".encode(), "holds no key"),
        (f"\ufeff{KEY}\n".encode(), "the key is not of printable ASCII letters"),
        (f"{KEY}\u00eb\n".encode(), "the key is not of printable ASCII letters"),
        (f"{KEY}\x07\n".encode(), "the key is not of printable ASCII letters"),
        (f"{KEY}\n".encode("utf-16"), "the key is not of printable ASCII letters"),
    ],
    ids=["nothing", "comments", "byte order mark", "letters", "control", "UTF-16"],
)
def test_a_file_without_one_is_refused_in_a_sentence_that_does_not_show_it(
    path: Path, content: bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        push(path)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.fullmatch(rf".*{re.escape(str(path))}: {says}\n", said)
    assert "kkk" not in said


def test_a_file_that_is_not_there_is_refused(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        push(path)
    assert f"{path}: cannot be read (No such file or directory)" in capsys.readouterr().err
