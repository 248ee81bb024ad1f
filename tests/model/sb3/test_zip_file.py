"""The zip: its members within bounds, or a sentence of what the file is instead."""

import io
import random
import struct
import zipfile

import pytest
import torch

from model.sb3.zip_file import SB3Members, is_sb3_zip, read_members
from tests.model.sb3.saved_models import (
    loaded,
    model,
    refusal,
    torch_saved,
    with_declared_size,
    zipped,
)

MEMBERS = {"data": b"{}", "policy.pth": b"weights", "_stable_baselines3_version": b"2.9.2\n"}


class OfTheTrainer:
    """Stands for a class of the trainer in a pickle that nothing runs."""


OfTheTrainer.__module__ = "stable_baselines3.common.policies"


def policy_saved() -> bytes:
    """As `policy.save()` writes it: a zip of torch, whose pickle asks for the trainer's classes."""
    content = torch_saved({"state_dict": {}, "data": {"lr_schedule": "stand-in"}})
    archive = zipfile.ZipFile(io.BytesIO(content))
    members = {name: archive.read(name) for name in archive.namelist()}
    pickle = next(name for name in members if name.endswith("/data.pkl"))
    maker = f"{OfTheTrainer.__module__}\nBasePolicy\n".encode()
    members[pickle] = b"\x80\x02}X\x04\x00\x00\x00datac" + maker + b"s."
    return zipped(members)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_stored_or_deflated(compression: int) -> None:
    assert read_members(zipped(MEMBERS, compression)) == SB3Members(b"{}", b"weights", "2.9.2")


@pytest.mark.parametrize("version", [None, b"", b"2.9.2 (of\0mine)", b"\xff\xfe"])
def test_a_version_is_only_one_that_can_be_shown(version: bytes | None) -> None:
    members = {name: content for name, content in MEMBERS.items() if name[0] != "_"}
    if version is not None:
        members["_stable_baselines3_version"] = version
    assert read_members(zipped(members)).version is None


def test_what_the_trainer_wrote_is_told_from_what_torch_did() -> None:
    whole = model()
    assert is_sb3_zip(whole)
    assert is_sb3_zip(whole[: len(whole) // 2])
    assert is_sb3_zip(zipped({"policy.pth": b""}))
    assert is_sb3_zip(zipped({"data": b""}))
    assert is_sb3_zip(policy_saved())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"data",
        zipped({"other": b""}),
        zipped({"database": b""}),
        zipped({}),
        torch_saved({"network_state_dict": {"weight": torch.ones(3)}}),
        torch_saved({"data": {"policy.pth": torch.ones(3)}}),
        torch_saved(torch.ones(3))[:200],
    ],
    ids=["empty", "cut", "text", "other", "database", "no members", "torch", "torch data", "half"],
)
def test_other_files_are_not_the_trainers(content: bytes) -> None:
    assert not is_sb3_zip(content)


def test_what_is_no_zip_is_refused() -> None:
    said = "is no zip, and model.save() of Stable-Baselines3 writes one"
    assert refusal(b"") == refusal(b"\x80\x02}.") == said


@pytest.mark.parametrize("name", ["data", "policy.pth"])
def test_a_missing_member_is_named(name: str) -> None:
    members = {member: content for member, content in MEMBERS.items() if member != name}
    assert refusal(zipped(members)) == (
        f"holds no {name!r}, and model.save() of Stable-Baselines3 writes one"
    )


def test_what_policy_save_writes_is_refused_as_such() -> None:
    assert refusal(policy_saved()) == (
        "is what policy.save() writes, which takes running a pickle to read; save the whole model "
        "with model.save()"
    )


@pytest.mark.parametrize(
    "name", ["../data", "/data", "a/../../b", "..", "C:data", "..\\data", "\\data", "a\\..\\b"]
)
def test_a_member_outside_of_the_zip_is_refused(name: str) -> None:
    said = refusal(zipped(MEMBERS | {name: b""}))
    assert said == f"holds a member named {name!r}, which is outside of it"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["data", "DATA", "policy.PTH"])
def test_two_members_of_one_name_are_refused(second: str) -> None:
    file = io.BytesIO(zipped(MEMBERS))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(second, b"another")
    assert refusal(file.getvalue()) == f"holds two members named {second!r}"


def test_an_encrypted_member_is_refused() -> None:
    content = bytearray(zipped(MEMBERS))
    content[content.rindex(b"PK\1\2", 0, content.rindex(b"policy.pth")) + 8] |= 1
    assert refusal(bytes(content)) == "its member 'policy.pth' is encrypted"


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_whose_unpacking_has_no_bound_is_refused(compression: int) -> None:
    said = refusal(zipped(MEMBERS, compression))
    assert said == "its member 'data' is compressed otherwise than by deflate"


def test_a_member_that_says_it_is_too_large_is_refused_unread() -> None:
    content = with_declared_size(zipped(MEMBERS), b"data", 2**26 + 1)
    assert refusal(content) == "its member 'data' unpacks to 67108865 bytes, and 67108864 are read"


def test_weights_far_larger_than_the_file_are_refused() -> None:
    content = zipped(MEMBERS | {"policy.pth": bytes(2**20)}, zipfile.ZIP_DEFLATED)
    assert refusal(content) == (
        f"its member 'policy.pth' unpacks to 1048576 bytes, and {20 * len(content)} are read"
    )


def test_a_member_larger_than_it_says_is_damaged() -> None:
    content = zipped(MEMBERS | {"data": bytes(2**20)}, zipfile.ZIP_DEFLATED)
    assert refusal(with_declared_size(content, b"data", 10)) == "is a damaged or truncated zip"


@pytest.mark.parametrize("size", [0, 2**40, 2**64 - 1])
def test_a_size_of_zip64_that_is_a_lie_is_found_out(size: int) -> None:
    whole = zipped(MEMBERS)
    at = whole.rindex(b"PK\1\2", 0, whole.rindex(b"data"))
    extra = struct.pack("<HHQ", 1, 8, size)
    head = whole[at : at + 24] + b"\xff" * 4 + whole[at + 28 : at + 30]
    entry = head + struct.pack("<H", len(extra)) + whole[at + 32 : at + 50] + extra
    content = whole[:at] + entry + whole[at + 50 :]
    end = content.rindex(b"PK\5\6")
    length = struct.unpack_from("<I", content, end + 12)[0] + len(extra)
    content = content[: end + 12] + struct.pack("<I", length) + content[end + 16 :]
    assert refusal(content) in (
        "is a damaged or truncated zip",
        f"its member 'data' unpacks to {size} bytes, and 67108864 are read",
    )


def test_bits_that_fell_over_are_found_by_the_checksum() -> None:
    whole = model()
    at = whole.index(b"policy_class")
    flipped = whole[:at] + b"Q" + whole[at + 1 :]
    assert refusal(flipped) == "is a damaged or truncated zip"


def test_a_file_cut_anywhere_is_refused() -> None:
    whole = model()
    loaded(whole)
    places = random.Random(0).sample(range(2, len(whole)), 60)
    said = {refusal(whole[:place]) for place in (*places, 2, 4, len(whole) - 1)}
    assert said == {"is a damaged or truncated zip"}
