"""Rounding by the definition, from rational numbers: the reference of the machine's arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

# Bits of the significand, exponent of the least subnormal number, exponent past the largest.
FORMATS = {
    "f8": (53, -1074, 1024),
    "f4": (24, -149, 128),
    "f2": (11, -24, 16),
    "bf16": (8, -133, 128),
}


def rounded(exact: Fraction, kind: str, down: bool = False) -> float:
    """Round to nearest even, or down.

    >>> rounded(Fraction(2049, 1), "f2"), rounded(Fraction(-2049, 1), "f2", down=True)
    (2048.0, -2050.0)
    """
    if not exact:
        return 0.0
    precision, lowest, end = FORMATS[kind]
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** max(exponent - precision + 1, lowest)
    multiple = exact / quantum
    found = (math.floor(multiple) if down else round(multiple)) * quantum
    largest = Fraction(2) ** end - Fraction(2) ** (end - precision)
    if found > largest:
        return float(largest) if down else math.inf
    if found < -largest:
        return -math.inf
    return float(found) if found else math.copysign(0.0, exact)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two arrays of floats have equal bits, or both NaN, everywhere.

    >>> same(np.array([0.0, np.nan]), np.array([-0.0, np.nan]))
    False
    """
    found, expected = np.asarray(found), np.asarray(expected, np.asarray(found).dtype)
    bits = f"u{found.itemsize}"
    equal = found.view(bits) == expected.view(bits)
    return bool((equal | (np.isnan(found) & np.isnan(expected))).all())
