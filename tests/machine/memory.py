"""Global memory: storages of tensors at their own addresses, and which of their bytes there are.

Data are read and written in place. A byte exists if a tensor has an element there, which is decided
by arithmetic; padding between strided rows does not. Whether a fresh byte was written is kept in
pages that exist once they are touched, so that a tensor costs what is used of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

PAGE_BITS = 12  # 4096 bytes


class Layout:
    """Elements of a strided tensor, in bytes from the start of its storage.

    Args:
        offset: of the first element.
        sizes: elements along each dimension.
        strides: bytes along each dimension, 0 where it is expanded.
        itemsize: bytes of an element.

    Raises:
        ValueError: dimensions interleave, so that arithmetic cannot tell them apart.

    >>> rows = Layout(0, (2, 3), (16, 4), 4)
    >>> rows.has(np.array([0, 8, 12, 16, 28]), 4)
    array([ True,  True, False,  True, False])
    """

    def __init__(
        self, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int
    ) -> None:
        self._key = offset, tuple(sizes), tuple(strides), itemsize
        self.offset = offset
        self.block = itemsize if all(sizes) else 0  # bytes that lie side by side
        self.outer: list[tuple[int, int]] = []  # (size, stride), the largest stride first
        end = self.block  # the elements placed so far end here
        dimensions = [(stride, size) for size, stride in zip(sizes, strides) if size > 1 and stride]
        for stride, size in sorted(dimensions):
            if stride < end:
                raise ValueError(f"sizes {sizes} and strides {strides} bytes interleave")
            if stride == self.block and not self.outer:
                self.block *= size
            else:
                self.outer.insert(0, (size, stride))
            end += (size - 1) * stride

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def has(self, at: ndarray, size: int) -> ndarray:  # [accesses]
        """Whether all `size` bytes from each place on exist."""
        left = at - self.offset
        for n, stride in self.outer:
            left = left - np.clip(left // stride, 0, n - 1) * stride
        return (left >= 0) & (left + size <= self.block)


class Pages:
    """Numbers kept for each byte of a large memory, 0 until they are set.

    Args:
        n_bytes: of the memory.
        fields: names and types of the numbers.
    """

    def __init__(self, n_bytes: int, **fields: type) -> None:
        self._slots = np.zeros((n_bytes >> PAGE_BITS) + 1, np.int32)  # 0: no such page yet
        self._n_pages = 0
        self.arrays = {name: np.zeros(0, kind) for name, kind in fields.items()}

    def index(self, at: ndarray) -> ndarray:
        """Places in `arrays` of bytes of the memory."""
        page = at >> PAGE_BITS
        slot = self._slots[page]
        if not slot.all():
            self._add(np.unique(page[slot == 0]))
            slot = self._slots[page]
        return ((slot.astype(np.int64) - 1) << PAGE_BITS) + (at & ((1 << PAGE_BITS) - 1))

    def _add(self, pages: ndarray) -> None:
        self._slots[pages] = np.arange(len(pages)) + self._n_pages + 1
        self._n_pages += len(pages)
        needed = self._n_pages << PAGE_BITS
        for name, array in self.arrays.items():
            if len(array) < needed:
                larger = np.zeros(max(needed, 2 * len(array)), array.dtype)
                larger[: len(array)] = array
                self.arrays[name] = larger

    def clear(self) -> None:
        """Set everything to 0 again."""
        self._slots[:] = 0
        self._n_pages = 0
        for array in self.arrays.values():
            array[:] = 0


@dataclass
class Buffer:
    """The storage of some tensors."""

    name: str
    address: int
    data: ndarray  # uint8
    layouts: list[Layout]
    written: Pages | None  # None: all of it was, before

    def __post_init__(self) -> None:
        self._views: dict[int, ndarray] = {}

    def view(self, size: int) -> ndarray:  # [n, size] uint8
        """The storage as aligned pieces of `size` bytes."""
        if size not in self._views:
            start = -self.address % size
            whole = (len(self.data) - start) // size * size
            self._views[size] = self.data[start : start + max(whole, 0)].reshape(-1, size)
        return self._views[size]

    def place(self, at: ndarray, size: int) -> ndarray:
        """The piece of `view(size)` that each byte offset starts; they must be aligned."""
        return (at - (-self.address % size)) // size

    def exists(self, at: ndarray, size: int) -> ndarray:
        found = self.layouts[0].has(at, size)
        for layout in self.layouts[1:]:
            found |= layout.has(at, size)
        return found

    def was_written(self, at: ndarray, size: int) -> ndarray:
        if self.written is None:
            return np.ones(len(at), bool)
        marks, place = self._marks(at, size)
        one = ONES[size] if self.address % size == 0 else 1
        all_written: ndarray = marks[place] == one
        return all_written if all_written.ndim == 1 else all_written.all(1)

    def set_written(self, at: ndarray, size: int) -> None:
        if self.written is not None:
            marks, place = self._marks(at, size)
            marks[place] = ONES[size] if self.address % size == 0 else 1

    def _marks(self, at: ndarray, size: int) -> tuple[ndarray, ndarray]:
        """Marks of the bytes, several to a number where they are aligned, and their places."""
        index = self.written.index(at)  # type: ignore[union-attr]
        marks = self.written.arrays["written"]  # type: ignore[union-attr]
        if self.address % size:  # its pages do not begin where pieces of this size do
            return marks, index[:, None] + np.arange(size)
        return pieces(marks, size), index // size


ONES = {size: int.from_bytes(b"\1" * min(size, 8), "little") for size in (1, 2, 4, 8, 16)}


def pieces(marks: ndarray, size: int) -> ndarray:  # uint8 [n] -> [n / size] or [n / size, 2]
    """Bytes as numbers of `size` bytes each."""
    if size <= 8:
        return marks.view(f"u{size}")
    return marks.view("u8").reshape(-1, size // 8)


class Memory:
    """All buffers that a launch may touch."""

    def __init__(self) -> None:
        self.buffers: dict[str, Buffer] = {}
        self._sorted: list[Buffer] = []
        self._starts = np.zeros(0, np.int64)

    def add(
        self, name: str, address: int, data: ndarray, layouts: list[Layout], fresh: bool
    ) -> None:
        """Let kernels reach a storage.

        Args:
            name: for faults, and for `unwritten`.
            address: the storage's own.
            data: uint8 [bytes], the storage itself.
            layouts: tensors in it.
            fresh: nothing was written to it yet.
        """
        if not layouts:
            raise ValueError(f"{name} has no tensors")
        written = Pages(len(data), written=np.uint8) if fresh else None
        self.buffers[name] = Buffer(name, address, data, layouts, written)
        self._sorted = sorted(self.buffers.values(), key=lambda buffer: buffer.address)
        self._starts = np.array([buffer.address for buffer in self._sorted], np.int64)

    def unwritten(self, name: str) -> int:
        """Bytes of a fresh buffer that exist and were never written."""
        buffer = self.buffers[name]
        if buffer.written is None:
            return 0
        missing = 0
        for start in range(0, len(buffer.data), 1 << 20):
            at = np.arange(start, min(start + (1 << 20), len(buffer.data)))
            at = at[buffer.exists(at, 1)]
            missing += int((~buffer.was_written(at, 1)).sum())
        return missing

    def split(self, addresses: ndarray) -> list[tuple[Buffer | None, ndarray | slice, ndarray]]:
        """Group accesses by buffer.

        Returns:
            The buffer whose start precedes the addresses (None: there is none), which of them
            those are, and their offsets in it.
        """
        which = np.searchsorted(self._starts, addresses, "right") - 1
        if len(which) and (which == which[0]).all():
            return [self._group(int(which[0]), slice(None), addresses)]
        return [
            self._group(int(found), at := np.flatnonzero(which == found), addresses[at])
            for found in np.unique(which)
        ]

    def _group(
        self, which: int, at: ndarray | slice, addresses: ndarray
    ) -> tuple[Buffer | None, ndarray | slice, ndarray]:
        if which < 0:
            return None, at, addresses
        buffer = self._sorted[which]
        return buffer, at, addresses - buffer.address
