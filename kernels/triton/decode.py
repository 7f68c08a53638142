"""A few rows without dropout in one launch: y = h Bᵀ + bias + base, and x Wᵀ too where the weight is given."""

from torch import Tensor

import triton
import triton.language as tl

from .device import TYPES, Device, dots
from .gates import Gate, gammas, store_gated
from .launch import Plan, wait_for_previous
from .shrink import accumulate
from .tiles import TWO_PROGRAMS, Tile, aligned, ceil_div, pow2, stages_within, strides

ROWS = 64  # the ordinary launches fill the GPU with more rows than these
BLOCK_M = 16  # rows of a program, and the most rows that are multiplied by the weight in the same launch
BYTES = 2**20  # of x and A that every program may read: about 10 µs of a multiprocessor, or three launches
DEEP_PROGRAM = 176 * 1024  # bytes of shared memory for a program that has a multiprocessor to itself


@triton.jit(do_not_specialize=["M", "N", "run", "width"])
def decode(
    x_ptr, weight_ptr, bias_ptr, base_ptr, a_ptr, b_ptr, gate_ptr, segments_ptr, y_ptr, xa_ptr, h_ptr,
    M, N, D_IN, D_OUT, run, width, scaling,
    x_row, x_col, w_row, w_col, base_row, base_col, a_row, a_col, b_row, b_col, gate_row, gate_col,
    R: tl.constexpr, RANK: tl.constexpr, DOT: tl.constexpr, NARROW: tl.constexpr, BASE_DOT: tl.constexpr,
    PIECES: tl.constexpr, PRECISION: tl.constexpr, BASE_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """xa = x Aᵀ and y = (γ ⊙ xa) Bᵀ + bias + base + x Wᵀ; a pointer that is None adds nothing.

    Reads weight [D_OUT, D_IN], base [M, D_OUT] and B [D_OUT, R] once, x [M, D_IN] once per block of columns, and
    A [R, D_IN] in every program, after the first from L2. All may have any strides. Writes y, xa and h = γ ⊙ xa,
    contiguous.
    Work: program (c, i) owns BLOCK_N columns and BLOCK_M rows. It computes xa of its rows for itself, since waiting for
    another program would need a counter that outlives the launch. The programs of the first columns store xa and h.
    """
    wait_for_previous(EARLY)
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

    gamma = gammas(rows, ranks, gate_ptr, segments_ptr, M, N, run, width, scaling, gate_row, gate_col, R, RANK)
    if tl.program_id(0) == 0:
        store_gated(xa, gamma, rows, M, scaling, xa_ptr, h_ptr, None, None, R, BLOCK_R)
    h = xa * gamma
    b = tl.load(b_ptr + thin.trans() * b_col + wide * b_row, mask=rank_ok[:, None] & inside, other=0.0)
    y = tl.dot(h.to(NARROW), b.to(NARROW), y, input_precision=PRECISION)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < D_OUT, other=0.0).to(tl.float32)[None, :]
    if base_ptr is not None:
        y += tl.load(base_ptr + at * base_row + wide * base_col, mask=row_ok & inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at * D_OUT + wide, y, mask=row_ok & inside)


def decodes(x: Tensor, A: Tensor, dropout_p: float) -> bool:
    """Whether one launch is the fastest way: few rows, no dropout, x and A small enough for every program to read."""
    if not 0 < len(x) <= ROWS or dropout_p > 0.0:
        return False
    each = min(len(x), BLOCK_M) * x.element_size() + len(A) * A.element_size()
    return x.shape[1] * each <= BYTES


def decode_tile(device: Device, x: Tensor, d_out: int, A: Tensor, with_weight: bool) -> tuple[Tile, int, int]:
    """(the tile of y, columns of x a step, the block of ranks).

    Tiles are narrow where wide ones would leave multiprocessors idle. Steps are deep where a program has a
    multiprocessor to itself and must keep the memory busy alone. Beside x Wᵀ the block of ranks is at least 32: one
    warp computes a tile of 16, and Triton then has all four warps compute the whole of both products.
    """
    size, small, r = x.element_size(), A.element_size(), pow2(len(A), 32 if with_weight else 16, 256)
    n = 64 if not with_weight else 16 if d_out <= 16 * device.sms else 32
    deep = with_weight and ceil_div(d_out, n) <= device.sms and r <= 32 and aligned(x) and not device.hip
    k = 128 if size == small == 2 and r <= 64 else 64 if size == 2 and r * small <= 256 else 32
    k *= 2 if deep else 1
    stage = k * (size * (BLOCK_M + (n if with_weight else 0)) + small * r)
    stages = stages_within(device, stage, DEEP_PROGRAM if deep else TWO_PROGRAMS)
    return Tile(BLOCK_M, n, 4, stages if deep else min(stages, 3)), k, r


def add_decode(
    plan: Plan, x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, A: Tensor, B: Tensor,
    gate: Gate, xa: Tensor, h: Tensor,
) -> Tensor:  # fmt: skip
    """y of at most ROWS rows, with x Wᵀ in it for up to BLOCK_M rows and a weight with a stride of 1; fills xa, h."""
    (M, D), (D_OUT, R) = x.shape, B.shape
    y = plan.new_wide(M, D_OUT)
    plan.has_product = weight is None or (M <= BLOCK_M and 1 in weight.stride())
    weight = weight if plan.has_product else None
    tile, step, block_r = decode_tile(plan.device, x, D_OUT, A, weight is not None)
    frozen = dots(plan.device, x.dtype, x.dtype)
    args = {
        "x_ptr": x, "weight_ptr": weight, "bias_ptr": bias, "base_ptr": base, "a_ptr": A, "b_ptr": B,
        "y_ptr": y, "xa_ptr": xa, "h_ptr": h, "D_IN": D, "D_OUT": D_OUT, **gate.arguments(),
        **strides("x", x), **strides("w", weight), **strides("base", base), **strides("a", A), **strides("b", B),
        "R": R, "RANK": R // gate.gate.shape[1], **plan.dots.arguments(), "NARROW": plan.dots.narrow,
        "BASE_DOT": frozen.wide if plan.device.interpret else TYPES[x.dtype], "BASE_PRECISION": frozen.precision,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": step, "BLOCK_R": block_r,
    }  # fmt: skip
    grid = ceil_div(D_OUT, tile.n), ceil_div(M, tile.m)
    plan.launch(decode, grid, args, tile.warps, tile.stages)
    return y
