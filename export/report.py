"""What was compared and how fast each format is, on the machine that exported: `report.json`.

Torch-free data; `export.report_page` draws it. Times are microseconds a step, medians with the
quartiles beside them, of calls taken in turn so that a busy machine is busy for all.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, ValidationError

from export.manifest import (
    ArtifactError,
    Description,
    Device,
    Manifest,
    Parity,
    Precision,
    Source,
    first_fault,
)

REPORT_FILE = "report.json"
REPORT_PAGE = "report.html"


class Machine(Description):
    """Where the figures come from. `vector_isa` is torch's name for the CPU's instructions."""

    cpu: str
    cores: int
    gpu: str | None
    vector_isa: str
    threads: int
    torch: str


class Latency(Description):
    """Microseconds a step at one batch size: the median, and the quartiles around it."""

    batch_size: int
    median_us: float
    lower_us: float
    upper_us: float


class FormatReport(Description):
    """One format's figures.

    `error_by_step` is the largest error of any array at each carried step. `row_difference` is,
    by batch size, how far a row's results are from the same row's in the largest batch: 0 is bit
    for bit the same.
    """

    export_seconds: float
    check_seconds: float
    latency: tuple[Latency, ...]
    error_by_step: tuple[float, ...]
    row_difference: dict[int, float]


class Report(Description):
    """All of `report.json`. `eager` is the policy as its trainer calls it, `get_action`.

    The first releases wrote no `schema_version`; theirs is 1.
    """

    schema_version: Literal[1] = 1
    name: str
    policy_version: str
    source: Source
    precision: Precision
    device: Device
    max_batch_size: Annotated[int, Field(ge=1)]
    measured_at: AwareDatetime
    machine: Machine
    parity: Parity
    eager: tuple[Latency, ...]
    formats: dict[str, FormatReport]

    @classmethod
    def read(cls, directory: Path, manifest: Manifest) -> Self:
        """The artifact's own report; ArtifactError where it is not what was exported."""
        file = next((file for file in manifest.reports if file.file == REPORT_FILE), None)
        if file is None:
            raise ArtifactError(f"{directory}: its manifest names no {REPORT_FILE}")
        try:
            return cls.model_validate_json(file.read(directory))
        except ValidationError as error:
            raise ArtifactError(f"{directory / REPORT_FILE}: {first_fault(error)}") from error

    def speedup(self, format_name: str) -> dict[int, float]:
        """How many times as fast as eager, by batch size: the ratio of the medians."""
        eager = {latency.batch_size: latency.median_us for latency in self.eager}
        return {
            latency.batch_size: eager[latency.batch_size] / latency.median_us
            for latency in self.formats[format_name].latency
        }
