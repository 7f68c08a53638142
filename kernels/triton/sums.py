"""Sums of partial sums, in a fixed order: what a split matrix product leaves to be done."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import triton
import triton.language as tl

from .config import ceil_div, pow2
from .launch import Launch, begin

BLOCK = 256  # elements of a sum that a program takes


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


@triton.jit
def _scores(
    scores_ptr, first, last, E: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    rows, experts, within = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_J)
    at = rows.to(tl.int64)[:, None, None] * (E * RANK) + (experts[:, None] * RANK + within[None, :])[None, :, :]
    each = (experts < E)[:, None] & (within < RANK)[None, :]
    return tl.load(scores_ptr + at, mask=(rows < last)[:, None, None] & each[None, :, :], other=0.0)


@triton.jit
def _segment_block(
    i, scores_ptr, segments_ptr, dgate_ptr, M, run, E: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    if segments_ptr is None:
        first = i * run
        last = tl.minimum(first + run, M)
    else:  # unchecked on a GPU: whatever the values, no row outside [0, M) is touched
        first = tl.maximum(tl.load(segments_ptr + i), 0)
        last = tl.minimum(tl.load(segments_ptr + i + 1), M)
    experts = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_M, BLOCK_E, BLOCK_J], tl.float32)
    for m in range(first, last, BLOCK_M * 4):  # four loads on their way at once
        a = _scores(scores_ptr, m, last, E, RANK, BLOCK_M, BLOCK_E, BLOCK_J)
        b = _scores(scores_ptr, m + BLOCK_M, last, E, RANK, BLOCK_M, BLOCK_E, BLOCK_J)
        c = _scores(scores_ptr, m + BLOCK_M * 2, last, E, RANK, BLOCK_M, BLOCK_E, BLOCK_J)
        d = _scores(scores_ptr, m + BLOCK_M * 3, last, E, RANK, BLOCK_M, BLOCK_E, BLOCK_J)
        total = total + a + b + c + d
    tl.store(dgate_ptr + i.to(tl.int64) * E + experts, tl.sum(tl.sum(total, axis=2), axis=0), mask=experts < E)


@triton.jit
def _row_block(
    block, scores_ptr, dgate_ptr, M, E: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    scores = _scores(scores_ptr, block * BLOCK_M, M, E, RANK, BLOCK_M, BLOCK_E, BLOCK_J)
    rows, experts = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    at = rows.to(tl.int64)[:, None] * E + experts[None, :]
    tl.store(dgate_ptr + at, tl.sum(scores, axis=2), mask=(rows < M)[:, None] & (experts < E)[None, :])


@triton.jit(do_not_specialize=["M", "run", "blocks", "more_parts", "between", "also_parts"])
def sums(
    scores_ptr, segments_ptr, dgate_ptr, M, run, blocks,
    more_ptr, more_sum_ptr, more_size, more_parts, between, also_ptr, also_sum_ptr, also_size, also_parts,
    E: tl.constexpr, RANK: tl.constexpr, EACH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dgate[i, e] = Σ_{m in i} Σ_j scores[m, e, j], more_sum = Σ_g more[g] and also_sum = Σ_g also[g], each in order; a
    pointer that is None leaves its sum out.

    Reads scores [M, E, RANK] float32, segments [N+1] or None (runs of `run` rows), more and also [parts, size] float32,
    each once. Writes dgate [N, E], contiguous, and the sums [size] in their own dtypes.
    Work: one program an instance, looping over its rows (an empty segment writes zeros), or one each BLOCK_M rows where
    EACH of them is an instance; then one each BLOCK elements of a sum: more's until the program `between`.
    """
    begin(PDL)
    block = tl.program_id(0)
    if block < blocks:
        if scores_ptr is not None and EACH:
            _row_block(block, scores_ptr, dgate_ptr, M, E, RANK, BLOCK_M, BLOCK_E, BLOCK_J)
        elif scores_ptr is not None:
            _segment_block(block, scores_ptr, segments_ptr, dgate_ptr, M, run, E, RANK, BLOCK_M, BLOCK_E, BLOCK_J)
    elif block < between:
        if more_ptr is not None:
            sum_block(block - blocks, more_ptr, more_sum_ptr, more_size, more_parts, BLOCK)
    elif also_ptr is not None:
        sum_block(block - between, also_ptr, also_sum_ptr, also_size, also_parts, BLOCK)


Partial = tuple[Tensor, Tensor]  # the partial sums [G, …], and the sum that they are to be added into


def along(name: str, partial: Partial | None) -> tuple[dict[str, Any], int]:
    """A kernel's arguments for a sum that rides along, and the programs it takes: 0 where there is none to be done, or
    where the only partial sum is the sum."""
    if partial is None or partial[0] is partial[1]:
        return {f"{name}_ptr": None, f"{name}_sum_ptr": None, f"{name}_size": 0, f"{name}_parts": 0}, 0
    parts, out = partial
    args = {f"{name}_ptr": parts, f"{name}_sum_ptr": out, f"{name}_size": out.numel(), f"{name}_parts": len(parts)}
    return args, ceil_div(out.numel(), BLOCK)


def sums_launch(
    scores: Tensor | None, segments: Tensor | None, dgate: Tensor | None, more: Partial | None = None,
    also: Partial | None = None,
) -> list[Launch]:  # fmt: skip
    """One launch, or none where nothing is to be added up. scores: what dgate is to be summed of, if anything: [M, E],
    or [M, R], a number for each rank."""
    if scores is None or dgate is None:
        scores, segments, dgate, M, blocks, (N, E), rank = None, None, None, 0, 0, (1, 1), 1
    else:
        (M, R), (N, E) = scores.shape, dgate.shape
        blocks, rank = N, R // E
    each = segments is None and N == M
    block_e, block_j = pow2(E, 1, 256), pow2(rank, 1, 256)
    block_m = pow2(ceil_div(M, N), 8, min(256, 4096 // (block_e * block_j)))  # short chains of additions
    if each:
        block_m = max(1024 // (block_e * block_j), 1)
        blocks = ceil_div(M, block_m)
    (more_args, first), (also_args, second) = along("more", more), along("also", also)
    if blocks + first + second == 0:
        return []
    args = {
        "scores_ptr": scores, "segments_ptr": segments, "dgate_ptr": dgate, "M": M, "run": max(M // N, 1),
        "blocks": blocks, **more_args, "between": blocks + first, **also_args, "E": E, "RANK": rank,
        "EACH": each, "BLOCK_M": block_m, "BLOCK_E": block_e, "BLOCK_J": block_j, "BLOCK": BLOCK,
    }  # fmt: skip
    return [Launch(sums, (blocks + first + second,), args)]
