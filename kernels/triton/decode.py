"""A few rows at inference, in one launch: y = h Bᵀ + bias + base, and x Wᵀ too where the weight is given."""

from __future__ import annotations

import os

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import config
from .config import Tile, ceil_div, pow2
from .gates import gammas
from .launch import Device, Launch, begin
from .tiles import accumulate

ROWS = 64  # more rows than these fill the GPU by the ordinary launches
BLOCK_M = 16  # rows that a program takes, and the most that are multiplied by the weight in the same launch
BYTES = 2**20  # of x and A that every program may read: some 10 µs of a multiprocessor, or three launches


@triton.jit(do_not_specialize=["M", "N", "run", "width"])
def decode(
    x_ptr, weight_ptr, bias_ptr, base_ptr, a_ptr, b_ptr, gate_ptr, segments_ptr, y_ptr, xa_ptr,
    M, N, D_IN, D_OUT, run, width, scaling,
    x_row, x_col, w_row, w_col, base_row, base_col, a_row, a_col, b_row, b_col, gate_row, gate_col,
    R: tl.constexpr, RANK: tl.constexpr, DOT: tl.constexpr, NARROW: tl.constexpr, BASE_DOT: tl.constexpr,
    PIECES: tl.constexpr, PRECISION: tl.constexpr, BASE_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """xa = x Aᵀ;  y = (γ ⊙ xa) Bᵀ + bias + base + x Wᵀ; a pointer that is None adds nothing.

    Reads weight [D_OUT, D_IN], base [M, D_OUT] and B [D_OUT, R] once, x [M, D_IN] once per block of columns, and
    A [R, D_IN] in every program: from L2, after the first. All of any strides. Writes y and xa, contiguous.
    Work: program (c, i) owns BLOCK_N columns and BLOCK_M rows, and makes xa of its rows for itself: programs that
    waited for one another would need a counter that outlives the launch. The first column block stores xa.
    """
    begin(PDL)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks, ks = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    inside, row_ok, rank_ok = (columns < D_OUT)[None, :], (rows < M)[:, None], ranks < R
    at, wide, thin = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :], ranks.to(tl.int64)[None, :]
    xa = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D_IN, BLOCK_K):
        k_ok = k + ks < D_IN
        ats = (k + ks).to(tl.int64)
        x = tl.load(x_ptr + at * x_row + ats[None, :] * x_col, mask=row_ok & k_ok[None, :], other=0.0)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + ats[:, None] * w_col + wide * w_row, mask=k_ok[:, None] & inside, other=0.0)
            y = tl.dot(x.to(BASE_DOT), w.to(BASE_DOT), y, input_precision=BASE_PRECISION)
        a = tl.load(a_ptr + ats[:, None] * a_col + thin * a_row, mask=k_ok[:, None] & rank_ok[None, :], other=0.0)
        xa = accumulate(x.to(DOT), a, xa, PIECES, PRECISION)

    if tl.program_id(0) == 0:
        tl.store(xa_ptr + at * R + ranks[None, :], xa, mask=row_ok & rank_ok[None, :])
    h = xa * gammas(rows, ranks, gate_ptr, segments_ptr, M, N, run, width, scaling, gate_row, gate_col, R, RANK)
    b = tl.load(b_ptr + thin.trans() * b_col + wide * b_row, mask=rank_ok[:, None] & inside, other=0.0)
    y = tl.dot(h.to(NARROW), b.to(NARROW), y, input_precision=PRECISION)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < D_OUT, other=0.0).to(tl.float32)[None, :]
    if base_ptr is not None:
        y += tl.load(base_ptr + at * base_row + wide * base_col, mask=row_ok & inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at * D_OUT + wide, y, mask=row_ok & inside)


