"""Files of keys: what is read of them, what is refused, and that no key is ever said."""

import hmac
import logging
import os
import re
from pathlib import Path

import pytest

from service.http.key_file import KeyFile, KeyFileError, digest_of

ONE, TWO, THREE = (f"{letter}{'x' * 20}" for letter in "abc")
SHORT_ONE = "hunter2"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "act.keys"


def written(path: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def names(path: Path, *keys: str) -> list[str | None]:
    file = KeyFile(path)
    return [file.name_of(digest_of(key.encode())) for key in keys]


def test_a_line_is_a_key_and_its_name_or_the_line_is_its_name(path: Path) -> None:
    written(path, f"# of the lab\n\n{ONE} alice\n   {TWO}\t \r\n  # {THREE}\n{THREE} Zoë")
    assert names(path, ONE, TWO, THREE) == ["alice", "line 4", "Zoë"]
    assert names(path, "", "alice", ONE[:-1], f"{ONE} alice", "#") == [None] * 5


def test_what_begins_with_a_number_sign_is_a_comment_also_behind_a_key(path: Path) -> None:
    written(path, f"{ONE} #alice's key\n{TWO} bob # hers\n{THREE} c#\n")
    assert names(path, ONE, TWO, THREE) == ["line 1", "bob", "c#"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_ends_as_on_any_system_and_the_next_key_is_no_name(path: Path, end: str) -> None:
    written(path, end.join(["#", ONE, TWO[:-1], f"{THREE} carol", ""]))
    assert names(path, ONE, TWO[:-1], THREE) == ["line 2", "line 3", "carol"]


@pytest.mark.parametrize("key", ["!" * 16, "~" * 16, "a#b-._~+/=,:;'\"\\", f"{ONE}=="])
def test_a_key_is_of_any_printable_ascii(path: Path, key: str) -> None:
    assert names(written(path, f"{key}\n"), key) == ["line 1"]


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "there is no key in it"),
    "comments": (f"# {ONE}\n\n", "there is no key in it"),
    "a key twice": (f"{ONE} a\n#\n{ONE} b\n", "line 3: the key of line 1 stands here again"),
    "three words": (f"{ONE}\n{TWO} alice's key\n", "line 2: more than a key and its name"),
    "three words before a comment": (f"{ONE} of alice # hers", "line 1: more than a key and its"),
    "a key of other letters": (f"{ONE}é\n", "line 1: the key is not of printable ASCII"),
    "a byte order mark": (f"\ufeff{ONE}\n", "line 1: the key is not of printable ASCII"),
    "a control character": (f"{ONE}\x07\n", "line 1: the key is not of printable ASCII"),
    "UTF-16": (f"{ONE}\n".encode("utf-16"), "line 1: the key is not of printable ASCII"),
    "its name before it": (
        f"alice {ONE}\n",
        "line 1: the key comes first, and its name is shorter",
    ),
    "a long name before it": (f"{'n' * 20} {ONE}\n", "line 1: the key comes first, and its"),
    "another key of its length after it": (f"{ONE} {TWO}\n", "line 1: the key comes first, and"),
    "a short one after its name": ("bob hunter2\n", "line 1: the key comes first, and its name"),
}


