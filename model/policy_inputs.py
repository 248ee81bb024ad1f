"""What a policy refuses of its inputs, each in a sentence that names the input and the row.

All raise ValueError. Shapes and dtypes are checked everywhere; checks that read values are the
caller's to leave out while a graph is traced, which can hold none.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from model.blueprint_embedding import NO_BLUEPRINT
from model.heads import HeadTable
from model.recurrence import State
from model.step_spec import SLOT_BY_OP, StepSpec

Masks = Mapping[str, Tensor]
"""`{head: bool [..., n]}`, True = allowed. A head that is absent has nothing disallowed.

Where the spec has it, `"slot_by_op"` `[..., ops, slots]` stands in for the slot head's, by op.
"""


def allowed_choices(
    spec: StepSpec, heads: HeadTable, masks: Masks | None, lead: torch.Size
) -> tuple[Tensor, Tensor | None]:
    """Masks as the table has them: bool `[..., heads, width]`, and `[..., ops, slots]` if given.

    `lead` is the shape before the choices. Raises ValueError for an unknown head, a wrong shape
    and a mask that is not bool.
    """
    if not masks:
        return heads.valid.expand(*lead, *heads.valid.shape), None
    slot_by_op = masks.get(SLOT_BY_OP) if spec.has_slot_by_op else None
    if slot_by_op is not None:
        masks = {name: mask for name, mask in masks.items() if name != SLOT_BY_OP}
        _check_mask(SLOT_BY_OP, slot_by_op, (*lead, spec.num_ops, spec.num_slots))
    _check_names(heads, "masks", masks)
    everything = heads.valid.new_ones(())
    columns = []
    for name, size in zip(heads.names, heads.sizes, strict=True):
        mask = masks.get(name)
        if mask is None:
            mask = everything.expand(*lead, size)
        else:
            _check_mask(name, mask, (*lead, size))
        columns.append(mask)
    allowed = heads.spread(torch.cat(columns, dim=-1)) & heads.valid
    return allowed, slot_by_op


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask {name!r} is {mask.dtype}, not torch.bool (True = allowed)")
    check_shape(f"mask {name!r}", mask, shape)


def check_blueprints(spec: StepSpec, blueprint_index: Tensor, shape: tuple[int, ...]) -> None:
    """Of `shape` `[..., slots]` and int64; where values can be read, each a blueprint's or -1."""
    if blueprint_index.dtype != torch.int64:
        raise ValueError(f"blueprint_index is {blueprint_index.dtype}, not torch.int64")
    check_shape("blueprint_index", blueprint_index, shape)
    if torch.compiler.is_compiling():
        return
    num = spec.num_blueprints
    outside = (blueprint_index < NO_BLUEPRINT) | (blueprint_index >= num)
    if outside.any():
        *row, slot = outside.nonzero()[0].tolist()
        raise ValueError(
            f"blueprint_index of slot {slot} is {int(blueprint_index[(*row, slot)])} in row "
            f"{_row(row)}; there are {num} blueprints, and -1 is none"
        )


def packed_actions(heads: HeadTable, actions: Mapping[str, Tensor], lead: torch.Size) -> Tensor:
    """`{head: int64 lead}` for every head, side by side: `[..., heads]`."""
    _check_names(heads, "actions", actions)
    for name in heads.names:
        if name not in actions:
            raise ValueError(f"actions have no head {name!r}")
        if actions[name].dtype != torch.int64:
            raise ValueError(f"action {name!r} is {actions[name].dtype}, not torch.int64")
        check_shape(f"action {name!r}", actions[name], tuple(lead))
    return torch.stack([actions[name] for name in heads.names], dim=-1)


def _check_names(heads: HeadTable, what: str, by_head: Mapping[str, Tensor]) -> None:
    for name in by_head:
        if name not in heads.names:
            known = ", ".join(heads.names)
            raise ValueError(f"{what} name an unknown head {name!r}; the heads are {known}")


def check_allowed(
    spec: StepSpec, heads: HeadTable, allowed: Tensor, slot_by_op: Tensor | None
) -> None:
    """Something is allowed in every head, and a slot for every allowed op that needs one.

    One read from the device, or two.
    """
    empty = ~allowed.any(-1)
    if empty.any():
        *row, head = empty.nonzero()[0].tolist()
        raise ValueError(f"mask {heads.names[head]!r} allows nothing in row {_row(row)}")
    if slot_by_op is None or heads.slot_index is None:
        return
    needs_slot = heads.relevance[:, heads.slot_index]
    allowed_ops = allowed[..., heads.op_index, : spec.num_ops]
    empty = allowed_ops & needs_slot & ~slot_by_op.any(-1)
    if empty.any():
        *row, op = empty.nonzero()[0].tolist()
        raise ValueError(
            f"mask {SLOT_BY_OP!r} allows no slot for op {op}, which is allowed in row {_row(row)}"
        )


def check_in_range(heads: HeadTable, action: Tensor) -> None:
    """Every action of `[..., heads]` is one of its head's. One read from the device."""
    sizes = torch.tensor(heads.sizes, device=action.device)
    outside = (action < 0) | (action >= sizes)
    if outside.any():
        *row, head = outside.nonzero()[0].tolist()
        raise ValueError(
            f"action {heads.names[head]!r} is {int(action[(*row, head)])} in row "
            f"{_row(row)}; the head has {heads.sizes[head]} choices"
        )


def check_state(spec: StepSpec, state: State, batch_size: int) -> None:
    """Each of its arrays is `[B, ...]` as the spec has it, and there are no others."""
    if len(state) != len(spec.states):
        raise ValueError(f"state has {len(state)} arrays, expected {len(spec.states)}")
    for of_spec, part in zip(spec.states, state, strict=True):
        check_shape(f"state {of_spec.name}", part, (batch_size, *of_spec.shape))


def check_shape(what: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """The tensor has this shape; None is any size."""
    matches = tensor.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, expected ({wanted})")


def refuse_gradient(
    spec: StepSpec, observation: Tensor, state: State | None, noise: Tensor | None
) -> None:
    """No input of a step that records no gradient requires one (ticket B9-PT-02)."""
    named = {"observation": observation, "noise": noise}
    if state is not None:
        names = (f"state {of_spec.name}" for of_spec in spec.states)
        named |= dict(zip(names, state, strict=False))
    for name, tensor in named.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, and get_action records none: detach() it, "
                "or use evaluate_actions to train"
            )


def refuse_inference(what: str, tensors: Iterable[Tensor]) -> None:
    """None of the tensors is one that no gradient can pass through."""
    if any(tensor.is_inference() for tensor in tensors):
        raise ValueError(
            f"{what} came out of inference mode (get_action), and no gradient can pass through: "
            "give evaluate_actions a .clone() made outside inference mode"
        )


def _row(index: list[int]) -> str:
    return str(index[0]) if len(index) == 1 else str(tuple(index))
