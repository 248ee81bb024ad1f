import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from model.isolation import (
    GradientHealthMonitor,
    blend_add,
    blend_gate,
    blend_multiply,
    materialise,
    ste_forward,
)
from tests.golden import GOLDEN, golden_json, golden_tensors, needs_golden

Operation = Callable[..., Tensor]

ATOL = 1e-5  # recorded floats, on a machine whose kernels round differently
NAN, INF = math.nan, math.inf
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SAMPLE_SHAPES = ((6, 5), (4, 3, 3), ())  # [T, C], [C, H, W], [] behind the batch dimension

# The vector kernels of every x86 CPU since 2013 agree with the recording to the last bit.
SAME_KERNELS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
# But for tanh, which is MKL's and rounds by the CPU's maker: on an AMD EPYC, one ulp from it.
CPU_INFO = Path("/proc/cpuinfo")
SAME_TANH = SAME_KERNELS and CPU_INFO.exists() and "GenuineIntel" in CPU_INFO.read_text()


def detached_multiply(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
    return blend_multiply(host, seed, alpha, host.detach())


OPERATIONS: dict[str, Operation] = {
    "ste": ste_forward,
    "add": blend_add,
    "add_isolation": blend_add,
    "multiply": blend_multiply,
    "multiply_detached": detached_multiply,
    "gate": blend_gate,
}
ARGUMENTS = ("host", "seed", "alpha", "gate")
PUBLIC = ("ste", "add", "multiply", "multiply_detached", "gate")

CASES: list[dict[str, Any]] = golden_json("isolation")["cases"] if GOLDEN.is_dir() else []
GOLDEN_HEALTH = golden_json("isolation")["gradient_health"] if GOLDEN.is_dir() else []


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward_and_gradients(
    function: Operation, inputs: dict[str, Tensor], weights: Tensor
) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out = function(*leaves.values())
    torch.autograd.backward((out.float() * weights).sum())
    found = {"out": out.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"no gradient reached {name}"
        found[f"grad_{name}"] = leaf.grad
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float) -> None:
    for name, tensor in expected.items():
        rtol = 0.0 if tensor.dtype == torch.float32 or not atol else 2**-7
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=name)


def example(name: str, *, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    inputs = {key: torch.randn(batch, 4, 6, generator=generator) for key in ("host", "seed")}
    inputs["host"] = inputs["host"].to(dtype)
    if name != "ste":
        inputs["alpha"] = torch.rand(batch, 1, 1, generator=generator)
    if name == "gate":
        inputs["gate"] = torch.rand(batch, 1, 1, generator=generator)
    return inputs


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@needs_golden
def test_all_recorded_cases_are_present() -> None:
    assert len(CASES) == 180
    assert {case["op"] for case in CASES} == set(OPERATIONS)


@needs_golden
@pytest.mark.parametrize("name", OPERATIONS)
def test_recorded_outputs_and_gradients_are_reproduced(name: str) -> None:
    tensors = golden_tensors("isolation")
    for case in (case for case in CASES if case["op"] == name):
        recorded = {key: tensors[f"{case['id']}.{key}"] for key in case["dtypes"]}
        inputs = {key: recorded[f"in.{key}"] for key in ARGUMENTS if f"in.{key}" in recorded}
        found = forward_and_gradients(OPERATIONS[name], inputs, recorded["in.w"])
        expected = {key: value for key, value in recorded.items() if not key.startswith("in.")}
        assert {key: str(value.dtype) for key, value in found.items()} == {
            key: f"torch.{case['dtypes'][key]}" for key in expected
        }
        is_same = SAME_TANH if name.startswith("multiply") else SAME_KERNELS or name == "ste"
        assert_same(found, expected, atol=0.0 if is_same else ATOL)


@needs_golden
def test_recorded_memory_formats_are_reproduced() -> None:
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    for label, expected in golden_json("isolation")["memory_format"].items():
        name, _, layout = label.rstrip(")").partition("(")
        chosen = dict(part.split("=") for part in (layout or "host=channels_last").split(", "))
        host, seed = (
            torch.randn(2, 3, 4, 5).to(memory_format=formats[chosen.get(side, "contiguous")])
            for side in ("host", "seed")
        )
        factors = [torch.rand(2, 1, 1, 1) for _ in range({"ste": 0, "gate": 2}.get(name, 1))]
        out = OPERATIONS[name](host, seed, *factors)
        assert out.is_contiguous(memory_format=formats[expected]), label
        assert out.stride() == host.stride(), label


@needs_golden
@pytest.mark.parametrize("row", GOLDEN_HEALTH)
def test_recorded_gradient_health_is_reproduced(row: dict[str, Any]) -> None:
    host, seed = (module_with_gradient(row[f"{side}_grad"]) for side in ("host", "seed"))
    assert watch(host, seed).compute() == pytest.approx(row["result"], rel=1e-12, abs=0.0)


@pytest.mark.parametrize("host_dtype", FLOATS)
@pytest.mark.parametrize("seed_dtype", FLOATS)
def test_straight_through_value_is_the_host_bit_for_bit_whatever_the_seed_holds(
    host_dtype: torch.dtype, seed_dtype: torch.dtype
) -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -3e-8, 1e30, INF, -INF, NAN])
    host, seed = (grid.flatten() for grid in torch.meshgrid(values, values, indexing="ij"))
    inputs = {"host": host.to(host_dtype), "seed": seed.to(seed_dtype)}
    weights = torch.linspace(-2.0, 2.0, host.numel())
    found = forward_and_gradients(ste_forward, inputs, weights)
    assert torch.equal(bits(found["out"]), bits(inputs["host"]))
    assert torch.equal(found["grad_host"], weights.to(host_dtype))
    assert torch.equal(found["grad_seed"], weights.to(host_dtype).to(seed_dtype))


