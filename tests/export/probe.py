"""Where a step differs from the right one: compared directly, without anything of the gate."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from export.manifest import Precision, step_outputs
from export.packed_step import StepInput, StepOutput
from tests.export.gate_cases import Case
from tests.loaded_step import TensorStep

ROUNDING: dict[Precision, tuple[float, float]] = {"fp32": (2e-5, 2e-5), "bf16": (1e-2, 4e-3)}
"""`atol` and `rtol`: in float32 about the gate's own, in bf16 what two right steps differ by."""
PROBE_ROWS = 400
PROBE_STEPS = 3


def difference(case: Case, wrong: TensorStep) -> str | None:
    """Where a step differs from the right one beyond rounding, None where it nowhere does.

    Over rows meant to show it: single features far off, states zero, carried and saturated, noise
    that overrules the logits, masks from one choice to all.
    """
    atol, rtol = ROUNDING[case.precision]
    names = [array.name for array in step_outputs(case.policy.spec)]
    with torch.inference_mode():
        for number, (inputs, expected) in enumerate(_probe(case)):
            try:
                got = wrong(*(array.clone() for array in inputs))
            except (IndexError, RuntimeError) as fault:
                return f"it fails at step {number}: {fault}"
            for name, want, have in zip(names, expected, got, strict=True):
                if have.shape != want.shape or have.dtype != want.dtype:
                    return f"{name} is {have.dtype} {tuple(have.shape)}"
                error = (have - want).abs()
                if not (error <= atol + rtol * want.abs()).all():
                    return f"{name} differs by {error.max().item():.2g} at step {number}"
    return None


@cache
def _probe(case: Case) -> list[tuple[StepInput, StepOutput]]:
    """What goes into carried steps of `PROBE_ROWS` rows, and what the right step makes of it."""
    return list(_carried(case))


def _carried(case: Case) -> Iterator[tuple[StepInput, StepOutput]]:
    step, generator = case.step(), torch.Generator().manual_seed(11)
    spec = case.policy.spec
    _, _, _, h, c, *_ = step.example(PROBE_ROWS)
    rows = torch.arange(PROBE_ROWS)
    for _ in range(PROBE_STEPS):
        restarts = (torch.rand(PROBE_ROWS, generator=generator) < 0.5)[:, None, None]
        signs = _saturating(case, generator)
        scale = torch.tensor([0.0, 1.0, 5.0, 30.0, 200.0])[rows % 5][:, None, None]
        h = torch.where(restarts, signs * scale.clamp(max=1), h)
        c = torch.where(restarts, torch.randn(c.shape, generator=generator).sign() * scale, c)
        observation = _probe_observations(case, generator)
        mask = _probe_mask((PROBE_ROWS, spec.num_choices), generator)
        for columns in torch.split(mask, list(spec.head_sizes), dim=-1):
            _allow_one(columns, generator)
        noise = _probe_noise(spec.num_choices, generator)
        inputs = [observation, mask, noise, h, c]
        if spec.blueprint_embedding_dim is not None:
            shape = (PROBE_ROWS, spec.num_slots)
            inputs.append(torch.randint(-1, spec.num_blueprints, shape, generator=generator))
        if spec.has_slot_by_op:
            by_op = _probe_mask((PROBE_ROWS, spec.num_ops * spec.num_slots), generator)
            by_op = by_op.view(PROBE_ROWS, spec.num_ops, spec.num_slots)
            _allow_one(by_op, generator)
            inputs.append(by_op)
        outputs: StepOutput = step(*inputs)
        yield tuple(inputs), outputs
        _, _, _, h, c, *_ = outputs


def _saturating(case: Case, generator: torch.Generator) -> Tensor:
    """Signs `[rows, layers, hidden]` that bring one gate of each layer as far as h can."""
    weights = [x for name, x in case.policy.named_parameters() if "weight_hh" in name]
    return torch.stack(
        [
            weight[torch.arange(PROBE_ROWS) % len(weight)].sign()
            * torch.randn(PROBE_ROWS, 1, generator=generator).sign()
            for weight in weights
        ],
        dim=1,
    )


def _probe_observations(case: Case, generator: torch.Generator) -> Tensor:
    """A third ordinary, a third tiny, a third with one feature far off."""
    dim = case.policy.spec.observation_dim
    x = torch.randn(PROBE_ROWS, dim, generator=generator)
    x[::3] *= 1e-3
    at = torch.randint(dim, (len(x[1::3]),), generator=generator)
    far = torch.nn.functional.one_hot(at, dim) * torch.randn(len(at), 1, generator=generator) * 300
    x[1::3] += far
    if case.normalizer is not None:
        x = x * case.normalizer.scale() + case.normalizer.mean
    return x


def _probe_mask(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    density = torch.rand(shape[0], 1, generator=generator) * 1.6 - 0.3
    return torch.rand(shape, generator=generator) < density


def _probe_noise(num_choices: int, generator: torch.Generator) -> Tensor:
    """None, Gumbel noise, or noise that overrules every logit."""
    uniform = torch.rand(PROBE_ROWS, num_choices, generator=generator).clamp(min=1e-20)
    noise = -torch.log(-torch.log(uniform))
    noise[1::4] = 0.0
    noise[2::4] = 1e3 * torch.rand(len(noise[2::4]), num_choices, generator=generator)
    return noise


def _allow_one(allowed: Tensor, generator: torch.Generator) -> None:
    choice = torch.randint(allowed.shape[-1], allowed.shape[:-1], generator=generator)
    allowed |= torch.nn.functional.one_hot(choice, allowed.shape[-1]).bool()
