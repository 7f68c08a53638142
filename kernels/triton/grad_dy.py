"""The pass over dy: dh = dy B, and from it dxa = γ ⊙ dh and the scores for dgate; and dB = dyᵀ h.

Both are computed in one launch by programs of their own, near enough in time that the second to read a part of dy finds
it in the L2 cache. ILORA_GRAD_DY=apart launches them one after the other instead, each kernel with one loop: compilers
have made wrong code of two (triton issues 10486, 11366, 11781).
"""

import os

import torch
from torch import Tensor

import triton
import triton.language as tl

from .gates import NO_GATE, Gate, add_gate_ranks, gammas, store_gated
from .grad_weights import grad_weight_block
from .launch import Plan, new_parts, wait_for_previous
from .shrink import shrink_block, store_part
from .tiles import ceil_div, grad_dy_tiles, pow2, strides, unit


@triton.jit(do_not_specialize=["M", "N", "run", "width"])
def grad_dy(
    dy_ptr, h_ptr, b_ptr, dh_ptr, xa_ptr, dxa_ptr, scores_ptr, db_ptr, gate_ptr, segments_ptr,
    M, D, N, rows, columns, run, width, scaling, dy_row, dy_col, b_row, b_col, gate_row, gate_col,
    ALONG: tl.constexpr, DOWN: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    ALONG_M: tl.constexpr, ALONG_N: tl.constexpr, DOWN_M: tl.constexpr, DOWN_N: tl.constexpr, BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """ALONG: dh[s, m, r] = Σ_n dy[m, n] · b[n, r], summed over the s-th `columns` columns; or, if dh_ptr is None and
    `columns` are all, dxa = γ ⊙ dh and scores = scaling · dh ⊙ xa.
    DOWN: db[g, n, r] = Σ_m dy[m, n] · h[m, r], summed over the g-th `rows` rows.

    Reads dy [M, D] (any strides) twice, once of it from L2; h and xa [M, R] contiguous; b [D, R] (any strides).
    Writes dh [S, M, R] float32, or dxa and scores [M, R]; and db [G, D, R], float32 unless G = 1. All are contiguous.
    Work: a cell of rows × columns of dy has `rows` / ALONG_M programs that go along its rows, as `shrink` does, and
    then `columns` / DOWN_N that go down its columns, as `grad_weights` does. Cells follow one another by rows. No
    program waits for another. The steps are ALONG_N columns and DOWN_M rows.
    """
    wait_for_previous(EARLY)
    along = rows // ALONG_M if ALONG else 0
    down = columns // DOWN_N if DOWN else 0
    at, task = tl.program_id(0) // (along + down), tl.program_id(0) % (along + down)
    g, s = at // tl.cdiv(D, columns), at % tl.cdiv(D, columns)
    if task < along:
        first = (g * along + task) * ALONG_M
        if ALONG and first < M:  # the last cell may be short
            own, ranks = first + tl.arange(0, ALONG_M), tl.arange(0, BLOCK_R)
            dh = shrink_block(own, s, dy_ptr, b_ptr, None, M, D, columns, 0, dy_row, dy_col, b_col,
                              b_row // UNIT * UNIT, R, False, DOT, PIECES, PRECISION,
                              ALONG_M, ALONG_N, BLOCK_R)  # fmt: skip
            if dh_ptr is not None:
                store_part(dh, dh_ptr, own, s, M, R, BLOCK_R)
            else:
                gamma = gammas(own, ranks, gate_ptr, segments_ptr, M, N, run, width, scaling, gate_row, gate_col,
                               R, RANK)  # fmt: skip
                store_gated(dh, gamma, own, M, scaling, None, dxa_ptr, xa_ptr, scores_ptr, R, BLOCK_R)
    elif DOWN:
        block = s * down + task - along
        if block * DOWN_N < D:
            grad_weight_block(block, g, dy_ptr, h_ptr, None, db_ptr, M, D, rows, 0, dy_row, dy_col, R, 1,
                              R, False, DOT, PIECES, PRECISION, DOWN_M, DOWN_N, BLOCK_R)  # fmt: skip


def apart() -> bool:
    """Whether ILORA_GRAD_DY asks for two launches; raises ValueError for an unknown value."""
    value = os.environ.get("ILORA_GRAD_DY") or "joined"
    if value not in ("joined", "apart"):
        raise ValueError(f"ILORA_GRAD_DY={value!r}: expected joined or apart")
    return value == "apart"


def add_grad_dy(
    plan: Plan, dy: Tensor, xa: Tensor, h: Tensor, B: Tensor, dB: Tensor, gate: Gate
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dxa [M, R]; the scores for dgate, for each row and rank or expert; dgate; the partial sums of dB, or dB itself).

    One launch where programs along rows take all columns, else `gate_ranks` too.
    """
    (M, D), R = dy.shape, h.shape[1]
    (along, down, rows, columns), whole_rows = grad_dy_tiles(plan.device, dy, R, plan.dots)
    G, S = ceil_div(M, rows), ceil_div(D, columns)
    dxa, db = plan.new_ranks(M, R), new_parts(G, dB)
    dh, scores, dgate = None, dy.new_empty(M, R, dtype=torch.float32), gate.gate.new_empty(gate.gate.shape)
    ranks = {"xa_ptr": xa, "dxa_ptr": dxa, "scores_ptr": scores, **gate.arguments(), "RANK": R // gate.gate.shape[1]}
    if not whole_rows:
        dh, (scores, dgate) = dy.new_empty((M, R) if S == 1 else (S, M, R), dtype=torch.float32), gate.new_dgate()
        ranks = {"xa_ptr": None, "dxa_ptr": None, "scores_ptr": None, **NO_GATE}
    args = {
        "dy_ptr": dy, "h_ptr": h, "b_ptr": B, "dh_ptr": dh, "db_ptr": db, **ranks, "M": M, "D": D,
        "rows": rows, "columns": columns, **strides("dy", dy), **strides("b", B),
        "R": R, "UNIT": unit(B.stride(0)), **plan.dots.arguments(),
        "ALONG_M": along.m, "ALONG_N": along.n, "DOWN_M": down.m, "DOWN_N": down.n, "BLOCK_R": pow2(R, 16, 256),
    }  # fmt: skip
    warps, stages = max(along.warps, down.warps), min(along.stages, down.stages)
    for ALONG, DOWN in ((True, False), (False, True)) if apart() else ((True, True),):
        grid = (G * S * (ALONG * (rows // along.m) + DOWN * (columns // down.n)),)
        plan.launch(grad_dy, grid, {**args, "ALONG": ALONG, "DOWN": DOWN}, warps, stages)
    if dh is not None:
        add_gate_ranks(plan, gate, dh, dxa, xa=xa, scores=scores)
    return dxa, scores, dgate, db
