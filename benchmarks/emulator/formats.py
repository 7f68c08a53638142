"""Numbers in PTX's registers. A register is a uint64 for each thread of a block, whatever it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
U = np.uint64
BITS = {f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)} | {"pred": 1}


def low_bits(a: Array, bits: int) -> Array:
    return a if bits >= 64 else a & U((1 << bits) - 1)


def signed(a: Array, bits: int) -> Array:
    """As int64, with the sign of a number of so many bits."""
    a = low_bits(a, bits).astype(U)
    if bits == 64:
        return a.view(np.int64)
    sign = np.int64(1 << (bits - 1))
    return (a.astype(np.int64) ^ sign) - sign


def to_float32(a: Array) -> Array:
    return a.astype(np.uint32).view(np.float32)


def from_float32(a: Array) -> Array:
    return np.asarray(a, np.float32).view(np.uint32).astype(U)


def bfloat16_to_float32(a: Array) -> Array:
    return (a.astype(np.uint32) << 16).view(np.float32)


def bfloat16_from_float32(a: Array) -> Array:
    """Rounded to the nearest, ties to even."""
    bits = from_float32(a)
    rounded = (bits + ((bits >> U(16)) & U(1)) + U(0x7FFF)) >> U(16)
    return np.where(np.isnan(a), U(0x7FFF), rounded & U(0xFFFF))


def float16_to_float32(a: Array) -> Array:
    return a.astype(np.uint16).view(np.float16).astype(np.float32)


def float16_from_float32(a: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(a, np.float32).astype(np.float16).view(np.uint16).astype(U)


def tf32_to_float32(a: Array) -> Array:
    """The tensor cores look at the upper 19 bits."""
    return to_float32(a & a.dtype.type(0xFFFFE000))


class Element(NamedTuple):
    """An element of a matrix that tensor cores multiply: its bytes, and how it is read."""

    size: int
    read: Callable[[Array], Array]


ELEMENTS = {
    "bf16": Element(2, bfloat16_to_float32), "f16": Element(2, float16_to_float32), "tf32": Element(4, tf32_to_float32)
}  # fmt: skip
