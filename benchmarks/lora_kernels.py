"""What the peers in lora_peers.py need Triton for."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from ilora.kernels import plans
from ilora.kernels.device import device_of
from ilora.kernels.dropout import keep, mask_of, row_keys
from ilora.kernels.fused_layer import add_fused_layer
from ilora.kernels.gates import Gate
from ilora.kernels.grad_dy import add_grad_dy
from ilora.kernels.launch import Plan, run
from ilora.kernels.sums import add_sums
from torch import Tensor

BLOCKS = [(32, 256), (16, 128), (16, 256), (32, 128), (64, 128)] if torch.cuda.is_available() else [(32, 256)]
CONFIGS = [triton.Config({"BLOCK_M": m, "BLOCK": n}, num_warps=4, num_stages=4) for m, n in BLOCKS]


@triton.autotune(CONFIGS, key=["K", "D"])
@triton.jit
def through_ranks(
    x_ptr, a_ptr, b_ptr, ranks_ptr, y_ptr, M, K, D, scale, a_row, a_col, b_row, b_col,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ranks = scale · x aᵀ and y = ranks bᵀ for BLOCK_M rows: x [M, K], a [R, K], b [D, R], ranks [M, R], y [M, D]."""
    rows, ranks = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    at, inside, known = rows.to(tl.int64)[:, None], (rows < M)[:, None], ranks < R
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, K, BLOCK):
        columns = k + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at * K + columns[None, :], mask=inside & (columns < K)[None, :], other=0.0)
        a_at = columns[:, None] * a_col + ranks[None, :] * a_row
        a = tl.load(a_ptr + a_at, mask=(columns < K)[:, None] & known[None, :], other=0.0)
        total = tl.dot(x, a, total, input_precision="ieee")
    narrow = (total * scale).to(x_ptr.dtype.element_ty)
    tl.store(ranks_ptr + at * R + ranks[None, :], narrow, mask=inside & known[None, :])
    for d in range(0, D, BLOCK):
        columns = d + tl.arange(0, BLOCK)
        b_at = ranks[:, None] * b_col + columns[None, :] * b_row
        b = tl.load(b_ptr + b_at, mask=known[:, None] & (columns < D)[None, :], other=0.0)
        y = tl.dot(narrow, b, input_precision="ieee")
        tl.store(y_ptr + at * D + columns[None, :], y, mask=inside & (columns < D)[None, :])


def apply_ranks(x: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(y [M, D], ranks [M, R])."""
    (M, K), (D, R) = x.shape, B.shape
    y, ranks = x.new_empty(M, D), x.new_empty(M, R)
    through_ranks[lambda chosen: (triton.cdiv(M, chosen["BLOCK_M"]),)](
        x, A, B, ranks, y, M, K, D, scale, *A.stride(), *B.stride(), R, max(triton.next_power_of_2(R), 16)
    )
    return y, ranks


class ThroughRanks(torch.autograd.Function):
    """NeMo Automodel's update s · x̃ Aᵀ Bᵀ: one kernel forward, and the same for dy B and dx̃."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.s = s
        return apply_ranks(x, A, B, s)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        dx, ranks = apply_ranks(dy, B.t(), A.t(), ctx.s)
        return dx, ranks.t() @ x, torch.addmm(B, dy.t(), x @ A.t(), beta=0, alpha=ctx.s), None


def launch(plan: Plan, x: Tensor) -> None:
    """Launches the plan without the scores, which only the gradient of a gate needs."""
    run([each._replace(args={**each.args, "scores_ptr": None} if "scores_ptr" in each.args else each.args)
         for each in plan.launches], x)  # fmt: skip


class Ungated(torch.autograd.Function):
    """Our layer with the constant gate `one` [1, 1]: the same launches without instances, scores and dgate."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, bias: Tensor, one: Tensor, s: float, p: float,
        seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.scaling, ctx.p = s / (1.0 - p), p
        plan = plans.forward(device_of(x), x, weight, bias, None, A, B, one, None, seed, ctx.scaling, p)
        launch(plan, x)
        y, (xa, h) = plan.results
        ctx.save_for_backward(x, xa, h, weight, A, B, one, seed)
        return y if plan.has_product else y.addmm_(x, weight.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, h, weight, A, B, one, seed = ctx.saved_tensors
        low = (A, B, one, None, seed, ctx.scaling, ctx.p)
        plan = plans.backward(device_of(x), dy, x, xa, h, weight, *low, True)
        launch(plan, x)
        dx, dA, dB, _ = plan.results
        return dx if plan.has_product else dx.addmm_(dy, weight), dA, dB, *[None] * 6


@triton.jit
def drop_out(
    x_ptr, seed_ptr, out_ptr, M, D, threshold, scale, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = scale · keep ⊙ x, for BLOCK_M × BLOCK elements of x [M, D]."""
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = rows.to(tl.int64)[:, None] * D + columns[None, :], (rows < M)[:, None] & (columns < D)[None, :]
    k1, k2 = row_keys(seed_ptr, rows)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, tl.where(keep(k1, k2, columns, threshold), x * scale, 0.0), mask=inside)


class SplitGraph(torch.autograd.Function):
    """LoRAFusion's launches: x̃ is written; cuBLAS computes x̃ Aᵀ; one kernel y; one pass over dy gives dB and dxa;
    cuBLAS computes dA; one kernel dx. The mask is computed again where LoRAFusion stores it, and dB is summed in order
    where it adds atomically."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, bias: Tensor, one: Tensor, s: float, p: float,
        seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        (M, D), dropped, mask = x.shape, x, mask_of(p, seed)
        if mask.on:
            dropped = torch.empty_like(x)
            grid = (triton.cdiv(M, 16), triton.cdiv(D, 256))
            drop_out[grid](x, seed, dropped, M, D, mask.threshold, 1.0 / (1.0 - p), 16, 256)
        xa = dropped @ A.t()
        plan, h = Plan(device_of(x), x, A), torch.empty_like(xa)
        y = add_fused_layer(plan, x, weight, Gate(one, None, s, M), None, B, h, parts=xa, bias=bias)
        launch(plan, x)
        ctx.save_for_backward(dropped, xa, h, weight, A, B, one, seed)
        ctx.s, ctx.p = s, p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, xa, h, weight, A, B, one, seed = ctx.saved_tensors
        plan, dB, unused = Plan(device_of(dy), dy, B), torch.empty_like(B), torch.empty_like(xa)
        dxa, _, _, parts = add_grad_dy(plan, dy, xa, h, B, dB, Gate(one, None, ctx.s, len(dy)))
        add_sums(plan, (parts, dB))
        through = Gate(one, None, 1.0 / (1.0 - ctx.p), len(dy))
        mask = mask_of(ctx.p, seed)
        dx = add_fused_layer(plan, dy, weight.t(), through, None, A.t(), unused, parts=dxa, mask=mask)
        launch(plan, dy)
        return dx, dxa.t() @ dropped, dB, *[None] * 6
