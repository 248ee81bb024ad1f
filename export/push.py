"""New weights for a policy that serves: packed, probed, sent, and taken between two batches.

The probe is what the learner's own policy does, in eager mode, in some steps of some rows; the
server compares what it would serve with that, and takes nothing that differs.
"""

import copy
import json
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors.torch import save
from torch import Tensor, nn

from export.episodes import LIFT, EpisodeMaker, Moment
from export.families import Normalizer, family_of
from export.judge import states_out
from export.manifest import Precision, Spec
from export.parity import TOLERANCES
from export.process import plain_process
from export.rounded_policy import round_products
from export.weights import RebuiltPolicy, pack, pack_weights
from model.actor_critic import ActorCritic, Scores
from model.recurrence import State
from model.step_spec import StepSpec
from tamiyo_client.errors import ServerError
from tamiyo_client.exchange import Patience, Reply, patiently
from tamiyo_client.session import bearer, checked_url
from tamiyo_client.transport import Transport
from tamiyo_client.wire import SAFETENSORS

ROWS = 32
STEPS = 4
MARGIN = 8.0
"""Tolerances. A choice that wins by less is lifted, for the step is not to choose otherwise."""
OF_THE_EXPORT = {"name", "value_scale", "extra_outputs"}
"""What a learner's spec may have otherwise than the artifact's: no parameter depends on it."""


class PushAnswer(NamedTuple):
    """What the server says: the version that serves now, the one before, and the probe's error."""

    policy_version: str
    previous_version: str | None
    probe_error: float


def push_policy(
    policy: nn.Module,
    normalizer: Normalizer | None,
    url: str,
    api_key: str | None = None,
    *,
    if_match: str | None = None,
    restart_sessions: bool = False,
    timeout_s: float = 30.0,
) -> PushAnswer:
    """Has the server at `url` serve these weights, once it has seen them do what `policy` does.

    `policy` and `normalizer` may be compiled, on any device, and go on learning: all of it is
    copied. `api_key` is an admin key; `if_match` the version to be replaced; `restart_sessions`
    gives up the sessions, whose states the older weights made. It is sent again where no answer
    comes, or the server is about to end.

    Raises ValueError, before anything is sent, for weights that are not finite, and for a URL, key
    or version that can be none; before any weights are, for a policy whose spec is not the served
    one's. Raises `tamiyo_client.PolicyError`, with the server's sentence, where it is refused, and
    Unreachable, which is one, where no answer comes in `timeout_s`.
    """
    own = copied(policy, normalizer)
    pack_weights(*own)
    conditions = {} if if_match is None else {"If-Match": f'"{_header_value(if_match)}"'}
    headers = {} if api_key is None else {"Authorization": bearer(api_key)}
    transport = Transport(None)
    patience = Patience(timeout_s)
    base = checked_url(url).rstrip("/")

    def answered(method: str, path: str, body: bytes, **more: str) -> dict[str, Any]:
        call = patiently(method, base + path, {**headers, **more}, body, patience)
        reply: Reply = transport.run(call)
        return _described(reply)

    try:
        served = answered("GET", "/policy", b"")
        if "precision" not in served:
            raise ServerError(f"{url} runs a release that takes no weights", error_type="")
        spec = _served_spec(own.policy.spec, TypeAdapter(Spec).validate_python(served["spec"]))
        body = push_body(own, spec, served["precision"])
        path = "/policy/weights" + ("?sessions=restart" if restart_sessions else "")
        answer = answered("PUT", path, body, **{"Content-Type": SAFETENSORS}, **conditions)
    finally:
        transport.close()
    return PushAnswer(**answer)


def _described(reply: Reply) -> dict[str, Any]:
    try:
        described = json.loads(reply.body)
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise ServerError(
            f"the answer is {reply.status}, and not of a policy server", status=reply.status
        )
    return described


def push_body(own: RebuiltPolicy, spec: StepSpec, precision: Precision) -> bytes:
    """A push as it is sent: the packed parameters of a policy as `copied` gives it, and a probe."""
    with plain_process():
        tensors: dict[str, Tensor] = {}
        for name, array in pack(pack_weights(*own), spec, precision).items():
            tensor = torch.from_numpy(array)
            is_bfloat16 = tensor.dtype == torch.uint16
            tensors[name] = tensor.view(torch.bfloat16) if is_bfloat16 else tensor
        probe = _probe(own, spec, precision)
        return save(tensors | {f"probe.{name}": value for name, value in probe.items()})


def _header_value(if_match: str) -> str:
    if not (if_match.isascii() and if_match.isprintable()):
        raise ValueError(f"if_match is {if_match!r}; a version is of printable ASCII letters")
    return if_match


def _served_spec(own: StepSpec, served: StepSpec) -> StepSpec:
    """The served spec, with the scale of this policy's value. Raises ValueError for another's."""
    if type(own) is not type(served):
        raise ValueError(
            f"the policy is of another family than the one that is served, {served.name}"
        )
    fields, expected = (spec.model_dump(exclude=OF_THE_EXPORT) for spec in (own, served))
    difference = _first_difference(fields, expected)
    if difference is not None:
        where, mine, theirs = difference
        raise ValueError(
            f"the policy is not of the spec that is served: {where} is {mine}, expected {theirs}"
        )
    return served.model_copy(update={"value_scale": own.value_scale})


