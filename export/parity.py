"""Does an exported file do what the policy does? The gate every format must pass.

Both sides run the same carried episodes, each on its own state, with episode starts in between.
The policy is the judge of every decision: an artifact's action is right where the policy scores
it as high as its own best, so that two choices closer than the tolerance are a tie, not a fault.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from export.formats import LoadedStep, StepInput
from export.manifest import FormatParity
from export.step import StepOutput
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.recurrence import State

ATOL = 2e-5
RTOL = 1e-5
BATCH_SIZES = (1, 2, 7, 64)
STEPS = 50
RESET_PROBABILITY = 0.05
FAR_PROBABILITY = 0.1
FAR = 30.0
"""Some observations lie beyond the normaliser's clip, so that forgetting it shows."""


class ParityError(Exception):
    """An exported file does not do what the policy does; the message says where first."""


@dataclass(frozen=True)
class Reference:
    """The eager policy and its normaliser, as the judge of an exported step."""

    policy: FactoredRecurrentActorCritic
    normalizer: ObservationNormalizer | None

    def normalize(self, observation: Tensor) -> Tensor:
        return observation if self.normalizer is None else self.normalizer(observation)

    def masks(self, action_mask: Tensor) -> dict[str, Tensor]:
        heads = self.policy.heads
        return dict(zip(heads.names, torch.split(action_mask, heads.sizes, -1), strict=True))


@dataclass
class _Tally:
    """What the comparison of one format adds up to."""

    rows: int = 0
    decisions: int = 0
    equal: int = 0
    max_error: dict[str, float] = field(default_factory=dict)

    def compare(self, what: str, got: Tensor, expected: Tensor, where: str) -> None:
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise ParityError(
                f"{what} is {got.dtype} {tuple(got.shape)}, expected {expected.dtype} "
                f"{tuple(expected.shape)} ({where})"
            )
        error = (got - expected).abs()
        within = error <= ATOL + RTOL * expected.abs()  # False for NaN
        if not within.all():
            index = tuple((~within).nonzero()[0].tolist())
            raise ParityError(
                f"{what}[{', '.join(map(str, index))}] is {got[index].item():.9g}, expected "
                f"{expected[index].item():.9g} ({where})"
            )
        self.max_error[what] = max(self.max_error.get(what, 0.0), error.max().item())


def check_parity(step: LoadedStep, reference: Reference, seed: int = 0) -> FormatParity:
    """Compares `step` with the policy over batch sizes 1, 2, 7, 64 and 50 carried steps each.

    Masks run from one choice allowed to all; noise is zero on even steps and Gumbel on odd ones;
    each row's episode starts anew with probability 0.05. Raises ParityError at the first array
    beyond `ATOL + RTOL * |expected|`, naming array, row, expected and got.
    """
    tally = _Tally()
    with torch.inference_mode():
        for batch_size in BATCH_SIZES:
            _check_episodes(step, reference, batch_size, seed, tally)
    return FormatParity(
        rows=tally.rows,
        action_agreement=tally.equal / tally.decisions,
        max_error=tally.max_error,
    )


def _check_episodes(
    step: LoadedStep, reference: Reference, batch_size: int, seed: int, tally: _Tally
) -> None:
    expected_state = reference.policy.initial_state(batch_size)
    state: State = expected_state
    generator = torch.Generator().manual_seed(seed * 1000 + batch_size)
    for number, (observation, mask, noise, starts) in enumerate(
        _episode_inputs(reference, batch_size, generator)
    ):
        state = _restarted(state, starts)
        expected_state = _restarted(expected_state, starts)
        inputs = (observation, mask, noise, *state)
        where = f"batch size {batch_size}, step {number}"
        try:
            outputs = step(*inputs)
        except Exception as error:  # whatever the format's own runtime raises
            raise ParityError(f"the step fails: {first_line(error)} ({where})") from error
        expected_state = _judge(reference, inputs, outputs, expected_state, where, tally)
        state = (outputs[3], outputs[4])


def _judge(
    reference: Reference,
    inputs: StepInput,
    outputs: StepOutput,
    expected_state: State,
    where: str,
    tally: _Tally,
) -> State:
    observation, mask, noise, _, _ = inputs
    action, log_prob, value, h, c = outputs
    policy, heads = reference.policy, reference.policy.heads
    scores = policy.step_scores(
        reference.normalize(observation), expected_state, reference.masks(mask)
    )
    perturbed = scores.log_probs + heads.spread(noise)
    best = heads.choose(scores.log_probs, heads.spread(noise)).action
    tally.compare("state_h_out", h, scores.state[0], where)
    tally.compare("state_c_out", c, scores.state[1], where)
    tally.compare("value", value, scores.value, where)
    if action.shape != best.shape or action.dtype != best.dtype:
        raise ParityError(f"action is {action.dtype} {tuple(action.shape)} ({where})")
    if ((action < 0) | (action >= torch.tensor(heads.sizes, device=action.device))).any():
        raise ParityError(f"action is outside its head ({where})")
    _judge_actions(reference, action, best, perturbed, where)
    tally.compare("log_prob", log_prob, heads.log_prob_of(scores.log_probs, action), where)
    tally.rows += len(action)
    tally.decisions += action.numel()
    tally.equal += int((action == best).sum())
    return scores.state


def _judge_actions(
    reference: Reference, action: Tensor, best: Tensor, perturbed: Tensor, where: str
) -> None:
    heads = reference.policy.heads
    taken = perturbed.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    op = action[..., heads.op_index]
    is_best = perturbed.amax(-1) - taken <= ATOL  # False for NaN
    wrong = ~torch.where(heads.relevant(op), is_best, action == heads.forced_index)
    if wrong.any():
        row, head = wrong.nonzero()[0].tolist()
        raise ParityError(
            f"action of head {heads.names[head]!r}, row {row} is {int(action[row, head])}, "
            f"expected {int(best[row, head])} ({where})"
        )


def _episode_inputs(
    reference: Reference, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per step: observation, action mask, noise, and which rows start an episode."""
    spec, heads = reference.policy.spec, reference.policy.heads
    device = heads.valid.device
    for number in range(STEPS):
        observation = torch.randn(batch_size, spec.observation_dim, generator=generator).to(device)
        far = torch.rand(batch_size, 1, generator=generator) < FAR_PROBABILITY
        observation = torch.where(far.to(device), observation * FAR, observation)
        if reference.normalizer is not None:
            observation = observation * reference.normalizer.scale() + reference.normalizer.mean
        density = torch.rand(batch_size, 1, generator=generator) * 1.2
        allowed = torch.rand(batch_size, spec.num_choices, generator=generator) < density
        for columns in torch.split(allowed, heads.sizes, -1):
            columns |= _one_choice(columns, generator)
        noise = torch.zeros(batch_size, spec.num_choices)
        if number % 2 == 1:
            uniform = torch.rand(noise.shape, generator=generator).clamp(min=1e-20)
            noise = -torch.log(-torch.log(uniform))
        starts = torch.rand(batch_size, generator=generator) < RESET_PROBABILITY
        yield observation, allowed.to(device), noise.to(device), starts.to(device)


def _one_choice(columns: Tensor, generator: torch.Generator) -> Tensor:
    choice = torch.randint(columns.shape[1], (len(columns),), generator=generator)
    return torch.nn.functional.one_hot(choice, columns.shape[1]).bool()


def first_line(error: Exception) -> str:
    """What a foreign library says first of its failure."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _restarted(state: State, starts: Tensor) -> State:
    keep = ~starts[:, None, None]
    return state[0] * keep, state[1] * keep
