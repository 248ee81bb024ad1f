import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from export.manifest import (
    LARGEST_BATCH_SIZE,
    MANIFEST_FILE,
    ArtifactError,
    File,
    FormatFile,
    FormatParity,
    Manifest,
    Parameter,
    Parity,
    Source,
    bucket_sizes,
    step_inputs,
    step_outputs,
    timed_sizes,
)
from model.spec import PolicySpec

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_1 = Path(__file__).with_name("schema_1")
"""What `python -m export --preset tamiyo-v1` wrote at 54b58f5, the first release of the schema."""
CONTENT = b"what was exported"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def manifest(spec: PolicySpec) -> Manifest:
    """One with every field set, and floats that decimal notation could round."""
    return Manifest(
        schema_version=2,
        max_batch_size=64,
        name="tiny",
        spec=spec,
        precision="fp32",
        device="cpu",
        has_normalizer=True,
        inputs=step_inputs(spec),
        outputs=step_outputs(spec),
        parameters=(Parameter(name="value_scale", dtype="float32", shape=(1,)),),
        parameters_sha256="d" * 64,
        weights=File(file="weights.safetensors", sha256="a" * 64, bytes=7),
        formats={"torchscript": FormatFile(file="policy.ts", sha256=SHA256, bytes=len(CONTENT))},
        reports=(File(file="report.html", sha256="c" * 64, bytes=5),),
        parity=Parity(
            atol=2e-5,
            rtol=1 / 3,
            min_greedy_agreement=0.995,
            batch_sizes=(1, 64),
            steps=50,
            formats={
                "torchscript": FormatParity(
                    rows=3700,
                    action_agreement=29599 / 29600,
                    greedy_agreement=1.0,
                    max_error={"value": 1.1920929e-07},
                )
            },
        ),
        source=Source(kind="checkpoint", name="best", sha256="b" * 64),
        versions={"python": "3.11.0", "torch": "2.13.0"},
    )


def sealed(directory: Path) -> File:
    """A file of the artifact as it was exported."""
    (directory / "policy.ts").write_bytes(CONTENT)
    return File.describe(directory / "policy.ts")


def test_manifest_survives_its_file(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest


def of_schema_1(manifest: Manifest) -> Manifest:
    """As the first schema has it: no parameters are named."""
    first = {"schema_version": 1, "parameters": (), "parameters_sha256": None}
    return Manifest.model_validate(manifest.model_dump() | first)


def test_policy_version_is_the_hash_of_the_parameters(manifest: Manifest) -> None:
    assert manifest.policy_version == "sha256:" + "d" * 64


def test_policy_version_is_in_schema_1_the_hash_of_the_weights_file(
    manifest: Manifest, tmp_path: Path
) -> None:
    first = of_schema_1(manifest)
    assert first.policy_version == "sha256:" + "a" * 64
    first.write(tmp_path)
    assert Manifest.read(tmp_path) == first
    weights = json.loads((SCHEMA_1 / MANIFEST_FILE).read_bytes())["weights"]
    assert Manifest.read(SCHEMA_1).policy_version == f"sha256:{weights['sha256']}"


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": 1},
        {"schema_version": 1, "parameters": []},
        {"schema_version": 1, "parameters_sha256": None},
        {"parameters": []},
        {"parameters_sha256": None},
        {"parameters": [], "parameters_sha256": None},
    ],
)
def test_parameters_are_named_and_hashed_from_schema_2_on_and_not_before(
    changes: dict[str, Any], manifest: Manifest, tmp_path: Path
) -> None:
    document = json.loads(manifest.model_dump_json()) | changes
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="parameters and their hash are there from schema 2 on"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_step_takes_and_gives_the_named_arrays_of_the_contract(num_layers: int) -> None:
    spec = PolicySpec.tamiyo_v1(
        num_slots=5, observation_dim=11, feature_dim=12, hidden_dim=10, num_layers=num_layers
    )
    state = ("batch", num_layers, 10)
    choices = 5 + 13 + 4 + 3 + 3 + 4 + 3 + 6
    assert [(array.name, array.dtype, array.shape) for array in step_inputs(spec)] == [
        ("observation", "float32", ("batch", 11)),
        ("action_mask", "bool", ("batch", choices)),
        ("noise", "float32", ("batch", choices)),
        ("state_h_in", "float32", state),
        ("state_c_in", "float32", state),
    ]
    assert [(array.name, array.dtype, array.shape) for array in step_outputs(spec)] == [
        ("action", "int64", ("batch", 8)),
        ("log_prob", "float32", ("batch", 8)),
        ("value", "float32", ("batch",)),
        ("state_h_out", "float32", state),
        ("state_c_out", "float32", state),
    ]


def absent(directory: Path) -> Path:
    return directory / "absent"


def without_manifest(directory: Path) -> Path:
    return directory


def regular_file(directory: Path) -> Path:
    (directory / "file").write_bytes(CONTENT)
    return directory / "file"


def manifest_is_a_directory(directory: Path) -> Path:
    (directory / MANIFEST_FILE).mkdir()
    return directory


