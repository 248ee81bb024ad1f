"""The step, the engine and HTTP on a GPU, at 1 to 4,096 rows, against eager torch and the CPU.

    python -m benchmarks.gpu [--rehearse] [--policies v1 v2] [--output DIR]

For V1 and V2, fp32 and bf16, and each of torch's formats: the usual policy in eager torch, the
captured step alone on what is on the device already, a batch with its two copies (all three in
turn), then two sessions of so many rows through the engine and over HTTP, and the median of a lone
environment's request. Writes `gpu.json` and `gpu.md` after each; one that fails is named, costs the
others nothing, and makes the exit code 1. Without a GPU it says so and exits 0; `--rehearse` runs
small policies on the CPU, the engine and HTTP with states on the host.
"""

import argparse
import asyncio
import json
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import uvloop

from benchmarks.device_batches import batch, captured, given
from benchmarks.gpu_page import Point, page
from benchmarks.serving import SEED, serving
from benchmarks.step import NaivePolicy, random_inputs
from export.exporter import export_policy
from export.formats import FormatError
from export.loaders.load import FORMAT_OF
from export.loaders.torch_step import TorchStep
from export.manifest import Device, Manifest, Precision
from export.timing import Call, latencies, this_machine
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from service.bench.load import end_sessions, new_sessions
from service.engine.block import Answer, Block, Given
from service.engine.engine import Engine
from service.errors import ServiceError
from service.runtime.cpu_device import CpuDevice
from service.runtime.cuda_device import CudaDevice
from service.runtime.load import load_runtime
from service.settings import Settings

ROWS = (1, 2, 4, 16, 64, 256, 1024, 4096)
RUNTIMES = ("torchscript", "eager", "aoti")
SESSIONS = 2
"""At once: one is read while the other's batch is on the device."""
POLICIES = {"v1": PolicySpec.tamiyo_v1(), "v2": PolicySpec.tamiyo_v2()}
SMALL = {
    "v1": PolicySpec.tamiyo_v1(num_slots=2, observation_dim=11, feature_dim=12, hidden_dim=16),
    "v2": PolicySpec.tamiyo_v2(num_slots=2, observation_dim=7, feature_dim=12, hidden_dim=16),
}


class Case(NamedTuple):
    policy: str
    precision: Precision
    runtimes: Sequence[str]


CASES = [Case(name, precision, RUNTIMES) for name in POLICIES for precision in ("fp32", "bf16")]
REHEARSED = [Case("v1", "fp32", RUNTIMES), Case("v2", "fp32", ("torchscript",))]


class Plan(NamedTuple):
    """What is measured, how long each figure takes, and on what."""

    device: Device
    policies: dict[str, PolicySpec]
    cases: Sequence[Case]
    rows: Sequence[int]
    seconds: float

    def new_device(self) -> CudaDevice | CpuDevice:
        return CudaDevice() if self.device == "cuda" else CpuDevice()


def exported(plan: Plan, case: Case, runtime: str, directory: Path) -> Path:
    torch.manual_seed(0)
    policy = FactoredRecurrentActorCritic(plan.policies[case.policy]).eval()
    output = directory / f"{case.policy}-{case.precision}-{runtime}"
    export_policy(
        policy,
        None,
        output,
        name=output.name,
        formats=(FORMAT_OF[runtime],),
        device=plan.device,
        precision=case.precision,
        max_batch_size=max(2, *plan.rows),
    )
    return output


def loaded_on(device: Device, artifact: Path, runtime: str) -> TorchStep:
    manifest = Manifest.read(artifact)
    loaded = load_runtime(artifact, manifest, name=runtime, device=device, num_threads=1)
    assert isinstance(loaded, TorchStep)
    return loaded


def steps(
    plan: Plan, case: Case, device: Device, artifact: Path, loaded: TorchStep
) -> Iterator[Point]:
    """Eager torch on the plan's device, the captured step and the batch, in turn."""
    manifest, spec = Manifest.read(artifact), plan.policies[case.policy]
    torch_device = torch.device(plan.device)
    torch.manual_seed(0)
    naive = NaivePolicy(FactoredRecurrentActorCritic(spec)).to(torch_device).eval()
    on_device = plan.new_device() if device == plan.device else None
    for rows in plan.rows:
        calls: dict[str, Call] = {
            "eager": partial(naive, *random_inputs(spec, rows, torch_device)),
            "batch": batch(on_device, manifest, loaded, rows),
        }
        if on_device is not None:
            calls["step"] = captured(on_device, manifest, loaded, rows)
        timed = latencies(calls, batch_size=rows, seconds=plan.seconds, device=torch_device)
        median_us = {name: latency.median_us for name, latency in timed.items()}
        yield Point(
            *(case.policy, case.precision, loaded.name, device, rows),
            eager_us=median_us["eager"],
            step_us=median_us.get("step"),
            batch_us=median_us["batch"],
        )


