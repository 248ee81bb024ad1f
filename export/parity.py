"""Does an exported file do what the policy does? The gate every format must pass.

Both sides run the same carried episodes, each on its own state, with episode starts in between.
The policy is the judge of every decision: an artifact's action is right where the policy scores
it as high as its own best, so that two choices closer than the tolerance are a tie, not a fault.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from export.floor_bounds import LogProbBounds, floor_bounds
from export.formats import LoadedStep, first_line
from export.manifest import FormatParity, Precision, bucket_sizes, step_outputs
from export.step import StepInput, StepOutput
from model.heads import HeadTable
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic, Scores
from model.policy_inputs import Masks
from model.recurrence import State
from model.spec import SLOT_BY_OP

STEPS = 50
SATURATION = 20.0
RESTART_PROBABILITY = 0.05
FAR_PROBABILITY = 0.1
FAR = {True: 1e30, False: 1e3}
"""How far off some observations are: with a normaliser, which clips them, and without."""


class Tolerance(NamedTuple):
    """How far a precision may be off: `atol + rtol * |expected|`, and in how many greedy actions.

    An action is within it where the policy's score of it is `atol` short of its best, or less.
    Where floors jump, scores and log-probs have bounds (`export.floor_bounds`), not one number.
    float32 has no other limit: where it differs from eager's, the two are a tie to float32.
    """

    atol: float
    rtol: float
    min_greedy_agreement: float


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(atol=2e-5, rtol=1e-5, min_greedy_agreement=0.0),
    "bf16": Tolerance(atol=0.1, rtol=0.02, min_greedy_agreement=0.995),
}


class ParityError(Exception):
    """An exported file does not do what the policy does; the message says where first."""


@dataclass(frozen=True)
class Step:
    """One step of the reference run: what goes in, and what the policy makes of it.

    `action_mask` and `masks` are the same, as the step and as the policy takes them. `begins` are
    the rows whose episode starts here, and `begin_state` what they start from.
    """

    batch_size: int
    number: int
    is_greedy: bool
    observation: Tensor
    action_mask: Tensor
    noise: Tensor
    blueprint_index: Tensor | None
    masks: Masks
    begins: Tensor
    begin_state: State
    scores: Scores

    def inputs(self, state: State) -> StepInput:
        """What goes in, from `state`: the arrays that the policy has, in the manifest's order."""
        given = (self.observation, self.action_mask, self.noise, *state)
        more = (self.blueprint_index, self.masks.get(SLOT_BY_OP))
        return (*given, *(array for array in more if array is not None))

    @property
    def where(self) -> str:
        return f"batch size {self.batch_size}, step {self.number}"


@dataclass
class ParityRun:
    """What the comparison of one format adds up to; `error_by_step` is the largest of any array."""

    tolerance: Tolerance
    rows: int = 0
    decisions: int = 0
    equal: int = 0
    greedy_decisions: int = 0
    greedy_equal: int = 0
    max_error: dict[str, float] = field(default_factory=dict)
    error_by_step: list[float] = field(default_factory=lambda: [0.0] * STEPS)

    def compare(self, what: str, got: Tensor, expected: Tensor, step: Step) -> None:
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise ParityError(
                f"{what} is {got.dtype} {tuple(got.shape)}, expected {expected.dtype} "
                f"{tuple(expected.shape)} ({step.where})"
            )
        error = (got - expected).abs()
        within = (
            error <= self.tolerance.atol + self.tolerance.rtol * expected.abs()
        )  # False for NaN
        if not within.all():
            index = tuple((~within).nonzero()[0].tolist())
            raise ParityError(
                f"{what}[{', '.join(map(str, index))}] is {got[index].item():.9g}, expected "
                f"{expected[index].item():.9g} ({step.where})"
            )
        largest = error.max().item()
        self.max_error[what] = max(self.max_error.get(what, 0.0), largest)
        self.error_by_step[step.number] = max(self.error_by_step[step.number], largest)

    def count(self, action: Tensor, best: Tensor, step: Step) -> None:
        equal = int((action == best).sum())
        self.rows += len(action)
        self.decisions += action.numel()
        self.equal += equal
        if step.is_greedy:
            self.greedy_decisions += action.numel()
            self.greedy_equal += equal

    @property
    def greedy_agreement(self) -> float:
        return self.greedy_equal / self.greedy_decisions

    def summary(self) -> FormatParity:
        return FormatParity(
            rows=self.rows,
            action_agreement=self.equal / self.decisions,
            greedy_agreement=self.greedy_agreement,
            max_error=self.max_error,
        )


