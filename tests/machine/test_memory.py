"""The bytes that exist, and those written: against maps as large as the memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .memory import PAGE_BITS, Layout, Memory, Pages

SIZES = st.lists(st.integers(1, 4), max_size=3)


@given(
    SIZES,
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.sampled_from([1, 2, 4]),
    st.data(),
)
def test_a_layout_has_the_bytes_of_its_elements(sizes, gaps, itemsize, data):
    strides, extent = [], itemsize
    for size, gap in zip(sizes, gaps):
        strides.append(extent + gap * itemsize)
        extent = size * strides[-1]
    order = data.draw(st.permutations(range(len(sizes))))
    sizes, strides = [sizes[i] for i in order], [strides[i] for i in order]
    there = np.zeros(5 + extent + 40, bool)
    for index in np.ndindex(*sizes):
        start = 5 + sum(i * stride for i, stride in zip(index, strides))
        there[start : start + itemsize] = True
    layout = Layout(5, tuple(sizes), tuple(strides), itemsize)
    for n_bytes in (1, 2, 4):
        at = np.arange(len(there) - n_bytes)
        expected = [there[start : start + n_bytes].all() for start in at]
        assert layout.has(at, n_bytes).tolist() == expected


def test_expanded_dimensions_have_one_element():
    layout = Layout(0, (5, 2), (0, 4), 4)
    assert layout.has(np.arange(0, 16, 4), 4).tolist() == [True, True, False, False]


def test_a_tensor_without_elements_has_no_bytes():
    assert not Layout(0, (0, 4), (16, 4), 4).has(np.arange(16), 1).any()


def test_dimensions_that_interleave_are_refused():
    with pytest.raises(ValueError, match=r"sizes \(3, 2\) and strides \(4, 6\) bytes interleave"):
        Layout(0, (3, 2), (4, 6), 4)


def test_pages_are_zero_until_they_are_set():
    pages = Pages(1 << 40, mark=np.uint8)  # a map of it would not fit
    far = np.array([3, (1 << 40) - 1, 5 << PAGE_BITS])

    def marks(at):
        index = pages.index(at)  # makes room
        return pages.arrays["mark"][index].tolist()

    assert marks(far) == [0, 0, 0]
    pages.arrays["mark"][pages.index(far[:2])] = 7
    assert marks(far) == [7, 7, 0]
    assert marks(np.array([4, (1 << 40) - 2, 0])) == [0, 0, 0]
    pages.index(np.arange(0, 64 << PAGE_BITS, 1 << PAGE_BITS))  # many more
    assert marks(far) == [7, 7, 0]


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_written_bytes_are_told_one_by_one(start, size):
    """Also of a storage that does not begin where 16 bytes may be accessed."""
    memory = Memory()
    raw = np.zeros(3 << PAGE_BITS, np.uint8)
    memory.add("p", (1 << 20) + start, raw, [Layout(0, (len(raw),), (1,), 1)], True)
    buffer = memory.buffers["p"]
    first = -start % size
    at = np.array([first, first + (1 << PAGE_BITS), first + 5 * size])
    buffer.set_written(at, size)
    assert buffer.was_written(at, size).all()
    written = {place + byte for place in at.tolist() for byte in range(size)}
    everything = np.arange(len(raw))
    assert set(np.flatnonzero(buffer.was_written(everything, 1))) == written
    assert memory.unwritten("p") == len(raw) - len(written)


def test_accesses_are_split_by_buffer():
    memory = Memory()
    raw = [np.zeros(16, np.uint8) for _ in range(2)]
    for name, address, data in (("b", 2000, raw[1]), ("a", 1000, raw[0])):
        memory.add(name, address, data, [Layout(0, (16,), (1,), 1)], False)
    found = memory.split(np.array([1004, 2001, 999, 1500]))
    assert [(b and b.name, list(at), list(offset)) for b, at, offset in found] == [
        (None, [2], [999]),
        ("a", [0, 3], [4, 500]),
        ("b", [1], [1]),
    ]
