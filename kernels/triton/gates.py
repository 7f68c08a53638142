"""Everything of size [M, R]: sums of partials, the gate on the ranks, and the gate's gradient."""

import triton
import triton.language as tl


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


@triton.jit(do_not_specialize=["M", "N", "S", "run", "steps"])
def gate_ranks(
    parts_ptr, gate_ptr, segments_ptr, xa_ptr, raw_ptr, gated_ptr, scores_ptr,
    M, N, S, run, steps, scaling, gate_row, gate_col,
    E: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """t = Σ_s parts[s] in order;  gated = γ ⊙ t;  and, where the pointer is given, raw = t and
    scores[m, e] = scaling · Σ_{r in e} t[m, r] · xa[m, r].

    Reads parts [S, M, R], gate [N, E] (any strides), segments [N+1] or None, xa [M, R] if scores are wanted.
    Writes gated and raw [M, R], scores [M, E], all contiguous, each in its own dtype.
    Work: a program owns BLOCK_M rows and all ranks, as a tile [rows, experts, ranks of one expert].
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    experts = tl.arange(0, BLOCK_E)
    within = tl.arange(0, BLOCK_J)
    valid = (rows < M)[:, None] & (experts < E)[None, :]
    each = valid[:, :, None] & (within < RANK)[None, None, :]
    at = rows.to(tl.int64)[:, None, None] * (E * RANK) + (experts[:, None] * RANK + within[None, :])[None, :, :]
    total = tl.zeros([BLOCK_M, BLOCK_E, BLOCK_J], tl.float32)
    step = M.to(tl.int64) * (E * RANK)
    for s in range(S):
        total += tl.load(parts_ptr + s * step + at, mask=each, other=0.0).to(tl.float32)

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


@triton.jit(do_not_specialize=["M", "N", "run"])
def sum_segments(
    scores_ptr, segments_ptr, dgate_ptr, M, N, run,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dgate[i, e] = Σ_{m in i} scores[m, e], in order of m.

    Reads scores [M, E] float32 once, segments [N+1] or None (runs of `run` rows). Writes dgate [N, E], contiguous.
    Work: one program an instance, looping over its rows; an empty segment writes zeros.
    """
    i = tl.program_id(0)
    if segments_ptr is None:
        first = i * run
        last = tl.minimum(first + run, M)
    else:  # unchecked on a GPU: whatever the values, no row outside [0, M) is touched
        first = tl.maximum(tl.load(segments_ptr + i), 0)
        last = tl.minimum(tl.load(segments_ptr + i + 1), M)
    experts = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for m in range(first, last, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        at = rows.to(tl.int64)[:, None] * E + experts[None, :]
        total += tl.load(scores_ptr + at, mask=(rows < last)[:, None] & (experts < E)[None, :], other=0.0)
    tl.store(dgate_ptr + i.to(tl.int64) * E + experts, tl.sum(total, axis=0), mask=experts < E)