def parity_batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """1, 2, 3, 7, every bucket and the largest batch, as far as the artifact goes."""
    sizes = {1, 2, 3, 7, *bucket_sizes(max_batch_size)}
    return tuple(sorted(size for size in sizes if size <= max_batch_size))


class Reference:
    """The eager policy's own run of the gate's episodes, made once for all formats.

    For every batch size, 50 carried steps. Masks run from one choice allowed to all; noise is zero
    on even steps and Gumbel on odd ones; some observations are far beyond anything trained on;
    each row's episode starts anew with probability 0.05, half of them from a saturated state.
    """

    def __init__(
        self,
        policy: FactoredRecurrentActorCritic,
        normalizer: ObservationNormalizer | None,
        *,
        batch_sizes: Sequence[int],
        precision: Precision = "fp32",
        seed: int = 0,
    ) -> None:
        self.policy = policy
        self.normalizer = normalizer
        self.batch_sizes = tuple(batch_sizes)
        self.device = policy.heads.valid.device
        self.without_floors = HeadTable(policy.spec.with_probability_floors({})).to(self.device)
        self.precision = precision
        self.tolerance = TOLERANCES[precision]
        with torch.inference_mode():
            self.episodes = [
                list(self._run(batch_size, torch.Generator().manual_seed(seed * 1000 + batch_size)))
                for batch_size in self.batch_sizes
            ]

    def _run(self, batch_size: int, generator: torch.Generator) -> Iterator[Step]:
        state = self.policy.initial_state(batch_size)
        heads, device = self.policy.heads, self.device
        for number in range(STEPS):
            observation = self._observations(batch_size, generator).to(device)
            mask = self._masks(batch_size, generator).to(device)
            is_greedy = number % 2 == 0
            noise = torch.zeros(mask.shape, device=device)
            if not is_greedy:
                uniform = torch.rand(mask.shape, generator=generator).clamp(min=1e-20)
                noise = -torch.log(-torch.log(uniform)).to(device)
            begins = (torch.rand(batch_size, generator=generator) < RESTART_PROBABILITY).to(device)
            begin_state = self._begin_state(batch_size, generator)
            blueprint_index = self._blueprints(batch_size, generator)
            slot_by_op = self._slots_by_op(mask, batch_size, generator)
            state = restarted(state, begins, begin_state)
            normal = observation if self.normalizer is None else self.normalizer(observation)
            masks = dict(zip(heads.names, torch.split(mask, heads.sizes, -1), strict=True))
            if slot_by_op is not None:
                masks[SLOT_BY_OP] = slot_by_op
            scores = self.policy.step_scores(normal, state, masks, blueprint_index=blueprint_index)
            yield Step(
                batch_size=batch_size,
                number=number,
                is_greedy=is_greedy,
                observation=observation,
                action_mask=mask,
                noise=noise,
                blueprint_index=blueprint_index,
                masks=masks,
                begins=begins,
                begin_state=begin_state,
                scores=scores,
            )
            state = scores.state

    def _observations(self, batch_size: int, generator: torch.Generator) -> Tensor:
        shape = (batch_size, self.policy.spec.observation_dim)
        observation = torch.randn(shape, generator=generator)
        if self.normalizer is not None:
            scale, mean = self.normalizer.scale().cpu(), self.normalizer.mean.cpu()
            observation = observation * scale + mean
        far = torch.rand(batch_size, 1, generator=generator) < FAR_PROBABILITY
        extreme = torch.randn(shape, generator=generator).sign() * FAR[self.normalizer is not None]
        return torch.where(far, extreme, observation)

    def _masks(self, batch_size: int, generator: torch.Generator) -> Tensor:
        heads = self.policy.heads
        density = torch.rand(batch_size, 1, generator=generator) * 1.6 - 0.3
        allowed = torch.rand(batch_size, sum(heads.sizes), generator=generator) < density
        for columns in torch.split(allowed, heads.sizes, -1):
            _allow_one(columns, generator)
        return allowed

    def _blueprints(self, batch_size: int, generator: torch.Generator) -> Tensor | None:
        spec = self.policy.spec
        if spec.blueprint_embedding_dim is None:
            return None
        shape = (batch_size, spec.num_slots)
        return torch.randint(-1, spec.num_blueprints, shape, generator=generator).to(self.device)

    def _slots_by_op(
        self, mask: Tensor, batch_size: int, generator: torch.Generator
    ) -> Tensor | None:
        """No slot at all for ops that are not allowed, as environments send it, nor at times for
        those that need none.
        """
        spec, heads = self.policy.spec, self.policy.heads
        if not spec.has_slot_by_op:
            return None
        allowed = torch.rand(batch_size, spec.num_ops, spec.num_slots, generator=generator) < 0.5
        _allow_one(allowed, generator)
        needs_slot = heads.relevance[:, heads.names.index("slot")].cpu()
        is_spared = torch.rand(batch_size, spec.num_ops, generator=generator) < 0.5
        allowed_ops = torch.split(mask.cpu(), heads.sizes, -1)[heads.op_index]
        allowed &= (allowed_ops & (needs_slot | is_spared)).unsqueeze(-1)
        return allowed.to(self.device)

    def _begin_state(self, batch_size: int, generator: torch.Generator) -> State:
        zeros = self.policy.initial_state(batch_size)[0]
        signs = torch.randn(zeros.shape, generator=generator).sign().to(zeros.device)
        saturated = torch.rand(batch_size, 1, 1, generator=generator) < 0.5
        signs = signs * saturated.to(zeros.device)
        return signs, signs * SATURATION


