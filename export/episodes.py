"""What the gate runs a step on: environments beside one another, stepped in batches of every size.

The rows are made to show faults, as a test generator's inputs are. Whatever a step computes, some
row makes it visible in an output: one feature far beyond the others shows a clip that a LayerNorm
would cancel; noise that lifts one choice above all others shows that choice's log-prob, or that its
mask bit was read; states along a row of the recurrent weights drive a gate as far as it goes, one
that the row's observation drives already.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from export.manifest import bucket_sizes
from export.weights import RebuiltPolicy
from model.heads import HeadTable
from model.recurrence import LayerParameters, State
from model.step_spec import SLOT_BY_OP, StepSpec

ROWS = 256
"""Environments beside one another, whatever the largest batch: so the gate sees as much of a small
one. Every batch size up to here is run."""

STEPS = 50
"""At least; more where it takes more to run every batch size."""

LARGE_STEPS = 8
RANDOM_LARGE_SIZES = 8

LIFT = 4096.0
"""What noise adds to the one choice it points at: beyond any log-prob, and less than a mask."""

FAR = 1e30
FAR_WITHOUT_NORMALIZER = 1e8
NEAR = 10.0
SATURATION = 20.0
LONGEST_MEMORY = 200.0
"""A cell that never forgets gains at most 1 a step: this is two hundred of them."""


@dataclass(frozen=True)
class Moment:
    """One step of all rows: what goes in, where episodes begin, and in which batches it is run.

    `begins` are the rows whose episode starts here, and `begin_state` what they start from;
    `is_free` those whose noise is as in serving, or none, `is_greedy` those without. `row` is each
    one's own number and `batch_size` the size of its batch; `batches` are the rows of each batch.
    """

    number: int
    row: Tensor
    batch_size: Tensor
    batches: list[Tensor]
    observation: Tensor
    action_mask: Tensor
    noise: Tensor
    blueprint_index: Tensor | None
    slot_by_op_mask: Tensor | None
    begins: Tensor
    begin_state: State
    is_free: Tensor
    is_greedy: Tensor

    def to(self, device: torch.device) -> "Moment":
        """All of it on `device`."""
        return self._changed(lambda array: array.to(device))

    def inputs(self, spec: StepSpec, state: State) -> dict[str, Tensor]:
        """What goes in from `state`, by the manifest's names."""
        states = {of.input: array for of, array in zip(spec.states, state, strict=True)}
        named = {
            "observation": self.observation,
            "action_mask": self.action_mask,
            "noise": self.noise,
            **states,
            "blueprint_index": self.blueprint_index,
            "slot_by_op_mask": self.slot_by_op_mask,
        }
        return {name: array for name, array in named.items() if array is not None}

    def part(self, rows: slice) -> "Moment":
        """These rows alone."""
        return self._changed(lambda array: array[rows])

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Moment":
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, array in arrays.items():
            if isinstance(array, Tensor):
                arrays[name] = change(array)
            elif isinstance(array, tuple):  # a state
                arrays[name] = tuple(map(change, array))
        return Moment(**arrays)

    def masks(self, heads: HeadTable) -> dict[str, Tensor]:
        """The masks as the policy takes them."""
        parts = torch.split(self.action_mask, heads.sizes, -1)
        masks = dict(zip(heads.names, parts, strict=True))
        if self.slot_by_op_mask is not None:
            masks[SLOT_BY_OP] = self.slot_by_op_mask
        return masks

    def restarted(self, state: State) -> State:
        """`state`, but for the rows that begin an episode, which take `begin_state`'s."""
        begins = self.begins[:, None, None]
        pairs = zip(self.begin_state, state, strict=True)
        return tuple(torch.where(begins, begin, goes_on) for begin, goes_on in pairs)

    def exact_where_begun(self, error: State) -> State:
        """`error`, but for the rows that begin an episode, which are off by nothing."""
        begins = self.begins[:, None, None]
        return tuple(torch.where(begins, 0.0, of_state) for of_state in error)


class Episode(NamedTuple):
    """`num_rows` environments, and the sizes of the batches they are stepped in."""

    num_rows: int
    sizes: tuple[int, ...]
    least_steps: int