def decodes(x: Tensor, A: Tensor, dropout_p: float) -> bool:
    """Whether one launch does the update: few rows, no dropout, x and A small enough for every program to read."""
    if not 0 < len(x) <= ROWS or dropout_p > 0.0:
        return False
    each = min(len(x), BLOCK_M) * x.element_size() + len(A) * A.element_size()
    return x.shape[1] * each <= BYTES and os.environ.get("ILORA_STRATEGY", "auto") in ("", "auto")


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether that launch multiplies by the weight too: one block of rows, and a weight that can be read in runs."""
    return len(x) <= BLOCK_M and 1 in weight.stride()


def tile_of(device: Device, x: Tensor, d_out: int, A: Tensor, fused: bool) -> tuple[Tile, int]:
    """(the tile of y, columns of x a step): narrow tiles where wide ones would leave multiprocessors idle, and deep
    steps where a program has a multiprocessor to itself and must keep the memory busy alone."""
    size, small, r = x.element_size(), A.element_size(), _ranks(A, fused)
    n = 64 if not fused else 16 if d_out <= 16 * device.sms else 32
    deep = fused and ceil_div(d_out, n) <= device.sms and r <= 32 and config.aligned(x) and not device.hip
    k = 128 if size == small == 2 and r <= 64 else 64 if size == 2 and r * small <= 256 else 32
    k *= 2 if deep else 1
    stage = k * (size * (BLOCK_M + (n if fused else 0)) + small * r)
    stages = config._stages(device, stage, config.DEEP_PROGRAM if deep else config.TWO_PROGRAMS)
    return Tile(BLOCK_M, n, 4, stages if deep else min(stages, 3)), k


def plan(
    device: Device, x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, A: Tensor, B: Tensor,
    gate: Tensor, segments: Tensor | None, scaling: float, dropout_p: float,
) -> tuple[Launch, Tensor, Tensor, bool] | None:  # fmt: skip
    """(the launch, y, xa, whether y has x Wᵀ in it), or None where the ordinary launches are to run."""
    if not decodes(x, A, dropout_p):
        return None
    (M, D), (D_OUT, R), (N, E) = x.shape, B.shape, gate.shape
    weight = weight if (whole := weight is None or fuses(x, weight)) else None
    dots, (tile, step) = config.dots(device, x.dtype, A.dtype), tile_of(device, x, D_OUT, A, weight is not None)
    y, xa = x.new_empty(M, D_OUT), x.new_empty(M, R, dtype=torch.promote_types(x.dtype, A.dtype))
    args = {
        "x_ptr": x, "weight_ptr": weight, "bias_ptr": bias, "base_ptr": base, "a_ptr": A, "b_ptr": B,
        "gate_ptr": gate, "segments_ptr": segments, "y_ptr": y, "xa_ptr": xa,
        "M": M, "N": N, "D_IN": D, "D_OUT": D_OUT,
        "run": max(M // N, 1), "width": config.search_width(N), "scaling": scaling,
        **_strides("x", x), **_strides("w", weight), **_strides("base", base), **_strides("a", A), **_strides("b", B),
        **_strides("gate", gate), "R": R, "RANK": R // E, "DOT": dots.wide, "NARROW": dots.narrow,
        "BASE_DOT": tl.float32 if device.interpret else config.TYPES[x.dtype], "PIECES": dots.pieces,
        "PRECISION": dots.precision, "BASE_PRECISION": config.dots(device, x.dtype, x.dtype).precision,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": step, "BLOCK_R": _ranks(A, whole and weight is not None),
    }  # fmt: skip
    grid = ceil_div(D_OUT, tile.n), ceil_div(M, tile.m)
    return Launch(decode, grid, args, tile.warps, tile.stages, device.pdl), y, xa, whole


def _ranks(A: Tensor, fused: bool) -> int:
    """The block of ranks: beside x Wᵀ, where both products take x, 16 of them would be a tile that one warp computes,
    and Triton then has all four warps compute the whole of both."""
    return pow2(len(A), 32 if fused else 16, 256)


def _strides(name: str, t: Tensor | None) -> dict[str, int]:
    row, column = (0, 0) if t is None else t.stride()
    return {f"{name}_row": row, f"{name}_col": column}