@pytest.mark.parametrize(("content", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_file_of_keys_is_refused_in_a_sentence_without_them(
    path: Path, content: str | bytes, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    written(path, content)
    with pytest.raises(KeyFileError, match=re.escape(f"{path}: {says}")) as refusal:
        KeyFile(path)
    for text in (str(refusal.value), caplog.text):
        assert not any(key in text for key in (ONE, TWO, THREE, SHORT_ONE))
    assert "\n" not in str(refusal.value)


def test_a_file_that_cannot_be_read_is_refused(path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"act\.keys: it cannot be read: No such file"):
        KeyFile(path)
    path.mkdir()
    with pytest.raises(KeyFileError, match=r"act\.keys: it cannot be read: Is a directory"):
        KeyFile(path)


def test_what_is_no_regular_file_is_refused_and_never_waited_for(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = KeyFile(written(path, f"{ONE} alice\n"))
    path.unlink()
    os.mkfifo(path)
    for refused in (path, Path("/dev/zero")):
        with pytest.raises(KeyFileError, match=f"{refused}: it is no regular file"):
            KeyFile(refused)
    file.reload()
    assert file.name_of(digest_of(ONE.encode())) == "alice"
    assert "it is no regular file; its keys stay as they were" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused(path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"act\.keys: it cannot be read: Permission denied"):
        KeyFile(written(path, ONE, mode=0))


@pytest.mark.parametrize(
    ("line", "called"), [(f"{SHORT_ONE} alice", "alice"), (SHORT_ONE, "line 1")]
)
def test_a_short_key_is_warned_of_by_name(
    path: Path, line: str, called: str, caplog: pytest.LogCaptureFixture
) -> None:
    KeyFile(written(path, f"{line}\n{ONE[:16]} bob\n"))
    (warning,) = warnings(caplog)
    assert f"the key {called} is shorter than 16 characters" in warning
    assert SHORT_ONE not in caplog.text


@pytest.mark.parametrize(("mode", "is_warned_of"), [(0o644, True), (0o640, False), (0o400, False)])
def test_a_file_that_everybody_can_read_is_warned_of(
    path: Path, mode: int, is_warned_of: bool, caplog: pytest.LogCaptureFixture
) -> None:
    KeyFile(written(path, ONE, mode))
    assert [f"{path} can be read by every user" in of for of in warnings(caplog)] == (
        [True] * is_warned_of
    )


def test_what_is_read_is_logged_by_name_on_one_line(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    KeyFile(written(path, f"{ONE} alice\n{TWO}\n".encode() + THREE.encode() + b" \x1b[2J\xff\n"))
    assert [record.getMessage() for record in caplog.records] == [
        f"keys in {path}: 3 (alice, line 2, \\x1b[2J\\xff)"
    ]


def test_reading_again_takes_what_is_there_now(path: Path) -> None:
    file = KeyFile(written(path, f"{ONE} alice\n{TWO} bob\n"))
    written(path, f"{TWO} robert\n{THREE}\n")
    assert file.name_of(digest_of(ONE.encode())) == "alice", "nobody has asked for it"
    file.reload()
    called = [file.name_of(digest_of(key.encode())) for key in (ONE, TWO, THREE)]
    assert called == [None, "robert", "line 2"]


@pytest.mark.parametrize("content", ["", f"# {ONE} alice\n"])
def test_the_last_key_is_revoked_as_any_other_and_the_log_warns_that_there_is_none(
    path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = KeyFile(written(path, f"{ONE} alice\n"))
    written(path, content)
    file.reload()
    assert file.name_of(digest_of(ONE.encode())) is None
    assert warnings(caplog) == [f"{path}: there is no key in it any more, and it lets nobody in"]
    written(path, f"{TWO} bob\n")
    file.reload()
    assert file.name_of(digest_of(TWO.encode())) == "bob"


def test_a_bad_file_read_again_changes_nothing_and_is_logged(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = KeyFile(written(path, f"{ONE} alice\n"))
    written(path, f"{TWO}\n{TWO}\n")
    file.reload()
    path.unlink()
    file.reload()
    called = [file.name_of(digest_of(key.encode())) for key in (ONE, TWO)]
    assert called == ["alice", None]
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [error.removeprefix(f"{path}: ") for error in errors] == [
        "line 2: the key of line 1 stands here again; its keys stay as they were",
        "it cannot be read: No such file or directory; its keys stay as they were",
    ]


@pytest.mark.parametrize("key", [ONE, TWO, THREE, "unknown", ""])
def test_every_key_is_compared_in_constant_time_whichever_it_is(
    path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = KeyFile(written(path, f"{ONE}\n{TWO}\n{THREE}\n"))
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def observed(known: bytes, given: bytes) -> bool:
        compared.append((known, given))
        return compare(known, given)

    monkeypatch.setattr(hmac, "compare_digest", observed)
    file.name_of(digest_of(key.encode()))
    digests = [digest_of(known.encode()) for known in (ONE, TWO, THREE)]
    assert compared == [(digest, digest_of(key.encode())) for digest in digests]
    assert {len(digest) for digest in digests} == {32}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