def _first_difference(own: Any, served: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The innermost field that differs, and what it is on both sides."""
    if isinstance(own, dict) and isinstance(served, dict):
        inner = [(name, own[name], served[name]) for name in own]
    elif isinstance(own, tuple) and isinstance(served, tuple) and len(own) == len(served):
        inner = [(str(at), *pair) for at, pair in enumerate(zip(own, served, strict=True))]
    else:
        return None if own == served else (where, own, served)
    for name, mine, theirs in inner:
        difference = _first_difference(mine, theirs, f"{where}.{name}" if where else name)
        if difference is not None:
            return difference
    return None


def copied(policy: nn.Module, normalizer: Normalizer | None) -> RebuiltPolicy:
    """The learner's own modules as they are now, in float32 on this CPU, to run as written.

    Raises ValueError for a module that is no policy, but has one in it perhaps.
    """
    eager = getattr(policy, "_orig_mod", policy)
    normalizer = getattr(normalizer, "_orig_mod", normalizer)
    if not isinstance(eager, ActorCritic):
        raise ValueError(
            f"a {type(eager).__name__} is no policy; where it is wrapped around one, push that"
        )
    eager, normalizer = copy.deepcopy((eager, normalizer))
    for module in list(eager.modules()):
        for name, child in module.named_children():
            if hasattr(child, "_orig_mod"):  # compiled by itself
                setattr(module, name, child._orig_mod)
    eager = eager.to("cpu", torch.float32).eval().requires_grad_(False)
    return RebuiltPolicy(eager, None if normalizer is None else normalizer.cpu().float())


def _probe(own: RebuiltPolicy, spec: StepSpec, precision: Precision) -> dict[str, Tensor]:
    """What goes in and comes out, `[steps, rows, ...]`, by the manifest's names."""
    maker = EpisodeMaker(own, ROWS)
    generator = torch.Generator().manual_seed(0)
    state: State = tuple(
        torch.randn(ROWS, *of.shape, generator=generator)
        if at % 2  # a cell, of an LSTM's (h, c)
        else torch.rand(ROWS, *of.shape, generator=generator) * 2 - 1
        for at, of in enumerate(spec.states)
    )
    steps: list[dict[str, Tensor]] = []
    first = {of.input: array for of, array in zip(spec.states, state, strict=True)}
    follow = family_of(own.policy.spec).float_error(*own, precision)
    shown = own
    if precision == "bf16":  # the server's step rounds its products: so does what it is shown
        shown = own._replace(policy=round_products(copy.deepcopy(own.policy)))
    for number in range(STEPS):
        moment = maker.moment(ROWS, number)
        scores = _scores(shown, moment, state, maker)
        slack = follow(moment.observation, state, tuple(map(torch.zeros_like, state)))
        is_far = slack.is_large(scores.value, TOLERANCES[precision].atol / 2)
        if is_far.any():  # what rounding alone may move by as much shows nothing
            near = torch.where(is_far[:, None], maker.near(moment.observation), moment.observation)
            moment = replace(moment, observation=near)
            scores = _scores(shown, moment, state, maker)
        inputs = moment.inputs(spec, state)
        given = {name: value for name, value in inputs.items() if name not in first}
        given["noise"] = _decisive(moment, scores, maker, TOLERANCES[precision].atol * MARGIN)
        steps.append(given | _outputs(own.policy, spec, scores, given["noise"]))
        state = scores.state
    return first | {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


def _scores(own: RebuiltPolicy, moment: Moment, state: State, maker: EpisodeMaker) -> Scores:
    observation = moment.observation
    if own.normalizer is not None:
        observation = own.normalizer(observation)
    return own.policy.step_scores(
        observation, state, moment.masks(maker.heads), blueprint_index=moment.blueprint_index
    )


def _decisive(moment: Moment, scores: Scores, maker: EpisodeMaker, margin: float) -> Tensor:
    """The moment's noise, but that in a row where some choice is close all that win are lifted."""
    heads, noise = maker.heads, moment.noise
    action = scores.choices.choose(heads.spread(noise)).action
    op = action[..., heads.op_index]
    log_probs, allowed = scores.choices.given(op)
    by_score = torch.where(allowed, log_probs + heads.spread(noise), -torch.inf).sort(-1).values
    # Where a log-prob is far below, so is what it may be off.
    slack = margin * (1 + by_score[..., -1].abs())
    is_close = (by_score[..., -1] - by_score[..., -2] < slack).any(-1)
    starts = torch.tensor(heads.sizes).cumsum(0) - torch.tensor(heads.sizes)
    winners = torch.zeros_like(noise).scatter(-1, starts + action, 1.0)
    return torch.where(is_close[:, None], noise + LIFT * winners, noise)


def _outputs(
    policy: ActorCritic, spec: StepSpec, scores: Scores, noise: Tensor
) -> dict[str, Tensor]:
    decision = scores.choices.choose(policy.heads.spread(noise))
    op = decision.action[..., policy.heads.op_index]
    return {
        "action": decision.action,
        "log_prob": decision.log_prob,
        "value": scores.value * spec.value_scale,
        **states_out(spec, scores.state),
        **{
            name: policy.extra_output(name, scores.output, op)
            * (spec.value_scale if name == "q_value" else 1.0)
            for name in spec.extra_outputs
        },
    }
