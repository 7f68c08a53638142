"""Peers that are plain LoRA, without a gate: the arithmetic of other libraries' LoRA, and our own kernels' without one.

The libraries are not installed, and none of their code is here. Each peer computes what the library's documentation,
paper or source says that it computes, in as many passes over x and dy: in torch where the library calls torch, in
Triton where it has a kernel (lora_kernels.py). The bias is added in the frozen product everywhere. Each equals our
layer under the uniform gate 1/E, as PEFT's LoRA does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peers import Case, Peer, leaves, seeded_mask, torch_mask
from torch import Tensor

from ilora.reference import as_seed


class InPlace(torch.autograd.Function):
    """cuBLAS adds the update to y, and to dx unless x̃ is another tensor than x. x̃ Aᵀ is not kept but computed again.

    twice: whether dy B is computed for dA and again for dx.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, A: Tensor, B: Tensor, weight: Tensor, bias: Tensor, s: float,
        twice: bool,
    ) -> Tensor:  # fmt: skip
        ctx.apart, ctx.s, ctx.twice = dropped is not None, s, twice
        dropped = x if dropped is None else dropped
        ctx.save_for_backward(dropped, A, B, weight)
        return F.linear(x, weight, bias).addmm_(dropped @ A.t(), B.t(), alpha=s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, A, B, weight = ctx.saved_tensors
        dh = dy @ B
        dA = torch.addmm(A, dh.t(), dropped, beta=0, alpha=ctx.s)
        dB = torch.addmm(B, dy.t(), dropped @ A.t(), beta=0, alpha=ctx.s)
        dx = dy @ weight
        dh = dy @ B if ctx.twice else dh
        if ctx.apart:
            return dx, dh @ A * ctx.s, dA, dB, *[None] * 4
        return dx.addmm_(dh, A, alpha=ctx.s), None, dA, dB, *[None] * 4


def _peer(
    case: Case, layer: Callable[[Tensor, Tensor, Tensor, float], Tensor], mask: Callable[[], Tensor] | None
) -> Peer:
    """layer: (x [M, d_in], A, B, the scale of the update) -> y [M, d_out]."""
    (A, B), E = leaves(case.A, case.B), case.settings.experts

    def call(x: Tensor) -> Tensor:
        return layer(x.flatten(0, -2), A, B, case.scaling / E).view(*x.shape[:-1], -1)

    return Peer(call, torch.full_like(case.gate, 1.0 / E), {"A": [A], "B": [B]}, mask)


def unsloth(case: Case) -> Peer:
    """Unsloth's single projection: dy B is computed twice. It has no dropout; with it Unsloth computes as PEFT does."""
    if case.settings.dropout:
        raise NotImplementedError("Unsloth computes LoRA under dropout as PEFT does")

    def layer(x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        return InPlace.apply(x, None, A, B, case.weight, case.bias, s, True)

    return _peer(case, layer, None)


def axolotl(case: Case) -> Peer:
    """Axolotl's output projection: as Unsloth's, dy B once. Under dropout x̃ is written and has its own gradient."""
    p = case.settings.dropout

    def layer(x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        return InPlace.apply(x, F.dropout(x, p) if p else None, A, B, case.weight, case.bias, s, False)

    return _peer(case, layer, torch_mask(case))


def automodel(case: Case) -> Peer:
    """NeMo Automodel's Triton LoRA: one kernel goes from x̃ through the ranks to the update, which torch adds to y."""
    from lora_kernels import ThroughRanks

    def layer(x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        update = ThroughRanks.apply(F.dropout(x, case.settings.dropout), A, B, s)
        return F.linear(x, case.weight, case.bias) + update

    return _peer(case, layer, torch_mask(case))


def lorafusion(case: Case) -> Peer:
    """LoRAFusion's split of the layer (arXiv 2510.00206), by kernels of ours that do the same work as its own."""
    from lora_kernels import SplitGraph

    return _by_our_kernels(case, SplitGraph)


def ungated(case: Case) -> Peer:
    """Our layer as plain LoRA. Its launches are not kept as ours are: compare it by graphs."""
    from lora_kernels import Ungated

    return _by_our_kernels(case, Ungated)


def _by_our_kernels(case: Case, function: Any) -> Peer:
    one, p = case.gate.new_ones(1, 1), case.settings.dropout

    def layer(x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        seed = as_seed(None, x.device) if p else None
        return function.apply(x, A, B, case.weight, case.bias, one, s, p, seed)

    return _peer(case, layer, seeded_mask(case))


LORA_PEERS: dict[str, Callable[[Case], Peer]] = {
    "unsloth": unsloth,
    "axolotl": axolotl,
    "automodel": automodel,
    "lorafusion": lorafusion,
    "ilora[ungated]": ungated,
}