def test_straight_through_does_not_hide_a_nan_in_the_incoming_gradient() -> None:
    host, seed = (torch.randn(3, requires_grad=True) for _ in range(2))
    weights = torch.tensor([1.0, NAN, INF])
    for gradient in torch.autograd.grad(ste_forward(host, seed), (host, seed), weights):
        assert torch.equal(bits(gradient), bits(weights))


def test_straight_through_result_is_a_tensor_of_its_own() -> None:
    host, seed = (torch.randn(8, requires_grad=True) for _ in range(2))
    before = host.detach().clone()
    torch.autograd.backward(torch.relu_(ste_forward(host, seed)).sum())
    assert torch.equal(host, before)
    assert host.grad is not None
    assert torch.equal(host.grad, (before > 0).float())


def test_straight_through_keeps_a_permuted_hosts_strides() -> None:
    host = torch.randn(2, 5, 3).transpose(1, 2)
    assert ste_forward(host, torch.randn(2, 3, 5)).stride() == host.stride()


def test_straight_through_works_below_function_transforms() -> None:
    host, seed = torch.randn(3, 4), torch.full((3, 4), NAN)
    ones = torch.ones(3, 4)

    def loss(host: Tensor, seed: Tensor) -> Tensor:
        return ste_forward(host, seed).sum()

    assert torch.equal(torch.vmap(ste_forward)(host, seed), host)
    for gradient in torch.vmap(torch.func.grad(loss, (0, 1)))(host, seed):
        assert torch.equal(gradient, ones)


