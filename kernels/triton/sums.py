"""Sums in a fixed order: of the partial sums that split matrix products leave, and of the rows of an instance.

A small launch costs the time to start and to wait for its loads, whatever its bytes. So one launch computes several
sums, and each program has four loads under way at once.
"""

from typing import Any

from torch import Tensor

import triton
import triton.language as tl

from .launch import Plan, wait_for_previous
from .tiles import ceil_div, pow2

BLOCK = 256  # elements of a sum that a program computes


@triton.jit
def _part(parts_ptr, at, end, mask):
    return tl.load(parts_ptr + at, mask=mask & (at < end), other=0.0).to(tl.float32)


@triton.jit
def sum_in_order(total, parts_ptr, S, step, at, end, mask):
    """total + parts[at] + parts[at + step] + … in this order: S terms, where elements from `end` on count as 0."""
    for s in range(0, S, 4):
        first = at + s * step
        a, b = _part(parts_ptr, first, end, mask), _part(parts_ptr, first + step, end, mask)
        c, d = _part(parts_ptr, first + 2 * step, end, mask), _part(parts_ptr, first + 3 * step, end, mask)
        total = total + a + b + c + d
    return total


@triton.jit
def sum_block(block, parts_ptr, sum_ptr, size, G, BLOCK: tl.constexpr):
    """BLOCK elements of sum = Σ_g parts[g], in order. parts [G, size] float32, sum [size] in its own dtype."""
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    step = tl.cast(size, tl.int64)
    total = sum_in_order(tl.zeros([BLOCK], tl.float32), parts_ptr, G, step, at, G * step, at < size)
    tl.store(sum_ptr + at, total, mask=at < size)


@triton.jit
def _dgate_block(
    block, scores_ptr, segments_ptr, dgate_ptr, M, run, E: tl.constexpr, RANK: tl.constexpr, EACH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """dgate of the block-th instance, zeros if it has no rows; or of BLOCK_M rows, if EACH row is an instance."""
    if EACH:
        first, last = block * BLOCK_M, M
    elif segments_ptr is None:
        first, last = block * run, tl.minimum(block * run + run, M)
    else:  # nothing checks them on a GPU: whatever their values, only rows in [0, M) are read
        first = tl.maximum(tl.load(segments_ptr + block), 0)
        last = tl.maximum(tl.minimum(tl.load(segments_ptr + block + 1), M), first)
    rows, experts, within = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_J)
    at = rows.to(tl.int64)[:, None, None] * (E * RANK) + (experts[:, None] * RANK + within[None, :])[None, :, :]
    each = ((experts < E)[:, None] & (within < RANK)[None, :])[None, :, :]
    end = last.to(tl.int64) * (E * RANK)
    if EACH:
        dgate = tl.sum(tl.load(scores_ptr + at, mask=each & (at < end), other=0.0), axis=2)
        out = rows.to(tl.int64)[:, None] * E + experts[None, :]
        tl.store(dgate_ptr + out, dgate, mask=(rows < M)[:, None] & (experts < E)[None, :])
    else:
        total = tl.zeros([BLOCK_M, BLOCK_E, BLOCK_J], tl.float32)
        step = tl.cast(BLOCK_M * E * RANK, tl.int64)
        total = sum_in_order(total, scores_ptr, tl.cdiv(last - first, BLOCK_M), step, at, end, each)
        dgate = tl.sum(tl.sum(total, axis=2), axis=0)
        tl.store(dgate_ptr + block.to(tl.int64) * E + experts, dgate, mask=experts < E)


@triton.jit(do_not_specialize=["M", "run", "blocks", "first_parts", "first_end", "second_parts"])
def sums(
    scores_ptr, segments_ptr, dgate_ptr, M, run, blocks,
    first_ptr, first_sum_ptr, first_size, first_parts, first_end,
    second_ptr, second_sum_ptr, second_size, second_parts,
    E: tl.constexpr, RANK: tl.constexpr, EACH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """dgate[i, e] = Σ_{m in i} Σ_j scores[m, e, j], first_sum = Σ_g first[g] and second_sum = Σ_g second[g], each in
    order. A sum whose pointer is None is left out.

    Reads scores [M, E, RANK] float32, segments [N+1] or None (runs of `run` rows), first and second [parts, size]
    float32, each once. Writes dgate [N, E], contiguous, and the two sums [size] in their own dtypes.
    Work: the first `blocks` programs compute dgate, one for each instance, or one for each BLOCK_M rows if EACH row is
    an instance. The programs up to `first_end` compute BLOCK elements of the first sum each, the others of the second.
    """
    wait_for_previous(EARLY)
    block = tl.program_id(0)
    if block < blocks:
        if scores_ptr is not None:
            _dgate_block(block, scores_ptr, segments_ptr, dgate_ptr, M, run, E, RANK, EACH, BLOCK_M, BLOCK_E, BLOCK_J)
    elif block < first_end:
        if first_ptr is not None:
            sum_block(block - blocks, first_ptr, first_sum_ptr, first_size, first_parts, BLOCK)
    elif second_ptr is not None:
        sum_block(block - first_end, second_ptr, second_sum_ptr, second_size, second_parts, BLOCK)


Partial = tuple[Tensor, Tensor]  # the partial sums [G, …] and their sum; or the same tensor twice: nothing to add up


def _sum_arguments(name: str, partial: Partial | None) -> tuple[dict[str, Any], int]:
    """The arguments of a `sum_block`, and how many programs the sum takes."""
    if partial is None or partial[0] is partial[1]:
        return {f"{name}_ptr": None, f"{name}_sum_ptr": None, f"{name}_size": 0, f"{name}_parts": 0}, 0
    parts, out = partial
    args = {f"{name}_ptr": parts, f"{name}_sum_ptr": out, f"{name}_size": out.numel(), f"{name}_parts": len(parts)}
    return args, ceil_div(out.numel(), BLOCK)


def add_sums(
    plan: Plan, first: Partial | None, second: Partial | None = None, scores: Tensor | None = None,
    segments: Tensor | None = None, dgate: Tensor | None = None,
) -> None:  # fmt: skip
    """One launch, or none if there is nothing to add up. scores: the terms of dgate [N, E], one for each row and expert
    [M, E] or for each row and rank [M, R]; or dgate itself."""
    if scores is None or dgate is None or scores is dgate:
        scores, segments, dgate, M, N, E, rank, each, blocks = None, None, None, 0, 1, 1, 1, False, 0
    else:
        M, (N, E), rank = len(scores), dgate.shape, scores.shape[1] // dgate.shape[1]
        each, blocks = segments is None and N == M, N
    block_e, block_j = pow2(E, 1, 256), pow2(rank, 1, 256)
    block_m = pow2(ceil_div(M, N), 8, min(256, 4096 // (block_e * block_j)))  # short chains of additions
    if each:
        block_m = max(1024 // (block_e * block_j), 1)
        blocks = ceil_div(M, block_m)
    (first_args, first_programs), (second_args, second_programs) = (
        _sum_arguments(name, partial) for name, partial in (("first", first), ("second", second))
    )
    first_end = blocks + first_programs
    args = {
        "scores_ptr": scores, "segments_ptr": segments, "dgate_ptr": dgate, "M": M, "run": max(M // N, 1),
        "blocks": blocks, **first_args, "first_end": first_end, **second_args, "E": E, "RANK": rank,
        "EACH": each, "BLOCK_M": block_m, "BLOCK_E": block_e, "BLOCK_J": block_j, "BLOCK": BLOCK,
    }  # fmt: skip
    if first_end + second_programs:
        plan.launch(sums, (first_end + second_programs,), args)
