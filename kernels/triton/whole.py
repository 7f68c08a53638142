"""The whole layer in one GEMM: ranks are summed in the loop of the frozen product (or were before, where a mask stands
between x and A), gated, and multiplied onto it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

import triton
import triton.language as tl

from .config import Dots, GemmTile, ceil_div, gemm_programs, pow2, unit
from .dropout import Mask, keep, row_keys
from .gates import Gate, gammas
from .gemm import corner, described, operand, quarters
from .launch import Device, Launch, begin
from .sums import sum_in_order


@triton.jit
def _low(
    low_ptr, column, D, low_col, low_rank,
    R: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """low [r, n] for WIDTH columns from the given one."""
    columns, ranks = column + tl.arange(0, WIDTH), tl.arange(0, BLOCK_R)
    at = columns.to(tl.int64)[None, :] * (low_col // UNIT * UNIT) + ranks.to(tl.int64)[:, None] * low_rank
    return tl.load(low_ptr + at, mask=(columns < D)[None, :] & (ranks < R)[:, None], other=0.0)


@triton.jit
def _keep_ranks(
    ranks_of, gamma, rows, M, scaling, xa_ptr, raw_ptr, gated_ptr, h_ptr, scores_ptr,
    R: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Writes what of the ranks is wanted of the tile at the left; see `whole`."""
    ranks = tl.arange(0, BLOCK_R)
    at = rows.to(tl.int64)[:, None] * R + ranks[None, :]
    inside = (rows < M)[:, None] & (ranks < R)[None, :]
    if raw_ptr is not None:
        tl.store(raw_ptr + at, ranks_of, mask=inside)
    if gated_ptr is not None:
        tl.store(gated_ptr + at, ranks_of * gamma, mask=inside)
    if xa_ptr is not None:
        xa = tl.load(xa_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(h_ptr + at, xa * gamma, mask=inside)
        tl.store(scores_ptr + at, scaling * ranks_of * xa, mask=inside)


@triton.jit(do_not_specialize=["M", "N", "S", "run", "width", "threshold"])
def whole(
    x, w, a, y, parts_ptr, low_ptr, bias_ptr, gate_ptr, segments_ptr, seed_ptr,
    xa_ptr, raw_ptr, gated_ptr, h_ptr, scores_ptr,
    M, D, K, N, S, run, width, threshold, scaling, low_col, low_rank, gate_row, gate_col,
    R: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr, DROPOUT: tl.constexpr, TURNED: tl.constexpr,
    ASIDE: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """t[m, r] = Σ_k x[m, k] · a[r, k], or Σ_s parts[s, m, r] where parts [S, M, R] are given;
    y[m, n] = Σ_k x[m, k] · w[n, k] + bias[n] + keep[m, n] · Σ_r γ[m, r] · t[m, r] · low[n, r].

    x [M, K], w [D, K], a [R, K] (w, a transposed unless TURNED, ASIDE) and y [M, D]: tensor descriptors, of blocks
    [BLOCK_M, BLOCK_K], w's and a's, [BLOCK_M, BLOCK_N / 4]; low [D, R] (any strides); bias [D]; γ as in gates.py.
    Writes y once, and where the pointer is given raw = t, gated = γ ⊙ t, h = γ ⊙ xa, and scores = scaling · t ⊙ xa, all
    [M, R] contiguous: sums.py makes dgate of the scores.
    Work: a program takes every num_programs-th tile of y. Every tile sums t for itself, by one more product on the x
    that it has anyway, or in order of s; those at the left write what is of size [M, R].
    """
    begin(PDL)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(D, BLOCK_N), tl.num_programs(0)):
        row, column = corner(tile, M, D, GROUP, BLOCK_M, BLOCK_N)
        rows, columns, ranks = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
        gamma = gammas(rows, ranks, gate_ptr, segments_ptr, M, N, run, width, scaling, gate_row, gate_col, R, RANK)
        if not DROPOUT:  # arrives meanwhile
            low = _low(low_ptr, column, D, low_col, low_rank, R, UNIT, BLOCK_N, BLOCK_R)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        if parts_ptr is not None:
            at = rows.to(tl.int64)[:, None] * R + ranks[None, :]
            inside = (rows < M)[:, None] & (ranks < R)[None, :]
            total = sum_in_order(total, parts_ptr, S, M.to(tl.int64) * R, at, inside)
        for k in range(0, K, BLOCK_K):
            left = x.load([row, k]).to(DOT)
            right = w.load([column, k]).T if TURNED else w.load([k, column])
            if parts_ptr is None:  # beside the others, to be waited for together
                narrow = a.load([0, k]).T if ASIDE else a.load([k, 0])
            acc = tl.dot(left, right.to(DOT), acc)
            if parts_ptr is None:
                total = tl.dot(left, narrow.to(DOT), total)
        if column == 0:
            _keep_ranks(total, gamma, rows, M, scaling, xa_ptr, raw_ptr, gated_ptr, h_ptr, scores_ptr, R, BLOCK_R)
        gated = (total * gamma).to(DOT)
        if not DROPOUT:
            acc = tl.dot(gated, low.to(DOT), acc)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        QUARTER: tl.constexpr = BLOCK_N // 4
        parts = quarters(acc)
        if DROPOUT:
            k1, k2 = row_keys(seed_ptr, rows)
        for q in tl.static_range(4):
            part = parts[q]
            start = column + q * QUARTER
            if DROPOUT:
                few = _low(low_ptr, start, D, low_col, low_rank, R, UNIT, QUARTER, BLOCK_R)
                update = tl.dot(gated, few.to(DOT))
                part += tl.where(keep(k1, k2, start + tl.arange(0, QUARTER), threshold), update, 0.0)
            y.store([row, start], part.to(y.dtype))


class Ranks(NamedTuple):
    """What is to be written of the ranks: see `whole`. xa, h and scores go together."""

    raw: Tensor | None = None
    gated: Tensor | None = None
    xa: Tensor | None = None
    h: Tensor | None = None
    scores: Tensor | None = None


def whole_launch(
    device: Device, tile: GemmTile, dot: Dots, x: Tensor, weight: Tensor, source: Tensor, y: Tensor, low: Tensor,
    gate: Gate, ranks: Ranks, mask: Mask, bias: Tensor | None,
) -> Launch:  # fmt: skip
    """weight [D, K]; source: a [R, K], or parts [S, M, R] or [1, M, R] float32; low [D, R]; mask: of the update within
    y."""
    (M, D), (K, R), E = y.shape, (x.shape[1], low.shape[1]), gate.gate.shape[1]
    r, parts = pow2(R, 16, 32), source if source.dim() == 3 else None
    w, turned = operand(weight, tile.n, tile.k)
    narrow, aside = operand(source, r, tile.k) if parts is None else (None, False)
    args: dict[str, Any] = {
        "x": described(x, [tile.m, tile.k]), "w": w, "a": narrow, "y": described(y, [tile.m, tile.n // 4]),
        "parts_ptr": parts, "S": 0 if parts is None else len(parts),
        "low_ptr": low, "bias_ptr": bias, "seed_ptr": mask.seed, **gate.arguments(),
        **{f"{name}_ptr": tensor for name, tensor in ranks._asdict().items()},
        "D": D, "K": K, "threshold": mask.threshold, "low_col": low.stride(0), "low_rank": low.stride(1),
        "R": R, "RANK": R // E, "UNIT": unit(low.stride(0)), "DROPOUT": mask.on, "TURNED": turned, "ASIDE": aside,
        "DOT": dot.wide, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": r, "GROUP": tile.group,
    }  # fmt: skip
    programs = gemm_programs(device, tile, R, "whole", ceil_div(M, tile.m) * ceil_div(D, tile.n))
    return Launch(whole, (programs,), args, tile.warps, tile.stages)