@pytest.mark.parametrize(
    "make", [absent, without_manifest, regular_file, manifest_is_a_directory]
)  # fmt: skip
def test_what_is_no_artifact_is_refused_by_name(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = make(tmp_path)
    with pytest.raises(ArtifactError) as refusal:
        Manifest.read(directory)
    assert str(directory) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "python -m export" in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b'"policy"', b"\xff\xfe\x00", b"PK\x03\x04"],
    ids=["empty", "brace", "null", "list", "string", "not UTF-8", "zip"],
)
def test_manifest_that_is_no_object_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(ArtifactError) as refusal:
        Manifest.read(tmp_path)
    assert str(tmp_path / MANIFEST_FILE) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_manifest_cut_off_anywhere_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write(tmp_path)
    content = (tmp_path / MANIFEST_FILE).read_bytes().rstrip()
    for length in range(0, len(content), 97):
        (tmp_path / MANIFEST_FILE).write_bytes(content[:length])
        with pytest.raises(ArtifactError, match="JSON"):
            Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        (("schema_version",), 3, "schema_version"),
        (("schema_version",), "1", "schema_version"),
        (("added_by_a_later_version",), 0, "added_by_a_later_version"),
        (("spec", "added"), 0, "spec.added"),
        (("inputs", 0, "added"), 0, "inputs.0.added"),
        (("weights", "added"), 0, "weights.added"),
        (("parameters", 0, "added"), 0, "parameters.0.added"),
        (("parameters", 0, "dtype"), "float16", "parameters.0.dtype"),
        (("parameters_sha256",), "D" * 64, "parameters_sha256"),
        (("formats", "torchscript", "added"), 0, "formats.torchscript.added"),
        (("weights", "sha256"), "A" * 64, "weights.sha256"),
        (("weights", "sha256"), "a" * 63, "weights.sha256"),
        (("weights", "bytes"), -1, "weights.bytes"),
        (("formats", "torchscript", "file"), "../policy.ts", "formats.torchscript.file"),
        (("precision",), "fp8", "precision"),
        (("device",), "tpu", "device"),
        (("spec", "op_head"), "nonesuch", "spec"),
        (("spec", "num_layers"), 0, "spec.num_layers"),
        (("parity",), None, "parity"),
        (("outputs", 0, "name"), "actions", "the file"),
        (("spec", "hidden_dim"), 999, "the file"),
    ],
)
def test_manifest_this_version_does_not_know_is_refused_naming_the_field(
    where: tuple[Any, ...], value: Any, named: str, manifest: Manifest, tmp_path: Path
) -> None:
    document = json.loads(manifest.model_dump_json())
    inner = document
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(document))
    with pytest.raises(ArtifactError) as refusal:
        Manifest.read(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / MANIFEST_FILE}: {named}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "where", [(), ("formats", "torchscript")], ids=["the gate", "a format in the gate"]
)
def test_what_a_later_version_says_beside_how_to_run_is_passed_over(
    where: tuple[str, ...], manifest: Manifest, tmp_path: Path
) -> None:
    document = json.loads(manifest.model_dump_json())
    described = document["parity"]
    for key in where:
        described = described[key]
    described["added"] = {"by": "a later version"}
    document["source"]["added"] = 1
    document["versions"]["added"] = "1.0"
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(document))
    read = Manifest.read(tmp_path)
    assert read.versions == manifest.versions | {"added": "1.0"}
    assert read.model_copy(update={"versions": manifest.versions}) == manifest


def test_manifest_of_the_first_release_is_read() -> None:
    manifest = Manifest.read(SCHEMA_1)
    assert manifest.spec == PolicySpec.tamiyo_v1()
    assert manifest.source == Source(kind="preset", name="tamiyo-v1", seed=0)
    assert manifest.formats["onnx"].requires is None


PARAMETERS = {".parameters_sha256", *(f".parameters[].{of}" for of in ("name", "dtype", "shape[]"))}
"""What the second schema added."""
PARAMETERS_FIELDS = ("parameters", "parameters_sha256")


def fields(document: Any, at: str = "") -> set[str]:
    """The path of every field; entries of lists, and of mappings by format, have one in common."""
    if isinstance(document, list):
        return set().union(*(fields(entry, f"{at}[]") for entry in document))
    if not isinstance(document, dict):
        return {at}
    named = at.removesuffix(".").endswith("formats") or at == ".versions"
    return set().union(
        *(fields(of, f"{at}.{'*' if named else name}") for name, of in document.items())
    )


def test_what_is_written_has_only_fields_of_the_first_release_and_the_parameters(
    spec: PolicySpec, manifest: Manifest, tmp_path: Path
) -> None:
    plain = manifest.model_copy(update={"source": Source(kind="module", name="tiny")})
    for written in (manifest, plain):
        written.write(tmp_path)
        document = json.loads((tmp_path / MANIFEST_FILE).read_bytes())
        first = json.loads((SCHEMA_1 / MANIFEST_FILE).read_bytes())
        errors = {f".parity.formats.*.max_error.{array.name}" for array in step_outputs(spec)}
        assert fields(document) <= fields(first) | errors | {".source.sha256"} | PARAMETERS
    assert document["source"] == {"kind": "module", "name": "tiny"}
    assert document["formats"]["torchscript"].keys() == {"file", "sha256", "bytes"}