def _allow_one(allowed: Tensor, generator: torch.Generator) -> None:
    """Allows one more choice of each row of `[..., n]`, so that there is one."""
    choice = torch.randint(allowed.shape[-1], allowed.shape[:-1], generator=generator)
    allowed |= torch.nn.functional.one_hot(choice, allowed.shape[-1]).bool()


def check_parity(step: LoadedStep, reference: Reference) -> ParityRun:
    """Compares `step` with the policy over the reference's episodes, carrying its own state.

    Raises ParityError at the first array beyond the reference's tolerance, naming array, row,
    expected and got; and where too few greedy actions are the policy's own.
    """
    run = ParityRun(reference.tolerance)
    with torch.inference_mode():
        for episode in reference.episodes:
            state = reference.policy.initial_state(episode[0].batch_size)
            for moment in episode:
                state = restarted(state, moment.begins, moment.begin_state)
                outputs = _run_step(step, moment.inputs(state), moment)
                _judge(reference, moment, outputs, run)
                state = (outputs[3], outputs[4])
    least = reference.tolerance.min_greedy_agreement
    if run.greedy_agreement < least:
        raise ParityError(
            f"{run.greedy_agreement:.3%} of the greedy actions are the policy's own, at least "
            f"{least:.1%} must be"
        )
    return run


def _run_step(step: LoadedStep, inputs: StepInput, moment: Step) -> StepOutput:
    try:
        return step(*inputs)
    except Exception as error:  # whatever the format's own runtime raises
        raise ParityError(f"the step fails: {first_line(error)} ({moment.where})") from error