def allocated_bytes(call: Callable[[], Any]) -> list[int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()  # alive until the profiler stops
    del kept
    sizes = [event.self_cpu_memory_usage for event in profiler.events() or []]
    return [size for size in sizes if size > 0]


@pytest.mark.parametrize(
    ("seed_dtype", "forward", "backward"),
    [(torch.float32, [4096], []), (torch.bfloat16, [4096], [2048])],
)
def test_straight_through_allocates_its_result_and_a_gradient_only_where_dtypes_differ(
    seed_dtype: torch.dtype, forward: list[int], backward: list[int]
) -> None:
    host = torch.randn(1024, requires_grad=True)
    seed = torch.randn(1024, dtype=seed_dtype, requires_grad=True)
    assert allocated_bytes(lambda: ste_forward(host, seed)) == forward
    out, weights = ste_forward(host, seed), torch.ones(1024)
    assert allocated_bytes(lambda: torch.autograd.grad(out, (host, seed), weights)) == backward


def test_straight_through_under_autocast_follows_the_host_and_trains_both_sides() -> None:
    layer = nn.Linear(6, 6)
    host = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seed = layer(host.detach())
        out = ste_forward(host, seed)
    torch.autograd.backward(out.sum())
    assert (seed.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, host)
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert torch.any(layer.weight.grad != 0)


@pytest.mark.parametrize("join", [ste_forward, lambda h, s: blend_add(h, s, torch.tensor(0.4))])
def test_channels_last_host_trains_with_a_seed_that_reads_a_detached_copy(join: Operation) -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8))
    for part in (stem, block):
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    host = stem(torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last))
    out = join(host, block(host.detach().contiguous()))
    torch.autograd.backward(out.square().mean())
    assert out.is_contiguous(memory_format=torch.channels_last)
    for parameter in (*stem.parameters(), *block.parameters()):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


Array = NDArray[np.float64]


def naive_blend(name: str, host: Array, seed: Array, alpha: Array, gate: Array) -> Array:
    share = np.minimum(np.maximum(alpha, 0), 1)
    if name == "gate":
        share = share * np.minimum(np.maximum(gate, 0), 1)
    if name.startswith("multiply"):
        change = np.tanh(seed - host)
        return host + host * share * change
    return (1 - share) * host + share * seed


def naive_gradients(
    name: str, host: Array, seed: Array, alpha: Array, gate: Array, weights: Array
) -> dict[str, Array]:
    """By central differences, for points away from the corners of the clamps."""
    step = 1e-6
    anchor = host.copy()  # what a detached seed input keeps seeing

    def loss(point: dict[str, Array]) -> Any:
        out = naive_blend(name, **point)
        if name == "multiply_detached":
            share = np.minimum(np.maximum(point["alpha"], 0), 1)
            out = point["host"] * (1 + share * np.tanh(point["seed"] - anchor))
        return (out * weights).sum()

    point = {"host": host, "seed": seed, "alpha": alpha, "gate": gate}
    gradients = {}
    for key, array in point.items():
        gradient = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            up, down = array.copy(), array.copy()
            up[index] += step
            down[index] -= step
            gradient[index] = (loss({**point, key: up}) - loss({**point, key: down})) / (2 * step)
        gradients[key] = gradient
    return gradients


def blend_arrays(
    draw: np.random.Generator, shape: tuple[int, ...], *, scalar_alpha: bool
) -> dict[str, Array]:
    factor_shape = (shape[0], *(1 for _ in shape[1:]))
    # Rounded to odd hundredths, so never within a difference step of 0 or 1.
    alpha, gate = (
        (np.floor(draw.uniform(-0.5, 1.5, size) * 50) * 2 + 1) / 100
        for size in (() if scalar_alpha else factor_shape, factor_shape)
    )
    host, seed = (draw.normal(0, 2, shape) for _ in range(2))
    return {"host": host, "seed": seed, "alpha": np.asarray(alpha), "gate": gate}


def call_blend(name: str, tensors: dict[str, Tensor]) -> Tensor:
    wanted = ARGUMENTS if name == "gate" else ARGUMENTS[:3]
    return OPERATIONS[name](*(tensors[key] for key in wanted))


