"""Where a batch's arrays lie in one buffer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.manifest import Array, step_inputs, step_outputs
from model.step_spec import StepSpec
from service.runtime.arrays import decisions
from service.runtime.device_states import DeviceStates
from service.runtime.device_step import Packing, tensors
from service.runtime.packed_rows import Layout
from tests.sb3.policies import SPECS
from tests.specs import TINY_LSTMS, TINY_MLPS, TINY_V1, TINY_V2

arrays = st.lists(
    st.builds(
        Array,
        name=st.uuids().map(str),
        dtype=st.sampled_from(["float32", "int64", "bool"]),
        shape=st.lists(st.integers(1, 7), max_size=2).map(lambda sizes: ("batch", *sizes)),
    ),
    min_size=1,
    max_size=9,
)


def filled(layout: Layout, num_rows: int) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.uint8]]]:
    """A buffer whose views were all written to, and the bytes written, by name."""
    rng = np.random.default_rng(0)
    buffer = np.full((num_rows, layout.row_bytes), 255, dtype=np.uint8)
    written = {}
    for name, view in layout.views(buffer).items():
        content = rng.integers(2, size=view.shape).astype(view.dtype)
        view[:] = content
        written[name] = content
    return buffer, written


@given(arrays=arrays, num_rows=st.integers(1, 5))
def test_every_array_has_a_place_of_its_own_in_each_row(arrays: list[Array], num_rows: int) -> None:
    layout = Layout(arrays)
    assert [field.name for field in layout.fields] == [array.name for array in arrays]
    taken = np.zeros(layout.row_bytes, dtype=int)
    for field, array in zip(layout.fields, arrays, strict=True):
        assert field.dtype == array.dtype
        assert ("batch", *field.shape) == array.shape
        taken[field.offset : field.offset + field.num_bytes] += 1
    assert taken.max() == 1
    num_gaps = layout.row_bytes - taken.sum()
    assert num_gaps < 8, "and they are at the row's end"
    assert taken[: layout.row_bytes - num_gaps].all()
    buffer, written = filled(layout, num_rows)
    for name, view in layout.views(buffer).items():
        assert np.shares_memory(view, buffer)
        assert view.shape == (num_rows, *written[name].shape[1:])
        assert np.array_equal(view, written[name])


@given(arrays=arrays)
def test_every_number_is_aligned_in_every_row(arrays: list[Array]) -> None:
    layout = Layout(arrays)
    assert layout.row_bytes % 8 == 0
    for field in layout.fields:
        assert field.offset % np.dtype(field.dtype).itemsize == 0
    aligned = np.zeros((3, layout.row_bytes // 8), dtype=np.int64).view(np.uint8)
    assert all(view.flags.aligned for view in layout.views(aligned).values())


@given(arrays=arrays, num_rows=st.integers(1, 5))
def test_the_first_rows_are_one_piece_and_all_there_is_to_them(
    arrays: list[Array], num_rows: int
) -> None:
    layout = Layout(arrays)
    buffer, written = filled(layout, 5)
    piece = buffer.tobytes()[: num_rows * layout.row_bytes]
    moved = np.frombuffer(piece, dtype=np.uint8).reshape(num_rows, layout.row_bytes)
    for name, view in layout.views(moved).items():
        assert np.array_equal(view, written[name][:num_rows])


@given(arrays=arrays, num_rows=st.integers(1, 5))
def test_tensors_find_what_numpy_wrote(arrays: list[Array], num_rows: int) -> None:
    layout = Layout(arrays)
    buffer, written = filled(layout, num_rows)
    for name, tensor in tensors(layout, torch.from_numpy(buffer)).items():
        assert np.array_equal(tensor.numpy(), written[name])
        assert tensor.numpy().dtype == written[name].dtype


def check_packing(spec: StepSpec) -> None:
    states = DeviceStates(spec, 1, torch.device("cpu"))
    packing = Packing(states, step_inputs(spec), step_outputs(spec))
    brought = packing.brought.views(np.zeros((2, packing.brought.row_bytes), dtype=np.uint8))
    names = {state.input for state in spec.states}
    expected = [array for array in step_inputs(spec) if array.name not in names]
    assert list(brought) == [*(array.name for array in expected), "read_row", "write_row"]
    for array in expected:
        assert brought[array.name].shape == (2, *array.shape[1:])
        assert brought[array.name].dtype == array.dtype
    assert brought["read_row"].dtype == brought["write_row"].dtype == np.int64
    given = packing.given.views(np.zeros((2, packing.given.row_bytes), dtype=np.uint8))
    assert list(given) == [*(array.name for array in decisions(spec)), "is_finite"]
    assert given["is_finite"].dtype == np.bool_


@pytest.mark.parametrize(
    "spec", [TINY_V1, TINY_V2, TINY_MLPS, TINY_LSTMS], ids=lambda spec: spec.name
)
def test_a_batch_brings_all_but_the_states_and_the_rows_they_are_in(spec: StepSpec) -> None:
    check_packing(spec)


@given(spec=SPECS)
def test_so_it_does_whatever_the_policy(spec: StepSpec) -> None:
    check_packing(spec)