def test_later_schema_is_named_before_what_it_added(manifest: Manifest, tmp_path: Path) -> None:
    document = json.loads(manifest.model_dump_json())
    document |= {"schema_version": 3, "added": 0, "precision": "fp8"}
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="schema_version"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "field",
    [
        "schema_version",
        *sorted(Manifest.model_fields.keys() - {"schema_version", *PARAMETERS_FIELDS}),
    ],
)
def test_manifest_without_a_field_is_refused(
    field: str, manifest: Manifest, tmp_path: Path
) -> None:
    document = json.loads(manifest.model_dump_json())
    del document[field]
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=f"{field}: Field required"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../policy.ts",
        "below/policy.ts",
        "/etc/passwd",
        "..\\policy.ts",
        "C:policy.ts",
        ".policy.ts",
        "policy.ts\n",
        "policy.ts\0",
        "policy\u2215ts",
    ],
)
def test_file_name_that_could_leave_the_directory_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="file"):
        File(file=name, sha256=SHA256, bytes=len(CONTENT))


def test_described_file_is_read_back_whole(tmp_path: Path) -> None:
    file = sealed(tmp_path)
    assert file == File(file="policy.ts", sha256=SHA256, bytes=len(CONTENT))
    assert file.read(tmp_path) == CONTENT


def test_file_with_any_bit_flipped_is_refused(tmp_path: Path) -> None:
    file = sealed(tmp_path)
    for bit in range(8 * len(CONTENT)):
        changed = bytearray(CONTENT)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "policy.ts").write_bytes(changed)
        with pytest.raises(ArtifactError, match="SHA-256"):
            file.read(tmp_path)


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"\0"])
def test_file_of_another_length_is_refused(content: bytes, tmp_path: Path) -> None:
    file = sealed(tmp_path)
    (tmp_path / "policy.ts").write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256") as refusal:
        file.read(tmp_path)
    assert str(tmp_path / "policy.ts") in str(refusal.value)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    file = sealed(tmp_path)
    (tmp_path / "policy.ts").unlink()
    with pytest.raises(ArtifactError, match="No such file") as refusal:
        file.read(tmp_path)
    assert str(tmp_path / "policy.ts") in str(refusal.value)


def test_reading_a_manifest_needs_no_torch() -> None:
    code = "import sys, export.manifest; print(*{'torch', 'export.tamiyo_step'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("requires", "machine", "missing"),
    [
        (None, "x86_64 avx2", []),
        ("x86_64 avx2", "x86_64 avx2", []),
        ("x86_64 avx2", "x86_64 amx_tile avx2 avx512_f", []),  # a newer machine does
        ("x86_64 amx_tile avx512_f", "x86_64 avx avx512_f", ["amx_tile"]),
        ("x86_64 avx2", "aarch64 neon", ["x86_64", "avx2"]),
        ("sm_90", "sm_80", ["sm_90"]),
        ("x86_64 avx", "x86_64 avx2", ["avx"]),  # whole words
    ],
)
def test_machine_code_misses_what_its_machine_had_and_this_one_has_not(
    requires: str | None, machine: str, missing: list[str]
) -> None:
    file = FormatFile(file="policy.aoti.pt2", sha256=SHA256, bytes=1, requires=requires)
    assert file.missing_on(machine) == missing


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (16, [1, 2, 4, 8, 16]),
        (17, [1, 2, 4, 8, 16, 17]),
        (64, [1, 2, 4, 8, *range(16, 32, 2), *range(32, 65, 4)]),
        (100, [1, 2, 4, 8, *range(16, 32, 2), *range(32, 64, 4), *range(64, 100, 8), 100]),
    ],
)
def test_bucket_sizes_are_powers_of_two_to_16_then_eighths_and_the_largest(
    largest: int, expected: list[int]
) -> None:
    assert list(bucket_sizes(largest)) == expected


@given(largest=st.integers(1, LARGEST_BATCH_SIZE))
def test_every_number_of_rows_has_a_bucket_and_beyond_16_it_pads_an_eighth_at_most(
    largest: int,
) -> None:
    buckets = bucket_sizes(largest)
    assert sorted(set(buckets)) == list(buckets)
    for num_rows in range(1, largest + 1):
        bucket = next(size for size in buckets if size >= num_rows)
        assert bucket - num_rows <= num_rows / 8 or num_rows < 16
        assert bucket < 2 * num_rows


@given(largest=st.integers(1, LARGEST_BATCH_SIZE))
def test_timed_sizes_are_buckets_from_one_to_the_largest_at_most_twice_as_large_each(
    largest: int,
) -> None:
    timed = timed_sizes(largest)
    assert set(timed) <= set(bucket_sizes(largest))
    assert (timed[0], timed[-1]) == (1, largest)
    assert all(size < larger <= 2 * size for size, larger in pairwise(timed))