@pytest.mark.parametrize("name", ["add", "multiply", "multiply_detached", "gate"])
@settings(max_examples=60, deadline=None)
@given(
    rng=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 5),
    sample_shape=st.sampled_from(SAMPLE_SHAPES),
    scalar_alpha=st.booleans(),
)
def test_blend_equals_the_formula(
    name: str, rng: int, batch: int, sample_shape: tuple[int, ...], scalar_alpha: bool
) -> None:
    arrays = blend_arrays(
        np.random.default_rng(rng), (batch, *sample_shape), scalar_alpha=scalar_alpha
    )
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    expected = naive_blend(name, **arrays)
    np.testing.assert_allclose(call_blend(name, tensors).numpy(), expected, rtol=0, atol=1e-12)
    single = {key: tensor.float() for key, tensor in tensors.items()}
    np.testing.assert_allclose(call_blend(name, single).numpy(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["add", "multiply", "multiply_detached", "gate"])
@settings(max_examples=15, deadline=None)
@given(rng=st.integers(0, 2**32 - 1), scalar_alpha=st.booleans())
def test_blend_gradients_equal_the_formulas_slopes(name: str, rng: int, scalar_alpha: bool) -> None:
    draw = np.random.default_rng(rng)
    arrays = blend_arrays(draw, (3, 2, 2), scalar_alpha=scalar_alpha)
    weights = draw.normal(size=(3, 2, 2))
    tensors = {key: torch.tensor(array, requires_grad=True) for key, array in arrays.items()}
    torch.autograd.backward((call_blend(name, tensors) * torch.from_numpy(weights)).sum())
    for key, expected in naive_gradients(name, **arrays, weights=weights).items():
        gradient = tensors[key].grad
        found = np.zeros(arrays[key].shape) if gradient is None else gradient.numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("name", ["add", "multiply", "multiply_detached", "gate"])
def test_alpha_outside_its_range_is_clamped_and_gets_no_gradient(name: str) -> None:
    inputs = example(name, batch=3)
    inputs["alpha"] = torch.tensor([-0.5, 1.5, 0.5]).view(3, 1, 1)
    found = forward_and_gradients(OPERATIONS[name], inputs, torch.randn(3, 4, 6))
    clamped = {**inputs, "alpha": inputs["alpha"].clamp(0, 1)}
    assert torch.equal(found["out"], OPERATIONS[name](*clamped.values()))
    assert torch.equal(found["out"][0], inputs["host"][0])
    assert found["grad_alpha"].flatten()[:2].tolist() == [0.0, 0.0]
    assert found["grad_alpha"].flatten()[2] != 0.0


def test_alpha_that_rounds_to_one_is_outside_for_add_and_inside_for_multiply() -> None:
    # The original casts alpha after the clamp in one and before it in the other.
    inputs = {**example("add", batch=3, dtype=torch.bfloat16), "alpha": torch.tensor(1.0001)}
    weights = torch.randn(3, 4, 6)
    assert forward_and_gradients(blend_add, inputs, weights)["grad_alpha"] == 0.0
    assert forward_and_gradients(blend_multiply, inputs, weights)["grad_alpha"] != 0.0


def test_detached_seed_input_keeps_the_tanh_gradient_out_of_the_host() -> None:
    inputs = {**example("multiply", batch=3), "alpha": torch.tensor(1.0)}
    found = forward_and_gradients(detached_multiply, inputs, torch.ones(3, 4, 6))
    modulation = torch.tanh(inputs["seed"] - inputs["host"])
    assert torch.equal(found["grad_host"], 1.0 + modulation)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (3,), (4, 3, 1), (3, 4)])
def test_seed_of_another_shape_is_refused_with_both_shapes(
    name: str, shape: tuple[int, ...]
) -> None:
    factors = [torch.tensor(0.5)] * {"ste": 0, "gate": 2}.get(name, 1)
    with pytest.raises(ValueError, match="seed has shape") as refused:
        OPERATIONS[name](torch.randn(4, 3), torch.randn(shape), *factors)
    assert str(shape) in str(refused.value)
    assert "(4, 3)" in str(refused.value)


