"""Sums of partial sums, in a fixed order: what a split matrix product leaves to be done."""

import triton
import triton.language as tl


@triton.jit
def _part(parts_ptr, s, S, step, at, mask):
    there = (at * 0 + s) < S  # a tensor: the interpreter makes integers of a mask and a scalar
    return tl.load(parts_ptr + s * step + at, mask=mask & there, other=0.0).to(tl.float32)


@triton.jit
def sum_in_order(total, parts_ptr, S, step, at, mask):
    """total + parts[0] + parts[1] + … + parts[S - 1], one after another; part s begins s · step behind the first.

    Four loads are on their way at once: one by one, each would wait for the sum before it.
    """
    for s in range(0, S, 4):
        a, b = _part(parts_ptr, s, S, step, at, mask), _part(parts_ptr, s + 1, S, step, at, mask)
        c, d = _part(parts_ptr, s + 2, S, step, at, mask), _part(parts_ptr, s + 3, S, step, at, mask)
        total = total + a + b + c + d
    return total


@triton.jit
def sum_block(block, parts_ptr, sum_ptr, size, G, BLOCK: tl.constexpr):
    """BLOCK elements of sum = Σ_g parts[g], in order: parts [G, size] float32, sum [size] in its own dtype."""
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = sum_in_order(tl.zeros([BLOCK], tl.float32), parts_ptr, G, tl.cast(size, tl.int64), at, at < size)
    tl.store(sum_ptr + at, total, mask=at < size)


@triton.jit(do_not_specialize=["G"])
def sum_parts(parts_ptr, sum_ptr, size, G, BLOCK: tl.constexpr):
    """sum = Σ_g parts[g], in order.

    Reads parts [G, size] float32 once. Writes sum [size] in its own dtype. Work: a program owns BLOCK elements.
    """
    sum_block(tl.program_id(0), parts_ptr, sum_ptr, size, G, BLOCK)
