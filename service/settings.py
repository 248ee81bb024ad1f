"""What an operator can set: command line, then `TAMIYO_*` in the environment, then the default."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from export.manifest import bucket_sizes


class Settings(BaseSettings):
    """Serves an exported policy: POST /act."""

    model_config = SettingsConfigDict(
        env_prefix="TAMIYO_",
        cli_prog_name="python -m service",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        extra="forbid",
    )

    artifact: Annotated[
        Path,
        Field(
            description="The directory `python -m export` wrote, or one that holds a single such "
            "directory; another one, another policy."
        ),
    ]
    trusted: Annotated[
        Path | None,
        Field(
            description="An Ed25519 public key (PEM): an artifact that its private half has not "
            "signed is refused. Without one, any artifact is served."
        ),
    ] = None
    host: Annotated[
        str, Field(description="Address to listen on; 0.0.0.0 opens the service to the network.")
    ] = "127.0.0.1"
    port: Annotated[
        int, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    ] = 8000
    act_keys: Annotated[
        Path | None,
        Field(
            description="A file of keys, one a line and after it its name for the log: POST /act, "
            "/sessions and /v2 then take `Authorization: Bearer KEY`. Without one, whoever "
            "reaches the service may act. SIGHUP has it read again."
        ),
    ] = None
    admin_keys: Annotated[
        Path | None,
        Field(
            description="The same for what changes the policy; these keys may act as well. Without "
            "one, only programs on this machine may change it."
        ),
    ] = None
    root_path: Annotated[
        str,
        Field(
            pattern=r"^(/[\w.~-]+)*$",
            description="The path a proxy has this service under, such as /tamiyo, so that /docs "
            "finds its way; the proxy may take it off requests or leave it on.",
        ),
    ] = ""
    runtime: Annotated[
        Literal["auto", "onnx", "torchscript", "aoti", "eager", "compile"],
        Field(
            description="What runs the step; auto times what the artifact has, a few seconds at "
            "start, and takes the fastest whose answers are bit for bit alike in any batch, or of "
            "all where none's are. eager and compile run its pt2 file."
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(
            description="Where the policy runs; auto is the GPU where one is visible and the "
            "artifact has a format for it, else the CPU. Small policies may be faster on the CPU."
        ),
    ] = "auto"
    num_threads: Annotated[
        int,
        Field(
            ge=1, description="Threads of one step; more helps large policies, hurts small ones."
        ),
    ] = 1
    max_batch_size: Annotated[
        int,
        Field(
            ge=1,
            le=4096,
            description="Most rows in one step; larger: throughput, latency. Never more than the "
            "artifact was checked with.",
        ),
    ] = 64
    pad_batches: Annotated[
        bool,
        Field(
            description="Runs every batch as large as the largest: then no answer depends on how "
            "many rows ride with it, and a lone step takes as long as a full one. With a largest "
            "one of 4 rows or another power of two above, none depends on its place either, as "
            "far as was seen."
        ),
    ] = False
    tf32: Annotated[
        bool,
        Field(
            description="Multiplies with 10 of float32's 23 bits, on GPUs and in torch's formats: "
            "faster, and answers are further from the policy's than its export allows. Weights are "
            "probed in float32 all the same."
        ),
    ] = False
    max_rows: Annotated[
        int,
        Field(
            ge=1,
            le=65536,
            description="Most environments in one request; one of more than fit in a step takes "
            "several.",
        ),
    ] = 1024
    max_waiting: Annotated[
        int,
        Field(ge=1, description="Environments that may wait for a step; beyond, 429 at once."),
    ] = 4096
    max_sessions: Annotated[
        int,
        Field(
            ge=1,
            le=10**12,
            description="Environments whose state is kept; beyond, the least recently used "
            "session is given up.",
        ),
    ] = 16384
    session_idle_s: Annotated[
        float, Field(gt=0, description="A session without a request for so long ends (410 after).")
    ] = 600.0
    snapshot: Annotated[
        Path | None,
        Field(
            description="A file that sessions are written to at the end, so that the next start "
            "continues them. Without one, a restart loses them (410)."
        ),
    ] = None
    snapshot_every_s: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="Writes --snapshot so often while serving, too: after a kill, sessions "
            "that have not moved since continue, the others are lost (410). More often: more of "
            "them, for more work.",
        ),
    ] = None
    snapshot_required: Annotated[
        bool,
        Field(
            description="A --snapshot that is damaged or of another policy stops the start; "
            "otherwise it is set aside as FILE.refused, FILE.refused.2 and so on, and sessions are "
            "lost. One that only the device cannot go on from now stops it either way."
        ),
    ] = False
    timeout_ms: Annotated[
        float,
        Field(gt=0, description="Longest wait for the model where a request names none (504)."),
    ] = 10_000.0
    max_body_bytes: Annotated[
        int, Field(ge=1024, description="Larger bodies get 413; one step of V1 is some 3 kB.")
    ] = 262_144
    keep_alive_s: Annotated[
        float,
        Field(
            gt=0,
            description="A connection without a request for so long is closed; longer than an "
            "environment's slowest step, its clients need not reconnect.",
        ),
    ] = 75.0
    read_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            description="A request that has not all arrived so long after its first byte gets 408.",
        ),
    ] = 30.0
    drain_s: Annotated[
        int, Field(ge=0, description="On SIGTERM, time for requests under way before the exit.")
    ] = 10
    seed: Annotated[
        int, Field(ge=0, description="Default seeds come from this one; another, other samples.")
    ] = 0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="info: start, ready, stop; debug adds more; numbers are in /metrics."),
    ] = "info"

    def batch_sizes(self, checked: int) -> tuple[int, ...]:
        """Those a step runs at, of an artifact that was checked with batches up to `checked`."""
        largest = min(self.max_batch_size, checked)
        return (largest,) if self.pad_batches else bucket_sizes(largest)