def test_seed_input_of_another_shape_is_refused() -> None:
    host = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"seed_input has shape \(3,\), host has \(4, 3\)"):
        blend_multiply(host, host, torch.tensor(0.5), torch.randn(3))


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (2, 1, 1), (4,)])
def test_factor_that_would_change_the_hosts_shape_is_refused(shape: tuple[int, ...]) -> None:
    host, factor, half = torch.randn(4, 3, 5), torch.rand(shape), torch.tensor(0.5)
    for blend in (blend_add, blend_multiply):
        with pytest.raises(ValueError, match=r"alpha has shape .* does not broadcast to host's"):
            blend(host, host, factor)
    with pytest.raises(ValueError, match="alpha has shape"):
        blend_gate(host, host, factor, half)
    with pytest.raises(ValueError, match="gate has shape"):
        blend_gate(host, host, half, factor)


class Join(nn.Module):
    def __init__(self, function: Operation) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def export_with_dynamic_batch(
    function: Operation, inputs: dict[str, Tensor], *, strict: bool
) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    return torch.export.export(
        Join(function),
        tuple(inputs.values()),
        strict=strict,
        dynamic_shapes={"tensors": tuple({0: batch} for _ in inputs)},
    )


def casts(graph: torch.fx.Graph) -> list[str]:
    words = ("_to_copy", ".to.", "convert_element_type")
    return [str(node.target) for node in graph.nodes if any(w in f"{node.target}" for w in words)]