def _judge(reference: Reference, step: Step, outputs: StepOutput, run: ParityRun) -> None:
    spec, heads, scores = reference.policy.spec, reference.policy.heads, step.scores
    num_outputs = len(step_outputs(spec))
    if len(outputs) != num_outputs:
        raise ParityError(f"the step has {len(outputs)} outputs, expected {num_outputs}")
    action, log_prob, value, h, c, *extra = outputs
    noise = heads.spread(step.noise)
    best = scores.choices.choose(noise).action
    run.compare("state_h_out", h, scores.state[0], step)
    run.compare("state_c_out", c, scores.state[1], step)
    # What rounding makes of a value grows with its scale: compared is what the network gives.
    run.compare("value", value / spec.value_scale, scores.value, step)
    if action.shape != best.shape or action.dtype != best.dtype:
        raise ParityError(
            f"action is {action.dtype} {tuple(action.shape)}, expected {best.dtype} "
            f"{tuple(best.shape)} ({step.where})"
        )
    if ((action < 0) | (action >= torch.tensor(heads.sizes, device=action.device))).any():
        raise ParityError(f"action is outside its head ({step.where})")
    op = action[..., heads.op_index]
    expected_extra = _expected_extra(reference, op, scores)
    for name, got in zip(expected_extra, extra, strict=True):
        scale = spec.value_scale if name == "q_value" else 1.0
        run.compare(name, got / scale, expected_extra[name], step)
    bounds = _log_prob_bounds(reference, op, step)
    _judge_actions(reference, action, best, noise, bounds, step)
    lower, upper = (heads.log_prob_of(bound, action) for bound in bounds)
    expected = lower
    if log_prob.shape == lower.shape:
        expected = log_prob.to(lower.dtype).clamp(lower, upper)
    run.compare("log_prob", log_prob, expected, step)
    run.count(action, best, step)


def _expected_extra(reference: Reference, op: Tensor, scores: Scores) -> dict[str, Tensor]:
    """What the policy's critic says beyond the value, of the op that was taken."""
    policy = reference.policy
    critics = {
        "q_value": lambda: policy.q_value(scores.output, op),
        "contribution": lambda: policy.contribution(scores.output),
    }
    return {name: critics[name]() for name in policy.spec.extra_outputs}


def _log_prob_bounds(reference: Reference, op: Tensor, step: Step) -> LogProbBounds:
    """What the policy says each choice's log-prob may be, given `op`: one number but by floors."""
    heads, choices, tolerance = reference.policy.heads, step.scores.choices, reference.tolerance
    if not heads.has_floors:
        log_probs, _ = choices.given(op)
        return LogProbBounds(log_probs, log_probs)
    slot_by_op = step.masks.get(SLOT_BY_OP)
    plain = reference.without_floors.choices(choices.logits, choices.allowed, slot_by_op)
    log_probs, allowed = plain.given(op)
    margin = tolerance.atol + tolerance.rtol * log_probs.abs()
    return floor_bounds(log_probs, allowed, heads.floor, margin)


def _judge_actions(
    reference: Reference,
    action: Tensor,
    best: Tensor,
    noise: Tensor,
    bounds: LogProbBounds,
    step: Step,
) -> None:
    heads = reference.policy.heads
    op = action[..., heads.op_index]
    _, allowed = step.scores.choices.given(op)
    taken = (bounds.upper + noise).gather(-1, action.unsqueeze(-1)).squeeze(-1)
    highest = (bounds.lower + noise).amax(-1)
    is_best = highest - taken <= reference.tolerance.atol  # False for NaN
    wrong = ~torch.where(heads.relevant(op), is_best, action == heads.forced(allowed))
    if wrong.any():
        row, head = wrong.nonzero()[0].tolist()
        raise ParityError(
            f"action of head {heads.names[head]!r}, row {row} is {int(action[row, head])}, "
            f"expected {int(best[row, head])} ({step.where})"
        )


def restarted(state: State, begins: Tensor, begin_state: State) -> State:
    """`state`, but for the rows that begin an episode, which take `begin_state`'s."""
    begins = begins[:, None, None]
    return (
        torch.where(begins, begin_state[0], state[0]),
        torch.where(begins, begin_state[1], state[1]),
    )