async def through_the_engine(
    plan: Plan, artifact: Path, loaded: TorchStep, points: Sequence[Point]
) -> None:
    """Sessions of so many rows in a closed loop, without HTTP."""
    most = max(plan.rows)
    settings = Settings(
        artifact=artifact, max_batch_size=most, max_rows=most, max_waiting=SESSIONS * most
    )
    engine = Engine(Manifest.read(artifact), loaded, settings)
    engine.start()
    assert engine.warm_up.done is not None
    await engine.warm_up.done
    for point in points:
        of_rows = tuple(given(plan.policies[point.policy], point.rows).values())

        async def session(name: str, end_s: float, of_rows: Given = of_rows) -> int:
            step = 0
            while step == 0 or time.perf_counter() < end_s:
                block = Block(of_rows, True, session_id=name, run="0", step=step, starts=step == 0)
                await answered(engine, block)
                step += 1
            return step

        await session(f"{point.rows}-first", 0.0)
        began_s = time.perf_counter()
        names = [f"{point.rows}-{at}" for at in range(SESSIONS)]
        num = sum(await asyncio.gather(*(session(n, began_s + plan.seconds) for n in names)))
        point.engine_rows_per_s = num * point.rows / (time.perf_counter() - began_s)
    await engine.stop()


async def answered(engine: Engine, block: Block) -> Answer:
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def settle(result: Answer | ServiceError) -> None:
        if isinstance(result, ServiceError):
            future.set_exception(result)
        else:
            future.set_result(result)

    engine.submit(block, settle, is_wanted=lambda: True, timeout_s=inf)
    return await future


async def over_http(plan: Plan, artifact: Path, loaded: TorchStep, points: Sequence[Point]) -> None:
    """The same in safetensors, and one client with one environment in JSON."""
    largest = str(max(plan.rows))
    flags = ["--runtime", loaded.name, "--device", loaded.device, "--max-body-bytes", "67108864"]
    flags += ["--max-batch-size", largest, "--max-rows", largest, "--max-waiting", "16384"]
    async with serving(artifact, *flags) as server:
        for point in points:
            clients = server.clients(SESSIONS, num_rows=point.rows)
            sessions = new_sessions(SESSIONS, SEED, point.rows)
            load = await clients.closed(sessions, plan.seconds)
            assert not load.errors, load.errors
            point.http_rows_per_s = load.num_answers * point.rows / load.elapsed_s
            await end_sessions(server.url, sessions)
        load = await server.clients(1).closed(new_sessions(1, SEED), plan.seconds)
        points[0].http_p50_ms = float(np.median(load.latencies_ms))


def measured(plan: Plan, case: Case, runtime: str, directory: Path) -> Iterator[list[Point]]:
    """On the plan's device, and then TorchScript on the CPU beside it."""
    try:
        artifact = exported(plan, case, runtime, directory)
    except FormatError as error:
        print(f"{case.policy} {case.precision} {runtime}: left out: {error}")
        return
    for device in dict.fromkeys((plan.device, "cpu" if runtime == "torchscript" else plan.device)):
        loaded = loaded_on(device, artifact, runtime)
        with torch.inference_mode():
            points = list(steps(plan, case, device, artifact, loaded))
        uvloop.run(through_the_engine(plan, artifact, loaded, points))
        uvloop.run(over_http(plan, artifact, loaded, points))
        print(f"{case.policy} {case.precision} {runtime} on {device}: done", flush=True)
        yield points


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU as a device")
    parser.add_argument("--policies", nargs="*", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--output", type=Path, default=Path("gpu-figures"), help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan("cuda", POLICIES, CASES, ROWS, options.seconds)
    if options.rehearse:
        plan = Plan("cpu", SMALL, REHEARSED, (ROWS[0], 8, ROWS[-1]), min(options.seconds, 0.1))
    elif not torch.cuda.is_available():
        print("benchmarks.gpu: skipped, as no GPU is visible here; --rehearse runs it on the CPU")
        return 0
    machine = this_machine(torch.device(plan.device))
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    kind = "A rehearsal of small policies, on no GPU: " if options.rehearse else ""
    name = f"{kind}{machine.gpu or machine.cpu}, torch {machine.torch}, {when}"
    figures = {"machine": machine.model_dump(), "date": when, "is_rehearsal": options.rehearse}
    options.output.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    failed: list[str] = []
    asked = [case for case in plan.cases if case.policy in options.policies]
    runs = [(case, runtime) for case in asked for runtime in case.runtimes]
    with tempfile.TemporaryDirectory() as directory:
        for case, runtime in runs:
            try:
                for found in measured(plan, case, runtime, Path(directory)):
                    points += found
            except Exception:  # of one format, say: the others' figures are as good
                traceback.print_exc()
                failed.append(f"{case.policy} {case.precision} {runtime}")
            figures |= {"points": [asdict(point) for point in points], "failed": failed}
            (options.output / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")
            (options.output / "gpu.md").write_text(page(name, points, failed))
    print(f"{len(points)} rows of figures in {options.output}/gpu.md and gpu.json: {name}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