def poisoned(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With values a blend could not take: only the straight-through join shields."""
    if name == "ste":
        inputs["seed"][0, 0, :3] = torch.tensor([NAN, INF, -INF])
    return inputs


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PUBLIC)
def test_compiled_without_graph_breaks_gives_the_same_outputs_and_gradients(
    name: str, dtype: torch.dtype
) -> None:
    compiled = torch.compile(OPERATIONS[name], fullgraph=True, backend="aot_eager")
    for batch in (3, 5, 7):
        inputs = poisoned(name, example(name, batch=batch, dtype=dtype))
        weights = torch.randn(batch, 4, 6)
        eager = forward_and_gradients(OPERATIONS[name], inputs, weights)
        assert_same(forward_and_gradients(compiled, inputs, weights), eager, atol=0.0)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_native_code_gives_the_same_outputs_and_gradients() -> None:
    # All joins in one graph: starting the native compiler costs more than all of this file.
    def all_joins(host: Tensor, seed: Tensor, alpha: Tensor, gate: Tensor, bad: Tensor) -> Tensor:
        through = ste_forward(host, bad)
        added = blend_add(host, seed, alpha)
        multiplied = blend_multiply(host, seed, alpha, host.detach())
        return torch.stack([through, added, multiplied, blend_gate(host, seed, alpha, gate)])

    inputs = {**example("gate", batch=5), "bad": torch.full((5, 4, 6), NAN)}
    weights = torch.randn(4, 5, 4, 6)
    eager = forward_and_gradients(all_joins, inputs, weights)
    compiled = forward_and_gradients(torch.compile(all_joins, fullgraph=True), inputs, weights)
    assert_same(compiled, eager, atol=ATOL)
    assert torch.equal(compiled["out"][0], inputs["host"])
    assert torch.equal(compiled["grad_bad"], weights[0])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_exported_with_a_dynamic_batch_gives_the_same_outputs_and_gradients(
    name: str, strict: bool
) -> None:
    program = export_with_dynamic_batch(
        OPERATIONS[name], example(name, batch=3, dtype=torch.bfloat16), strict=strict
    )
    for batch in (3, 5):
        inputs = poisoned(name, example(name, batch=batch, dtype=torch.bfloat16))
        weights = torch.randn(batch, 4, 6)
        eager = forward_and_gradients(OPERATIONS[name], inputs, weights)
        assert_same(forward_and_gradients(program.module(), inputs, weights), eager, atol=0.0)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_exported_inference_graph_shields_the_host() -> None:
    inputs = poisoned("ste", example("ste", batch=3))
    program = export_with_dynamic_batch(ste_forward, inputs, strict=False).run_decompositions()
    assert torch.equal(program.module()(*inputs.values()), inputs["host"])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 0), (torch.bfloat16, 1)])
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_exported_straight_through_casts_once_and_only_where_dtypes_differ(
    dtype: torch.dtype, count: int, strict: bool
) -> None:
    inputs = example("ste", batch=3, dtype=dtype)
    program = export_with_dynamic_batch(ste_forward, inputs, strict=strict)
    assert len(casts(program.graph)) == count
    assert len(casts(program.run_decompositions().graph)) == count


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one row for all": lambda full: full[:1].expand_as(full),
    "one channel for all": lambda full: full[:, :1].expand_as(full),
    "one value for all": lambda full: full[:1, :1, :1, :1].expand_as(full),
    "channels last": lambda full: full.contiguous(memory_format=torch.channels_last),
    "channels last, one row for all": lambda full: full.contiguous(
        memory_format=torch.channels_last
    )[:1].expand_as(full),
    "every other column": lambda full: torch.cat([full, full], dim=-1)[..., ::2],
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_straight_through_has_the_eager_ones_layout(
    layout: str, seed_format: torch.memory_format
) -> None:
    host = LAYOUTS[layout](torch.randn(2, 3, 4, 5))
    seed = torch.randn(2, 3, 4, 5).to(memory_format=seed_format)
    compiled = torch.compile(ste_forward, fullgraph=True, backend="aot_eager")
    expected = ste_forward(host, seed)
    found = compiled(host, seed)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 0), (torch.bfloat16, 1)])
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
def test_compiled_straight_through_casts_once_each_way_and_only_where_dtypes_differ(
    dtype: torch.dtype, count: int
) -> None:
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(ste_forward, fullgraph=True, backend=recorded)
    forward_and_gradients(compiled, example("ste", batch=3, dtype=dtype), torch.randn(3, 4, 6))
    graphs = [*recorded.fw_graphs, *recorded.bw_graphs]
    assert [len(casts(module.graph)) for module in graphs] == [count, count]


def module_with_gradient(
    values: list[float] | None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    module = nn.ParameterList([nn.Parameter(torch.zeros(len(values or [0.0]), dtype=dtype))])
    if values is not None:
        module[0].grad = torch.tensor(values, dtype=dtype)
    return module


def module_of(parameters: int, rng: np.random.Generator) -> nn.ParameterList:
    module = nn.ParameterList(
        nn.Parameter(torch.zeros(3, index + 1)) for index in range(parameters)
    )
    for parameter in module:
        parameter.grad = torch.from_numpy(rng.normal(size=parameter.shape)).float()
    return module


def watch(host: nn.Module, seed: nn.Module) -> GradientHealthMonitor:
    monitor = GradientHealthMonitor()
    monitor.register(host, seed)
    return monitor


def test_health_of_unregistered_modules_is_refused() -> None:
    for compute in (GradientHealthMonitor().compute, GradientHealthMonitor().compute_async):
        with pytest.raises(RuntimeError, match=r"call register\(host, seed\) first"):
            compute()


@pytest.mark.parametrize("parameters", [1, 2, 17])
def test_norms_are_those_of_all_gradients_in_one_vector(parameters: int) -> None:
    rng = np.random.default_rng(parameters)
    host, seed = module_of(parameters, rng), module_of(parameters + 1, rng)
    expected = [
        np.linalg.norm(np.concatenate([p.grad.numpy().ravel() for p in side if p.grad is not None]))
        for side in (host, seed)
    ]
    health = watch(host, seed).compute()
    assert health["host_grad_norm"] == pytest.approx(expected[0], rel=1e-6)
    assert health["seed_grad_norm"] == pytest.approx(expected[1], rel=1e-6)
    assert health["seed_gradient_ratio"] == pytest.approx(expected[1] / expected[0], rel=1e-6)


def test_frozen_parameters_and_absent_gradients_do_not_count() -> None:
    host, seed = module_with_gradient([3.0, 4.0]), module_of(3, np.random.default_rng(0))
    for parameter in seed:
        parameter.requires_grad_(False)
    host.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    health = watch(host, seed).compute()
    assert health == {"host_grad_norm": 5.0, "seed_grad_norm": 0.0, "seed_gradient_ratio": 0.0}


def test_registering_again_replaces_the_watched_modules() -> None:
    monitor = watch(module_with_gradient([9.0]), module_with_gradient([9.0]))
    monitor.register(module_with_gradient([2.0]), module_with_gradient([1.0]))
    assert monitor.compute()["seed_gradient_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_of_other_dtypes_neither_overflow_nor_lose_digits(dtype: torch.dtype) -> None:
    host, seed = module_with_gradient([300.0] * 100, dtype), module_with_gradient([1.0] * 10, dtype)
    health = watch(host, seed).compute()
    assert health["host_grad_norm"] == pytest.approx(3000.0, rel=1e-6)
    assert health["seed_grad_norm"] == pytest.approx(math.sqrt(10), rel=1e-6)


@pytest.mark.parametrize("values", [[3e38], [2e19, 1.0], [1e-30, 1e-30]])
def test_norms_whose_square_float32_cannot_hold_are_right(values: list[float]) -> None:
    host, seed = module_with_gradient(values), module_with_gradient(values)
    seed.register_parameter("second", nn.Parameter(torch.zeros(len(values))))
    seed.second.grad = torch.tensor(values)
    health = watch(host, seed).compute()
    assert health["host_grad_norm"] == pytest.approx(math.hypot(*values), rel=1e-6, abs=0.0)
    assert health["seed_grad_norm"] == pytest.approx(
        math.hypot(*values, *values), rel=1e-6, abs=0.0
    )


def test_sparse_gradients_count_as_the_dense_ones_that_they_stand_for() -> None:
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    sparse, dense = (
        nn.Embedding(5, 3, sparse=is_sparse, _weight=rows.clone()) for is_sparse in (True, False)
    )
    for embedding in (sparse, dense):
        torch.autograd.backward(embedding(torch.tensor([1, 4, 1, 1])).square().sum())
    assert sparse.weight.grad is not None
    assert sparse.weight.grad.is_sparse
    health = watch(dense, sparse).compute()
    assert health["seed_grad_norm"] == pytest.approx(health["host_grad_norm"], rel=1e-6)
    assert health["host_grad_norm"] > 1.0


def test_nan_gradient_shows() -> None:
    health = watch(module_with_gradient([1.0]), module_with_gradient([NAN, 1.0])).compute()
    assert health["host_grad_norm"] == 1.0
    assert math.isnan(health["seed_grad_norm"])
    assert math.isnan(health["seed_gradient_ratio"])


def test_pending_norms_outlive_zeroed_gradients() -> None:
    host, seed = module_with_gradient([3.0, 4.0]), module_with_gradient([10.0])
    pending = watch(host, seed).compute_async()
    host.zero_grad(set_to_none=False)
    seed.zero_grad()
    assert pending.host_norm_sq is not None
    assert (pending.host_norm_sq.shape, pending.host_norm_sq.requires_grad) == ((), False)
    assert materialise(pending)["seed_gradient_ratio"] == pytest.approx(2.0)


def test_pending_norms_say_where_no_gradient_was() -> None:
    pending = watch(module_with_gradient(None), module_with_gradient([1.0])).compute_async()
    assert pending.host_norm_sq is None
    assert pending.seed_norm_sq is not None


class TensorCalls(TorchFunctionMode):
    """Records the names of the torch functions called, attribute reads left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_health_takes_as_many_calls_and_one_read_for_any_number_of_parameters() -> None:
    def calls(parameters: int) -> list[str]:
        rng = np.random.default_rng(0)
        monitor = watch(module_of(parameters, rng), module_of(parameters, rng))
        recorded = TensorCalls()
        with recorded:
            monitor.compute()
        return recorded.names

    reads = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"}
    assert calls(40) == calls(1)
    assert [name for name in calls(40) if name in reads] == ["tolist"]


def test_asynchronous_health_never_reads_a_value() -> None:
    with FakeTensorMode():  # its tensors hold no values: reading one raises
        monitor = watch(module_with_gradient([3.0]), module_with_gradient([1.0]))
        pending = monitor.compute_async()
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):
            materialise(pending)
