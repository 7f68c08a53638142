"""Everything of size [M, R]: sums of partials, the gate on the ranks, and the gate's gradient.

A small launch takes the time of its start and of its loads' way, not of its bytes: so the sum of a weight gradient's
partials rides along where `more_ptr` is given, in programs of its own behind the first `blocks`.
"""

import triton
import triton.language as tl

from .sums import sum_block, sum_in_order


@triton.jit
def _instances(rows, segments_ptr, N, run, steps):
    """The instance of each row, always in [0, N): rows // run, or the last i with segments[i] <= row by bisection."""
    if segments_ptr is None:
        found = tl.minimum(rows // run, N - 1)
    else:
        found = tl.zeros_like(rows)
        above = found + N
        for _ in range(steps):
            middle = (found + above) >> 1
            below = tl.load(segments_ptr + middle) <= rows
            above = tl.where(below, above, middle)
            found = tl.where(below, middle, found)
    return found


@triton.jit
def _gate_block(
    block, parts_ptr, gate_ptr, segments_ptr, xa_ptr, raw_ptr, gated_ptr, scores_ptr,
    M, N, S, run, steps, scaling, gate_row, gate_col,
    E: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    experts = tl.arange(0, BLOCK_E)
    within = tl.arange(0, BLOCK_J)
    valid = (rows < M)[:, None] & (experts < E)[None, :]
    each = valid[:, :, None] & (within < RANK)[None, None, :]
    at = rows.to(tl.int64)[:, None, None] * (E * RANK) + (experts[:, None] * RANK + within[None, :])[None, :, :]
    total = tl.zeros([BLOCK_M, BLOCK_E, BLOCK_J], tl.float32)
    total = sum_in_order(total, parts_ptr, S, M.to(tl.int64) * (E * RANK), at, each)

    instance = _instances(rows, segments_ptr, N, run, steps).to(tl.int64)
    gate_at = instance[:, None] * gate_row + experts[None, :] * gate_col
    gamma = scaling * tl.load(gate_ptr + gate_at, mask=valid, other=0.0).to(tl.float32)
    tl.store(gated_ptr + at, total * gamma[:, :, None], mask=each)
    if raw_ptr is not None:
        tl.store(raw_ptr + at, total, mask=each)
    if scores_ptr is not None:
        xa = tl.load(xa_ptr + at, mask=each, other=0.0).to(tl.float32)
        scores = scaling * tl.sum(total * xa, axis=2)
        tl.store(scores_ptr + rows.to(tl.int64)[:, None] * E + experts[None, :], scores, mask=valid)


@triton.jit(do_not_specialize=["M", "N", "S", "run", "steps", "G", "blocks"])
def gate_ranks(
    parts_ptr, gate_ptr, segments_ptr, xa_ptr, raw_ptr, gated_ptr, scores_ptr,
    M, N, S, run, steps, scaling, gate_row, gate_col, more_ptr, sum_ptr, size, G, blocks,
    E: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """t = Σ_s parts[s] in order;  gated = γ ⊙ t;  and, where the pointer is given, raw = t and
    scores[m, e] = scaling · Σ_{r in e} t[m, r] · xa[m, r];  and sum = Σ_g more[g] (sums.py).

    Reads parts [S, M, R], gate [N, E] (any strides), segments [N+1] or None, xa [M, R] if scores are wanted.
    Writes gated and raw [M, R], scores [M, E], all contiguous, each in its own dtype.
    Work: a program owns BLOCK_M rows and all ranks, as a tile [rows, experts, ranks of one expert].
    """
    block = tl.program_id(0)
    if block < blocks:
        _gate_block(block, parts_ptr, gate_ptr, segments_ptr, xa_ptr, raw_ptr, gated_ptr, scores_ptr,
                    M, N, S, run, steps, scaling, gate_row, gate_col, E, RANK, BLOCK_M, BLOCK_E, BLOCK_J)  # fmt: skip
    elif more_ptr is not None:
        sum_block(block - blocks, more_ptr, sum_ptr, size, G, BLOCK)


@triton.jit
def _scores(scores_ptr, first, last, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    rows, experts = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    at = rows.to(tl.int64)[:, None] * E + experts[None, :]
    return tl.load(scores_ptr + at, mask=(rows < last)[:, None] & (experts < E)[None, :], other=0.0)


@triton.jit
def _segment_block(
    i, scores_ptr, segments_ptr, dgate_ptr, M, run, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    if segments_ptr is None:
        first = i * run
        last = tl.minimum(first + run, M)
    else:  # unchecked on a GPU: whatever the values, no row outside [0, M) is touched
        first = tl.maximum(tl.load(segments_ptr + i), 0)
        last = tl.minimum(tl.load(segments_ptr + i + 1), M)
    experts = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for m in range(first, last, BLOCK_M * 4):  # four loads on their way at once
        a = _scores(scores_ptr, m, last, E, BLOCK_M, BLOCK_E)
        b = _scores(scores_ptr, m + BLOCK_M, last, E, BLOCK_M, BLOCK_E)
        c = _scores(scores_ptr, m + BLOCK_M * 2, last, E, BLOCK_M, BLOCK_E)
        d = _scores(scores_ptr, m + BLOCK_M * 3, last, E, BLOCK_M, BLOCK_E)
        total = total + a + b + c + d
    tl.store(dgate_ptr + i.to(tl.int64) * E + experts, tl.sum(total, axis=0), mask=experts < E)


@triton.jit(do_not_specialize=["M", "run", "G", "blocks"])
def sum_segments(
    scores_ptr, segments_ptr, dgate_ptr, M, run, more_ptr, sum_ptr, size, G, blocks,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate[i, e] = Σ_{m in i} scores[m, e], in order of m; and sum = Σ_g more[g] (sums.py) where more is given.

    Reads scores [M, E] float32 once, segments [N+1] or None (runs of `run` rows). Writes dgate [N, E], contiguous.
    Work: one program an instance, looping over its rows; an empty segment writes zeros.
    """
    block = tl.program_id(0)
    if block < blocks:
        _segment_block(block, scores_ptr, segments_ptr, dgate_ptr, M, run, E, BLOCK_M, BLOCK_E)
    elif more_ptr is not None:
        sum_block(block - blocks, more_ptr, sum_ptr, size, G, BLOCK)
