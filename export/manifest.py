"""What an artifact directory says about itself, and how its files are read.

Torch-free. A file is read once: the bytes that were hashed are the bytes that get loaded, so no
loader ever touches content whose SHA-256 is not the manifest's.
"""

import builtins
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from model.sb3.spec import SB3Spec
from model.spec import PolicySpec
from model.step_spec import StateSpec, StepSpec

SCHEMA_VERSION: Literal[2] = 2
"""What is written. The first, which is read as well, names no parameters."""
LARGEST_BATCH_SIZE = 4096
"""Of an artifact: what a machine can still check, whole batches at once."""

MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"

Precision = Literal["fp32", "bf16"]
Device = Literal["cpu", "cuda"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _family(spec: Any) -> Any:
    """The spec's own word for it; Tamiyos, which were first, have none."""
    named = spec.get("family") if isinstance(spec, dict) else getattr(spec, "family", None)
    return "tamiyo" if named is None else named


FAMILY_TAGS = {(1, "tamiyo"), (1, "mlps")}
"""What pydantic puts into the place of a fault, after `spec`."""
Spec = Annotated[
    Annotated[PolicySpec, Tag("tamiyo")] | Annotated[SB3Spec, Tag("mlps")],
    Discriminator(_family),
]
"""Of any family whose policies are exported; `StepSpec` is what they have in common."""


class ArtifactError(ValueError):
    """The directory is not an artifact that can be trusted; the message says why."""


class Record(BaseModel):
    """A part of what an artifact says of itself: frozen, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Description(Record):
    """A part that nothing is run by: what a later release adds to it is passed over."""

    model_config = ConfigDict(extra="ignore")


class File(Record):
    """One file of the artifact, by its plain name inside the directory."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]

    @classmethod
    def describe(cls, path: Path) -> Self:
        content = path.read_bytes()
        return cls(
            file=path.name, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)
        )  # fmt: skip

    @property
    def version(self) -> str:
        """The content's name, as clients see that of the weights."""
        return f"sha256:{self.sha256}"

    def read(self, directory: Path) -> builtins.bytes:
        """The file's content, or ArtifactError where it is missing or not what was exported."""
        path = directory / self.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ArtifactError(
                f"{path}: its SHA-256 is not the one in {MANIFEST_FILE}; the file was changed or "
                "damaged after the export"
            )
        return content


class Array(Record):
    """A named input or output of the step. Dimensions are sizes, or the name of a free one."""

    name: str
    dtype: Literal["float32", "int64", "bool"]
    shape: tuple[int | str, ...]

    @classmethod
    def of_state(cls, name: str, state: StateSpec) -> Self:
        return cls(name=name, dtype="float32", shape=("batch", *state.shape))


class Parameter(Record):
    """One array of the step that depends on the policy's weights."""

    name: str
    dtype: Literal["float32", "bfloat16"]
    shape: tuple[int, ...]


class FormatFile(File):
    """A format's file, and for machine code the machine it needs: its `requires`.

    `requires` is what the machine that compiled it has, in words: its architecture and every
    instruction set torch knows of (`x86_64 avx2 avx512_f ...`, compilers use what they find), or
    the GPU's compute capability (`sm_90`). None runs anywhere.
    """

    requires: str | None = None

    def missing_on(self, machine: str) -> list[str]:
        """What this file needs and a machine of these words has not."""
        return [word for word in (self.requires or "").split() if word not in machine.split()]


class FormatParity(Description):
    """How one format compared with the eager policy, over `rows` rows of carried steps.

    The agreements are the shares of free decisions equal to eager's, of all and of the greedy ones
    (those without noise); the others are within the tolerance of eager's best. Free is a head that
    matters, with a choice, and noise as in serving. `max_error` is by output, and weighed:
    `|got - expected| / (1 + rtol / atol * |expected|)`, of which `atol` is the limit.
    """

    rows: int
    action_agreement: float
    greedy_agreement: float
    max_error: dict[str, float]


class PrecisionLoss(FormatParity):
    """The same of the policy with bf16 products, against the policy in float32: a property of the
    weights, for which no format answers. `mean_error` is signed."""

    mean_error: dict[str, float]


class Parity(Description):
    """How the formats were compared: `|got - expected| <= atol + rtol * |expected|`.

    The value and Q in the network's own units, before the spec's `value_scale`.

    A greedy agreement below the minimum fails; 0 where the score of each action is limit enough.
    """

    atol: float
    rtol: float
    min_greedy_agreement: float
    batch_sizes: tuple[int, ...]
    steps: int
    formats: dict[str, FormatParity]
    precision_loss: PrecisionLoss | None = None


class Source(Description):
    """Where the weights came from: a checkpoint file by hash, a preset by seed, or a module that
    its owner exported from Python. `provenance` says of each fact about a policy where in the file,
    or on the command line, it was read, where a file does not say all of them in one place."""

    kind: Literal["checkpoint", "preset", "module"]
    name: str
    sha256: Sha256 | None = None
    seed: int | None = None
    provenance: dict[str, str] = {}


