"""The frozen product and the update in one kernel, for small layers.

The kernel computes x Aᵀ in the loop of the frozen product x Wᵀ, gates it, and adds its product with B. Where dropout
acts on x before A, `shrink` computes x̃ Aᵀ first.
"""

from typing import Any, NamedTuple

from torch import Tensor

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import Device
from .dropout import NO_MASK, Mask, keep, row_keys
from .gates import Gate, gammas, store_gated
from .launch import Plan, wait_for_previous
from .sums import sum_in_order
from .tiles import ceil_div, pow2, strides, unit

MAX_RANK = 32  # more ranks spill registers


@triton.jit
def tile_corner(tile, M, D, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of a tile. GROUP rows of tiles are walked column by column, to find x and w in L2."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_N)
    first = tile // (GROUP * across) * GROUP
    high = tl.minimum(down - first, GROUP)
    within = tile % (GROUP * across)
    return (first + within % high) * BLOCK_M, within // high * BLOCK_N


@triton.jit
def _split_columns(acc):
    """The left and the right half of a tile's columns."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def column_quarters(acc):
    """The four quarters of a tile's columns. Stored one by one they need a quarter of the shared memory."""
    left, right = _split_columns(acc)
    first, second = _split_columns(left)
    third, fourth = _split_columns(right)
    return first, second, third, fourth


@triton.jit
def _load_b(
    b_ptr, column, D, b_row, b_col, R: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr
):
    """bᵀ [BLOCK_R, WIDTH], for WIDTH columns of y from `column`."""
    columns, ranks = column + tl.arange(0, WIDTH), tl.arange(0, BLOCK_R)
    at = columns.to(tl.int64)[None, :] * (b_row // UNIT * UNIT) + ranks.to(tl.int64)[:, None] * b_col
    return tl.load(b_ptr + at, mask=(columns < D)[None, :] & (ranks < R)[:, None], other=0.0)


@triton.jit(do_not_specialize=["M", "N", "S", "run", "width", "threshold"])
def fused_layer(
    x, w, a, y, parts_ptr, b_ptr, bias_ptr, gate_ptr, segments_ptr, seed_ptr,
    xa_ptr, raw_ptr, gated_ptr, scores_ptr,
    M, D, K, N, S, run, width, threshold, scaling, b_row, b_col, gate_row, gate_col,
    R: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr, DROPOUT: tl.constexpr,
    W_BY_ROWS: tl.constexpr, A_BY_ROWS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """t[m, r] = Σ_k x[m, k] · a[r, k], or Σ_s parts[s, m, r] if parts_ptr is given;
    y[m, n] = Σ_k x[m, k] · w[n, k] + bias[n] + keep[m, n] · Σ_r γ[m, r] · t[m, r] · b[n, r].

    x [M, K], w [D, K], a [R, K] and y [M, D] are tensor descriptors, of w and a as they lie in memory (BY_ROWS) or of
    their transposes; y's blocks are [BLOCK_M, BLOCK_N / 4]. parts [S, M, R]; b [D, R] (any strides); bias [D].
    Writes y once, gated = γ ⊙ t, and where their pointers are given raw = t and scores = scaling · t ⊙ xa, all [M, R]
    contiguous.
    Work: a program takes every num_programs-th tile of y. Each tile computes t for itself, by one more product with the
    x that it loads anyway, or by adding the parts in order. The tiles at the left write what is of size [M, R].
    """
    wait_for_previous(EARLY)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(D, BLOCK_N), tl.num_programs(0)):
        row, column = tile_corner(tile, M, D, GROUP, BLOCK_M, BLOCK_N)
        rows, columns, ranks = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
        gamma = gammas(rows, ranks, gate_ptr, segments_ptr, M, N, run, width, scaling, gate_row, gate_col, R, RANK)
        if not DROPOUT:  # loaded here, it arrives during the loop
            b = _load_b(b_ptr, column, D, b_row, b_col, R, UNIT, BLOCK_N, BLOCK_R)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        if parts_ptr is not None:
            at = rows.to(tl.int64)[:, None] * R + ranks[None, :]
            inside = (rows < M)[:, None] & (ranks < R)[None, :]
            step = M.to(tl.int64) * R
            total = sum_in_order(total, parts_ptr, S, step, at, S * step, inside)
        for k in range(0, K, BLOCK_K):
            left = x.load([row, k]).to(DOT)
            right = w.load([column, k]).T if W_BY_ROWS else w.load([k, column])
            if parts_ptr is None:  # loaded beside the others, so that one wait serves all three
                narrow = a.load([0, k]).T if A_BY_ROWS else a.load([k, 0])
            acc = tl.dot(left, right.to(DOT), acc)
            if parts_ptr is None:
                total = tl.dot(left, narrow.to(DOT), total)
        if column == 0:
            store_gated(total, gamma, rows, M, scaling, raw_ptr, gated_ptr, xa_ptr, scores_ptr, R, BLOCK_R)
        gated = (total * gamma).to(DOT)
        if not DROPOUT:
            acc = tl.dot(gated, b.to(DOT), acc)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        QUARTER: tl.constexpr = BLOCK_N // 4
        quarters = column_quarters(acc)
        if DROPOUT:
            k1, k2 = row_keys(seed_ptr, rows)
        for q in tl.static_range(4):
            part = quarters[q]
            start = column + q * QUARTER
            if DROPOUT:
                few = _load_b(b_ptr, start, D, b_row, b_col, R, UNIT, QUARTER, BLOCK_R)
                update = tl.dot(gated, few.to(DOT))
                part += tl.where(keep(k1, k2, start + tl.arange(0, QUARTER), threshold), update, 0.0)
            y.store([row, start], part.to(y.dtype))


class FusedTile(NamedTuple):
    """A tile m × n of y, k columns of x a step. `group` rows of tiles are walked together."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8

    def shared_memory(self, R: int) -> int:
        """Bytes of a program: stages of x, w and a; b; a quarter of y. All elements have 16 bits."""
        r = pow2(R, 16, MAX_RANK)
        return 2 * (self.stages * self.k * (self.m + self.n + r) + r * self.n + self.m * self.n // 4) + 1024

    def fits(self, device: Device, R: int) -> bool:
        """Tensor memory is counted in columns: Triton 3.6 and 3.7 keep two accumulators there, and the ranks."""
        columns = 2 * self.n + pow2(R, 16, MAX_RANK)
        return self.shared_memory(R) <= device.smem and columns <= (device.tmem or columns)


# How fast each shape (m, n, k, warps) computes compared with the largest: a guess, until it is measured.
RATES = {(128, 256, 64, 8): 1.0, (128, 128, 64, 8): 0.85, (64, 128, 64, 8): 0.65}


def fused_tile(device: Device, M: int, D: int, R: int) -> FusedTile:
    """The tile whose waves over the multiprocessors cost least, with as many stages (2 to 4) as fit."""

    def cost(tile: FusedTile) -> float:
        waves = ceil_div(ceil_div(M, tile.m) * ceil_div(D, tile.n), device.sms)
        return waves * tile.m * tile.n / RATES[tile[:4]]

    tiles = (FusedTile(*shape, stages) for shape in RATES for stages in (4, 3, 2))
    best = min((tile for tile in tiles if tile.fits(device, R)), key=cost)
    # With tensor memory ptxas gives 8 warps 128 registers a thread and spills 2 to 4 words.
    return best._replace(warps=4) if device.tmem else best


def by_rows(matrix: Tensor) -> tuple[Tensor, bool]:
    """The matrix or its transpose, whichever has contiguous rows, and whether it is the matrix itself."""
    return (matrix.t(), False) if matrix.stride(1) != 1 and matrix.stride(0) == 1 else (matrix, True)


def _describe(matrix: Tensor, n: int, k: int) -> tuple[TensorDescriptor, bool]:
    """(the descriptor of a matrix or of its transpose, whether it is the matrix's). n, k: the block of the matrix.

    Made on the host and passed by value, so that it needs no workspace and stays in a captured graph.
    """
    rows, own = by_rows(matrix)
    return TensorDescriptor.from_tensor(rows, [n, k] if own else [k, n]), own


def add_fused_layer(
    plan: Plan, x: Tensor, weight: Tensor, gate: Gate, A: Tensor | None, B: Tensor, gated: Tensor,
    parts: Tensor | None = None, mask: Mask = NO_MASK, bias: Tensor | None = None,
    xa: Tensor | None = None, raw: Tensor | None = None, scores: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [M, D] from x [M, K], weight [D, K], B [D, R], and A [R, K] or else the partial sums [S, M, R] or [M, R] of
    x Aᵀ. Fills gated, and raw and scores if they are given; scores need xa. For dx, pass dy, weight.t(), B.t() and
    A.t()."""
    (M, K), (D, R), E = x.shape, B.shape, gate.gate.shape[1]
    y, tile, block_r = plan.new_wide(M, D), fused_tile(plan.device, M, D, R), pow2(R, 16, MAX_RANK)
    (x_tiles, _), (y_tiles, _) = _describe(x, tile.m, tile.k), _describe(y, tile.m, tile.n // 4)
    w, w_by_rows = _describe(weight, tile.n, tile.k)
    a, a_by_rows = (None, False) if A is None else _describe(A, block_r, tile.k)
    args: dict[str, Any] = {
        "x": x_tiles, "w": w, "a": a, "y": y_tiles,
        "parts_ptr": parts, "S": len(parts) if parts is not None and parts.dim() == 3 else 1,
        "b_ptr": B, "bias_ptr": bias, "seed_ptr": mask.seed, **gate.arguments(),
        "xa_ptr": xa, "raw_ptr": raw, "gated_ptr": gated, "scores_ptr": scores,
        "D": D, "K": K, "threshold": mask.threshold, **strides("b", B),
        "R": R, "RANK": R // E, "UNIT": unit(B.stride(0)), "DROPOUT": mask.on,
        "W_BY_ROWS": w_by_rows, "A_BY_ROWS": a_by_rows, "DOT": plan.dots.wide,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": block_r, "GROUP": tile.group,
    }  # fmt: skip
    each = 2 if 2 * tile.shared_memory(R) <= plan.device.smem else 1  # programs that a multiprocessor holds
    programs = min(each * plan.device.sms, ceil_div(M, tile.m) * ceil_div(D, tile.n))
    plan.launch(fused_layer, (programs,), args, tile.warps, tile.stages)
    plan.has_product = True
    return y
