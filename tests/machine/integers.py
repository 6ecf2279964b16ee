"""Integer and conversion results of instructions, on arrays of one value per thread."""

from __future__ import annotations

import numpy as np
from numpy import float32 as f4
from numpy import float64 as f8
from numpy import int64 as i8
from numpy import ndarray
from numpy import uint16 as u2
from numpy import uint32 as u4
from numpy import uint64 as u8

from . import arithmetic


def quotient(a: ndarray, b: ndarray) -> ndarray:
    """A / b towards zero; anything at all where b is 0."""
    b = np.where(b == 0, b.dtype.type(1), b)
    down = a // b
    return down + ((a % b != 0) & ((a < 0) != (b < 0))).astype(down.dtype)


def remainder(a: ndarray, b: ndarray) -> ndarray:
    """A - b * quotient: the sign is that of a."""
    return a - quotient(a, b) * b


def high_product(a: ndarray, b: ndarray) -> ndarray:
    """Upper half of the product, of integers of up to 32 bits."""
    bits = 8 * a.dtype.itemsize
    wide = i8 if a.dtype.kind == "i" else u8
    return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)


def permuted_bytes(a: ndarray, b: ndarray, selector: ndarray) -> ndarray:
    """prmt: any four of the eight bytes b:a, or their signs."""
    a, b, selector = np.broadcast_arrays(*(np.asarray(x, u4) for x in (a, b, selector)))
    pool = (b.astype(u8) << u8(32)) | a.astype(u8)
    result = np.zeros(a.shape, u4)
    for place in range(4):
        chosen = (selector >> u4(4 * place)) & u4(15)
        byte = ((pool >> ((chosen & u4(7)).astype(u8) * u8(8))) & u8(255)).astype(u4)
        sign = np.where(byte & u4(128), u4(255), u4(0))
        result |= np.where(chosen & u4(8), sign, byte) << u4(8 * place)
    return result


def funnel(low: ndarray, high: ndarray, by: ndarray, right: bool) -> ndarray:
    """shf.wrap: 32 bits of high:low, shifted by up to 31."""
    low, high, by = np.broadcast_arrays(*(np.asarray(x, u4).astype(u8) for x in (low, high, by)))
    both = (high << u8(32)) | low
    by = by & u8(31)
    return (both >> by if right else (both << by) >> u8(32)).astype(u4)


def field(a: ndarray, position: ndarray, length: ndarray) -> ndarray:
    """bfe: `length` bits from `position` on; sign-extended if `a` is signed, 32 bits."""
    position, length = (np.asarray(x, u4).astype(i8) & i8(255) for x in (position, length))
    if a.dtype.kind == "u":
        mask = (i8(1) << np.minimum(length, i8(32))) - i8(1)
        return ((a.astype(i8) >> np.minimum(position, i8(32))) & mask).astype(u4)
    # Bits past the end are the sign, as those of a wider integer are.
    shift = i8(64) - np.clip(length, i8(1), i8(32))
    found = ((a.astype(i8) >> np.minimum(position, i8(32))) << shift) >> shift
    return np.where(length == 0, i8(0), found).astype(a.dtype)


def to_bf16(x: ndarray) -> ndarray:
    """Bits of bfloat16, rounded to nearest even."""
    bits = x.view(u4)
    rounded = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    return np.where(x != x, u2(0x7FFF), rounded)


def to_f16(x: ndarray) -> ndarray:
    """Bits of float16, rounded to nearest even."""
    return np.where(x != x, u2(0x7FFF), x.astype(np.float16).view(u2))


def from_bf16(bits: ndarray) -> ndarray:
    return (bits.astype(u4) << u4(16)).view(f4)


def from_f16(bits: ndarray) -> ndarray:
    return bits.view(np.float16).astype(f4)


def halves(x: ndarray) -> tuple[ndarray, ndarray]:
    """Lower and upper 16 bits."""
    return (x & u4(0xFFFF)).astype(u2), (x >> u4(16)).astype(u2)


def joined(low: ndarray, high: ndarray) -> ndarray:
    return low.astype(u4) | (high.astype(u4) << u4(16))


def packed_extreme(name: str, a: ndarray, b: ndarray) -> ndarray:
    """Apply a function of `arithmetic` to both bfloat16 of each."""
    function = getattr(arithmetic, name)
    pairs = zip(halves(a), halves(b))
    return joined(*(to_bf16(function(from_bf16(x), from_bf16(y))) for x, y in pairs))


def from_float(x: ndarray, kind: type) -> ndarray:
    """Integer of a float that is one: saturates; NaN is 0, or with 64 bits the top bit alone."""
    info = np.iinfo(kind)
    low, high = f8(info.min), f8(2.0 ** (info.bits - (info.min < 0)))
    inside = (x >= low) & (x < high)
    result = np.where(inside, x, 0).astype(kind)
    result = np.where(x < low, kind(info.min), np.where(x >= high, kind(info.max), result))
    top = np.array(1 << (info.bits - 1), f"u{info.bits // 8}").view(kind)
    lost = top if x.dtype == f8 or info.bits == 64 else kind(0)
    return np.where(x != x, lost, result)