class Manifest(Record):
    """`manifest.json`. `policy_version` names the weights and is the same for every format: it is
    the hash of the packed parameters (`export.parameters`), and in schema 1, which has none, that
    of the weights' file.

    What is at its default is not written, so that a reader of this schema takes what a later
    release writes, as long as it uses nothing the reader does not know.
    """

    schema_version: Literal[1, 2]
    name: str
    spec: Spec
    precision: Precision
    device: Device
    has_normalizer: bool
    max_batch_size: Annotated[int, Field(ge=1)]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    parameters: tuple[Parameter, ...] = ()
    parameters_sha256: Sha256 | None = None
    weights: File
    formats: dict[str, FormatFile]
    reports: tuple[File, ...]
    parity: Parity
    source: Source
    versions: dict[str, str]

    @model_validator(mode="after")
    def _arrays_are_those_of_the_spec(self) -> Self:
        for name, arrays, expected in (
            ("inputs", self.inputs, step_inputs(self.spec)),
            ("outputs", self.outputs, step_outputs(self.spec)),
        ):
            if arrays != expected:
                raise ValueError(f"the {name} are not those of a step of its spec")
        return self

    @model_validator(mode="after")
    def _parameters_are_named(self) -> Self:
        is_named = bool(self.parameters), self.parameters_sha256 is not None
        if is_named != (self.schema_version > 1,) * 2:
            raise ValueError(
                f"the parameters and their hash are there from schema 2 on, and this is schema "
                f"{self.schema_version}"
            )
        return self

    @property
    def files(self) -> tuple[File, ...]:
        """Every file the artifact vouches for."""
        return (self.weights, *self.formats.values(), *self.reports)

    @property
    def policy_version(self) -> str:
        if self.parameters_sha256 is None:
            return self.weights.version
        return f"sha256:{self.parameters_sha256}"

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The manifest alone, whoever made it; `export.artifact` opens the whole."""
        return cls.parse(read_manifest(directory), directory)

    @classmethod
    def parse(cls, content: builtins.bytes, directory: Path) -> Self:
        """What `directory`'s manifest holds; ArtifactError says what is wrong with it."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise ArtifactError(f"{directory / MANIFEST_FILE}: {first_fault(error)}") from error

    def write(self, directory: Path) -> None:
        content = self.model_dump_json(indent=2, exclude_defaults=True)
        (directory / MANIFEST_FILE).write_text(content + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> builtins.bytes:
    """The content of `directory/manifest.json`; ArtifactError where there is none to read."""
    try:
        return (directory / MANIFEST_FILE).read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{directory}: is not an artifact, {MANIFEST_FILE} cannot be read "
            f"({error.strerror}); make one with `python -m export`"
        ) from error


def first_fault(error: ValidationError) -> str:
    """Which field of a file is wrong, and how."""
    first = error.errors()[0]
    place = [part for at, part in enumerate(first["loc"]) if (at, part) not in FAMILY_TAGS]
    where = ".".join(map(str, place)) or "the file"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def bucket_sizes(max_batch_size: int) -> tuple[int, ...]:
    """The batch sizes a step is run at: powers of two to 16, eighths of the octave, the largest.

    So a batch beyond 16 rows is padded with an eighth of them at most.
    """
    eighths = [step << octave for octave in range(1, 32) for step in range(8, 16)]
    return (*(size for size in (1, 2, 4, 8, *eighths) if size < max_batch_size), max_batch_size)


def timed_sizes(max_batch_size: int) -> tuple[int, ...]:
    """Of the bucket sizes, those that are timed: powers of two, and the largest."""
    powers = [2**n for n in range(max_batch_size.bit_length()) if 2**n < max_batch_size]
    return (*powers, max_batch_size)


def step_inputs(spec: StepSpec) -> tuple[Array, ...]:
    """The step's inputs, in the order every format takes them."""
    arrays = [
        Array(name="observation", dtype="float32", shape=("batch", spec.observation_dim)),
        Array(name="action_mask", dtype="bool", shape=("batch", spec.num_choices)),
        Array(name="noise", dtype="float32", shape=("batch", spec.num_choices)),
        *(Array.of_state(state.input, state) for state in spec.states),
    ]
    if spec.blueprint_embedding_dim is not None:
        shape: tuple[int | str, ...] = ("batch", spec.num_slots)
        arrays.append(Array(name="blueprint_index", dtype="int64", shape=shape))
    if spec.has_slot_by_op:
        shape = ("batch", spec.num_ops, spec.num_slots)
        arrays.append(Array(name="slot_by_op_mask", dtype="bool", shape=shape))
    return tuple(arrays)


def step_outputs(spec: StepSpec) -> tuple[Array, ...]:
    """The step's outputs, in the order every format gives them."""
    extra: dict[str, tuple[int | str, ...]] = {"q_value": ("batch",)}
    if "contribution" in spec.extra_outputs:
        extra["contribution"] = ("batch", spec.num_slots)
    return (
        Array(name="action", dtype="int64", shape=("batch", len(spec.heads))),
        Array(name="log_prob", dtype="float32", shape=("batch", len(spec.heads))),
        Array(name="value", dtype="float32", shape=("batch",)),
        *(Array.of_state(state.output, state) for state in spec.states),
        *(Array(name=name, dtype="float32", shape=extra[name]) for name in spec.extra_outputs),
    )
