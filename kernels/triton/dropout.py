"""The dropout mask: a hash of (seed, row, column). It is computed anew wherever it is needed and never stored."""

from typing import NamedTuple

from torch import Tensor

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B9)
MUL1 = tl.constexpr(0x7FEB352D)
MUL2 = tl.constexpr(0x846CA68B)


@triton.jit
def _mix(v):
    """A bijection of uint32 words."""
    v = (v ^ (v >> 16)) * MUL1
    v = (v ^ (v >> 15)) * MUL2
    return v ^ (v >> 16)


@triton.jit
def row_keys(seed_ptr, rows):
    """Two uint32 keys (k1, k2) for each row, each of rows' shape, from the int64 at seed_ptr."""
    seed = tl.load(seed_ptr)
    lo = seed.to(tl.uint32)
    hi = (seed >> 32).to(tl.uint32)
    k1 = _mix(rows.to(tl.uint32) ^ _mix(_mix(hi ^ GOLDEN) ^ lo))
    k2 = _mix(k1 + _mix(_mix(lo ^ GOLDEN) ^ hi))
    return k1, k2


@triton.jit
def keep(k1, k2, columns, threshold):
    """bool [rows, columns], True where the element is kept. threshold: round(p · 2**32) in the bits of an int32."""
    v = k1[:, None] + (columns.to(tl.uint32) * GOLDEN)[None, :]
    v = (v ^ (v >> 16)) * MUL1
    v = ((v ^ (v >> 15)) + k2[:, None]) * MUL2
    return v >= threshold.to(tl.uint32)


class Mask(NamedTuple):
    """seed: an int64 [1] on the device. threshold: round(p · 2**32) in the bits of an int32. on: whether p > 0."""

    seed: Tensor | None = None
    threshold: int = 0
    on: bool = False


NO_MASK = Mask()


def mask_of(dropout_p: float, seed: Tensor | None) -> Mask:
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return Mask(seed, (threshold + 2**31) % 2**32 - 2**31, dropout_p > 0.0)