def episodes(max_batch_size: int, generator: torch.Generator) -> tuple[Episode, ...]:
    """Every batch size up to 256; beyond, the buckets, the largest and some at random."""
    small = Episode(ROWS, tuple(range(1, min(max_batch_size, ROWS) + 1)), STEPS)
    if max_batch_size <= ROWS:
        return (small,)
    between = torch.randint(
        ROWS + 1, max_batch_size + 1, (RANDOM_LARGE_SIZES,), generator=generator
    )
    large = {*between.tolist(), *(size for size in bucket_sizes(max_batch_size) if size > ROWS)}
    return small, Episode(max_batch_size, tuple(sorted(large)), LARGE_STEPS)


class EpisodeMaker:
    """Makes the moments of episodes for one policy, the same for the same seed."""

    def __init__(self, rebuilt: RebuiltPolicy, max_batch_size: int, *, seed: int = 0) -> None:
        self.spec: StepSpec = rebuilt.policy.spec
        self.heads = HeadTable(self.spec)
        self.policy = rebuilt.policy
        self.normalizer = rebuilt.normalizer
        self.recurrences = [
            [_on_host(layer) for layer in layers] for layers in rebuilt.policy.recurrences()
        ]
        self.generator = torch.Generator().manual_seed(seed)
        self.episodes = episodes(max_batch_size, self.generator)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every size that a batch has, in some moment."""
        return tuple(sorted({size for episode in self.episodes for size in episode.sizes}))

    def moments(self, episode: Episode) -> Iterator[Moment]:
        """The episode, step by step, until every batch size was run and `least_steps` were made."""
        waiting = self._shuffled(episode.sizes)
        number = 0
        is_covered = False
        while number < episode.least_steps or not is_covered:
            batches = []
            rows = torch.randperm(episode.num_rows, generator=self.generator)
            while len(rows) > 0:
                size = next((size for size in waiting if size <= len(rows)), len(rows))
                if size in waiting:
                    waiting.remove(size)
                if not waiting:
                    is_covered = True
                    waiting = self._shuffled(episode.sizes)
                batches.append(rows[:size])
                rows = rows[size:]
            yield self.moment(episode.num_rows, number, batches)
            number += 1

    def moment(self, num_rows: int, number: int = 0, batches: list[Tensor] | None = None) -> Moment:
        """One step of `num_rows` rows, all in one batch where none are given."""
        row = torch.arange(num_rows)
        batches = [row] if batches is None else batches
        batch_size = torch.empty_like(row)
        for rows in batches:
            batch_size[rows] = len(rows)
        mask = self._masks(num_rows)
        noise, is_free, is_greedy = self._noise(num_rows)
        observation = self._observations(num_rows)
        blueprint_index = self._blueprints(num_rows)
        return Moment(
            number=number,
            row=row,
            batch_size=batch_size,
            batches=batches,
            observation=observation,
            action_mask=mask,
            noise=noise,
            blueprint_index=blueprint_index,
            slot_by_op_mask=self._slots_by_op(mask),
            begins=self._begins(num_rows),
            begin_state=self._begin_state(num_rows, observation, blueprint_index),
            is_free=is_free,
            is_greedy=is_greedy,
        )

    def _shuffled(self, sizes: Sequence[int]) -> list[int]:
        order = torch.randperm(len(sizes), generator=self.generator)
        return [sizes[index] for index in order.tolist()]

    def _observations(self, num_rows: int) -> Tensor:
        """As in training; small and large; one to three features far off; one alone; all far."""
        shape = (num_rows, self.spec.observation_dim)
        plain = self._normal(shape)
        some = self._rand(shape) < 2.0 / shape[1]
        far = FAR_WITHOUT_NORMALIZER if self.normalizer is None else FAR
        usual = self._log_uniform(shape, 3.0, 1e3 if self.normalizer is not None else far)
        outlier = self._signs(shape) * torch.where(self._rand((num_rows, 1)) < 0.25, far, usual)
        alone = some & (some.cumsum(-1) == 1)
        observation = _chosen(
            self._rand((num_rows,)),
            {
                0.45: plain,
                0.75: torch.where(some, outlier, plain),
                0.85: torch.where(alone, plain, 0.0),
                0.93: plain * self._log_uniform((num_rows, 1), 1e-3, 30.0),
                1.0: self._signs(shape) * far,
            },
        )
        if self.normalizer is None:
            return observation
        scale, mean = self.normalizer.scale().cpu(), self.normalizer.mean.cpu()
        # What is far stays far where a feature never moved.
        return torch.where(observation.abs() >= far, observation, observation * scale + mean)

    def near(self, observation: Tensor) -> Tensor:
        """The same, no feature further off than ten deviations, or ten without statistics."""
        if self.normalizer is None:
            return observation.clamp(-NEAR, NEAR)
        scale, mean = self.normalizer.scale().cpu(), self.normalizer.mean.cpu()
        return mean + scale * ((observation - mean) / scale).clamp(-NEAR, NEAR)

    def _masks(self, num_rows: int) -> Tensor:
        """From one choice allowed to all, and often all but one."""
        density = self._rand((num_rows, 1)) * 1.6 - 0.3
        parts = []
        for size in self.heads.sizes:
            some = self._rand((num_rows, size)) < density
            all_but_one = ~self._one_hot((num_rows,), size)
            part = torch.where(self._rand((num_rows, 1)) < 0.3, all_but_one, some)
            parts.append(part | (self._one_hot((num_rows,), size) & ~part.any(-1, keepdim=True)))
        return torch.cat(parts, dim=-1)

    def _noise(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """None; Gumbel; alike in each head but for its last digits; or Gumbel and in each head one
        choice lifted above all, allowed or not. The first two are free.
        """
        gumbel = -torch.log(-torch.log(self._rand((num_rows, self.spec.num_choices)) + 1e-20))
        alike = torch.cat(
            [
                part[:, :1].expand_as(part)
                + self._normal(part.shape) * self._log_uniform((num_rows, 1), 1e-4, 0.1)
                for part in torch.split(gumbel, self.heads.sizes, -1)
            ],
            dim=-1,
        )
        pointed = torch.cat([self._one_hot((num_rows,), size) for size in self.heads.sizes], -1)
        kind = self._rand((num_rows,))
        none = torch.zeros_like(gumbel)
        noise = _chosen(kind, {0.3: none, 0.6: gumbel, 0.75: alike, 1.0: gumbel + LIFT * pointed})
        return noise, kind < 0.6, kind < 0.3

    def _blueprints(self, num_rows: int) -> Tensor | None:
        if self.spec.blueprint_embedding_dim is None:
            return None
        shape = (num_rows, self.spec.num_slots)
        return torch.randint(-1, self.spec.num_blueprints, shape, generator=self.generator)

    def _slots_by_op(self, mask: Tensor) -> Tensor | None:
        """No slot at all for ops that are not allowed, as environments send it, nor at times for
        those that need none.
        """
        if not self.spec.has_slot_by_op:
            return None
        shape = (len(mask), self.spec.num_ops, self.spec.num_slots)
        some = self._rand(shape) < 0.5
        all_but_one = ~self._one_hot(shape[:-1], shape[-1])
        allowed = torch.where(self._rand((*shape[:-1], 1)) < 0.3, all_but_one, some)
        allowed |= self._one_hot(shape[:-1], shape[-1]) & ~allowed.any(-1, keepdim=True)
        needs_slot = self.heads.relevance[:, self.heads.names.index("slot")]
        is_spared = self._rand(shape[:-1]) < 0.5
        allowed_ops = torch.split(mask, self.heads.sizes, -1)[self.heads.op_index]
        return allowed & (allowed_ops & (needs_slot | is_spared)).unsqueeze(-1)

    def _begins(self, num_rows: int) -> Tensor:
        """One half of the rows begin anew every fourth step; the other is carried far."""
        often = torch.arange(num_rows) % 2 == 0
        return self._rand((num_rows,)) < torch.where(often, 0.25, 0.02)

    def _begin_state(
        self, num_rows: int, observation: Tensor, blueprint_index: Tensor | None
    ) -> State:
        """Of each LSTM its own."""
        state: State = ()
        inputs = self._recurrence_inputs(observation, blueprint_index)
        for layers, x in zip(self.recurrences, inputs, strict=True):
            state = (*state, *self._begin_lstm(layers, x))
        return state

    def _begin_lstm(self, layers: list[LayerParameters], x: Tensor) -> State:
        """Zeros; anything; saturated; or each layer's state along a row of its gates' weights."""
        num_rows = len(x)
        shape = (num_rows, len(layers), layers[0][1].shape[1])
        toward = torch.stack([self._driving(w_hh, num_rows) for _, w_hh, _, _ in layers], dim=1)
        further = self._driving_further(layers[0], x)
        toward[:, 0] = torch.where(self._rand((num_rows, 1)) < 0.5, further, toward[:, 0])
        anything = self._rand(shape) * 2 - 1
        signs = self._signs(shape)
        memory = self._log_uniform((num_rows, 1, 1), 0.1, LONGEST_MEMORY)
        kinds = self._rand((num_rows,))
        h = _chosen(kinds, {0.25: torch.zeros(shape), 0.45: anything, 0.52: signs, 1.0: toward})
        c = _chosen(
            kinds,
            {
                0.25: torch.zeros(shape),
                0.45: 3.0 * self._normal(shape),
                0.52: signs * SATURATION,
                1.0: signs * memory,
            },
        )
        return h, c

    def _driving(self, weight: Tensor, num_rows: int) -> Tensor:
        """Hidden states that drive one of a layer's gates each, up or down, as far as they can."""
        gates = torch.randint(len(weight), (num_rows,), generator=self.generator)
        return weight[gates].sign() * self._signs((num_rows, 1))

    def _driving_further(self, first_layer: LayerParameters, x: Tensor) -> Tensor:
        """The same in the first layer, for a gate that what it gets of the input drives already."""
        w_ih, weight, b_ih, b_hh = first_layer
        inputs = nn.functional.linear(x, w_ih, b_ih + b_hh)
        kind = self._one_hot((len(inputs),), 4).repeat_interleave(weight.shape[1], dim=-1)
        some = kind & (self._rand(inputs.shape) < 0.5)
        reach = inputs.abs() + weight.abs().sum(-1)
        gates = torch.where(some, reach, -1.0).argmax(-1, keepdim=True)
        return weight[gates[:, 0]].sign() * inputs.gather(-1, gates).sign()

    def _recurrence_inputs(
        self, observation: Tensor, blueprint_index: Tensor | None
    ) -> list[Tensor]:
        """What the first layer of each LSTM reads, `[rows, input]`."""
        device = self.policy.heads.valid.device
        x = observation.to(device)
        if self.normalizer is not None:
            x = self.normalizer(x)
        blueprint_index = None if blueprint_index is None else blueprint_index.to(device)
        inputs = self.policy.recurrence_inputs(x, blueprint_index)
        return [each.detach().cpu() for each in inputs]

    def _rand(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def _normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _signs(self, shape: Sequence[int]) -> Tensor:
        return torch.where(self._rand(shape) < 0.5, -1.0, 1.0)

    def _log_uniform(self, shape: Sequence[int], least: float, most: float) -> Tensor:
        return least * (most / least) ** self._rand(shape)

    def _one_hot(self, lead: Sequence[int], size: int) -> Tensor:
        """bool `[..., size]`, one of each row at random."""
        index = torch.randint(size, tuple(lead), generator=self.generator)
        return nn.functional.one_hot(index, size).bool()


def _chosen(kind: Tensor, options: Mapping[float, Tensor]) -> Tensor:
    """By `kind` `[rows]`, from 0 to 1: the first of the options whose number is above it."""
    *firsts, (_, chosen) = options.items()
    for below, option in reversed(firsts):
        is_it = (kind < below).view(-1, *(1 for _ in option.shape[1:]))
        chosen = torch.where(is_it, option, chosen)
    return chosen


def _on_host(layer: LayerParameters) -> LayerParameters:
    w_ih, w_hh, b_ih, b_hh = (array.detach().cpu() for array in layer)
    return w_ih, w_hh, b_ih, b_hh
