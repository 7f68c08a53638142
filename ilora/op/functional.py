"""The one door: checks, the torch.library ops, and the one autograd Function above all backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends
from .checks import as_number, check_dtypes, check_segments, check_tensors, checked_seed, rows

_LIBRARY = torch.library.Library("ilora", "DEF")
_LIBRARY.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor A, Tensor B, Tensor gate, Tensor? segments, "
    "float scaling, float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "backward(Tensor dy, Tensor x, Tensor xa, Tensor? weight, Tensor A, Tensor B, Tensor gate, Tensor? segments, "
    "float scaling, float dropout_p, Tensor? seed, bool need_dx, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


_FORWARD, _BACKWARD = torch.ops.ilora.forward.default, torch.ops.ilora.backward.default
_PLAIN = (Tensor, torch.nn.Parameter)


def ilora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    scaling: float,
    segments: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x Wᵀ + b + ((dropout(x) Aᵀ) ⊙ γ) Bᵀ, γ[m, r] = scaling · gate[i(m), r // (R/E)], fused, forward and backward.

    Args:
        x: [..., d_in], float16, bfloat16, float32 or float64; its leading dimensions flatten to M rows.
        weight, bias: [d_out, d_in] and [d_out] or None, in x's dtype. Usually frozen; gradients are there if asked for.
        A, B: [R, d_in] and [d_out, R], one dtype: x's, or float32 beside a 16-bit x. 1 <= R <= 256.
        gate: [N, E], any float dtype, E divides R. N = M is a token gate.
        scaling: alpha / (R/E).
        segments: int32 [N+1] on x's device, rising from 0 to M: row m belongs to instance i iff
            segments[i] <= m < segments[i+1]. None: N runs of M/N rows. On a GPU its values are trusted, not read back.
        dropout_p: 0 <= p < 1, dropout on the low-rank path only. Nothing is stored for it: the mask is a function of
            (seed, row, column).
        seed: an int or one int64 on x's device; None draws one from torch's generator (torch.manual_seed rules it).
        backend: "reference", "native" or "triton"; None means ILORA_BACKEND, else the fastest that fits.
    Returns: y [..., d_out] in x's dtype. Under autocast x, weight, bias, A and B are cast as torch's linear casts them.
    Raises: ValueError or TypeError naming the argument, before any work; ilora.BackendUnavailable.
    Saved for backward: x, xa [M, R], the arguments and the seed. The same inputs give the same bits.
    Formula: arXiv 2408.10159, with the experts' sum written as a scaling in rank space.
    """
    if weight is None:
        raise TypeError("weight: expected a torch.Tensor, got None; ilora_update computes the update alone")
    return _apply(x, weight, bias, None, A, B, gate, scaling, segments, dropout_p, seed, backend)


def ilora_update(
    x: Tensor,
    base: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    scaling: float,
    segments: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """base + ((dropout(x) Aᵀ) ⊙ γ) Bᵀ for a frozen layer that is a black box (quantised, hooked): base [..., d_out] is
    its output, left as it is; None means the update alone. Everything else as in `ilora_linear`."""
    return _apply(x, None, None, base, A, B, gate, scaling, segments, dropout_p, seed, backend)


def _apply(x, weight, bias, base, A, B, gate, scaling, segments, dropout_p, seed, backend):
    if not isinstance(scaling, float):
        scaling = as_number("scaling", scaling)
    if not isinstance(dropout_p, float):
        dropout_p = as_number("dropout_p", dropout_p)
    check_tensors(x, weight, bias, base, A, B, gate, segments)
    device = x.device.type
    autocast = autocasts(device)
    if autocast:
        x, weight, bias, base, A, B = autocast_to(torch.get_autocast_dtype(device), x, weight, bias, base, A, B)
    check_dtypes(x, weight, bias, base, A, B, gate)
    bias, segments = dense(bias), dense(segments)
    seed = checked_seed(seed, dropout_p, x.device)
    args = (
        x,
        weight,
        bias,
        base,
        A,
        B,
        gate,
        segments,
        scaling / (1.0 - dropout_p),
        dropout_p,
        seed,
        backend or "",
    )
    if not autocast:
        return _ILoRALinear.apply(*args)
    with torch.autocast(device, enabled=False):  # inner products of float32 partial sums must stay float32
        return _ILoRALinear.apply(*args)


def dense(vector: Tensor | None) -> Tensor | None:
    """A bias or segments as the kernels read them, without a stride."""
    return None if vector is None else vector.contiguous()


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device; torch has none for meta, and refuses the question."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_to(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """As torch's linear under autocast: every float tensor but float64 goes to the autocast dtype."""
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


class _ILoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, base, A, B, gate, segments, scaling, dropout_p, seed, backend):
        op = _forward if _plainly(x, weight, A) else _FORWARD
        y, xa = op(x, weight, bias, base, A, B, gate, segments, scaling, dropout_p, seed, backend)
        ctx.save_for_backward(x, xa, weight, A, B, gate, segments, seed)
        ctx.scaling, ctx.dropout_p, ctx.backend = scaling, dropout_p, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        grads = once_only(lambda: _gradients(ctx, dy, saved, needs), dy, *saved)
        return (*grads, None, None, None, None, None)


def once_only(gradients: Callable[[], list[Tensor | None]], *tied: Tensor | None) -> list[Tensor | None]:
    """What `gradients` returns, computed from `tied`: under create_graph a second differentiation of it is refused."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients()
    with torch.no_grad():
        grads = gradients()
    present = [i for i, grad in enumerate(grads) if grad is not None]
    refused = _OnceOnly.apply(len(present), *(grads[i] for i in present), *tied)
    for i, grad in zip(present, refused, strict=True):
        grads[i] = grad
    return grads


def _plainly(x: Tensor, weight: Tensor | None, A: Tensor) -> bool:
    """Whether nobody needs to see the op: no compiler, no dispatch mode, no tensor subclass. Then its implementation is
    called by itself, which spares the host a third of the call."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return type(x) in _PLAIN and type(A) in _PLAIN and (weight is None or type(weight) in _PLAIN)


def _gradients(ctx: Any, dy: Tensor, saved: Any, needs: Any) -> list[Tensor | None]:
    """Gradients of x, weight, bias, base, A, B, gate."""
    x, xa, weight, A, B, gate, segments, seed = saved
    op = _backward if _plainly(dy, weight, A) else _BACKWARD
    dx, dA, dB, dgate = op(
        dy, x, xa, weight, A, B, gate, segments, ctx.scaling, ctx.dropout_p, seed, needs[0], ctx.backend
    )
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dweight = flat_dy.T @ flat_x if needs[1] else None
    dbias = flat_dy.sum(0) if needs[2] else None
    grads = [dx, dweight, dbias, dy if needs[3] else None, dA, dB, dgate]
    return [grad if need else None for grad, need in zip(grads, needs, strict=False)]


class _OnceOnly(torch.autograd.Function):
    """Passes the first `count` tensors through, tied to the rest so that a second differentiation is refused."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None):
        return tuple(t.view_as(t) for t in tensors[:count] if t is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        raise RuntimeError(
            "ilora_linear: double backward is not supported by the fused backends; "
            "ilora.reference.ilora_linear is plain torch and differentiable to any order"
        )


@torch.library.impl(_LIBRARY, "forward", "CompositeExplicitAutograd")
def _forward(x, weight, bias, base, A, B, gate, segments, scaling, dropout_p, seed, backend):
    check_segments(segments, rows(x))
    module = backends.select(backend, x.device.type, x.dtype)
    flat_base = None if base is None else base.reshape(-1, B.shape[0])
    y, xa = module.forward(
        x.reshape(-1, x.shape[-1]), weight, bias, flat_base, A, B, gate, segments, scaling, dropout_p, seed
    )
    # Not view: autograd would refuse in-place operations on the output of the Function.
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], B.shape[0]]), xa


@torch.library.impl(_LIBRARY, "backward", "CompositeExplicitAutograd")
def _backward(dy, x, xa, weight, A, B, gate, segments, scaling, dropout_p, seed, need_dx, backend):
    check_segments(segments, rows(x))  # again: they may lie in a buffer that has been used anew
    module = backends.select(backend, x.device.type, x.dtype)
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx, dA, dB, dgate = module.backward(
        flat_dy, flat_x, xa, weight, A, B, gate, segments, scaling, dropout_p, seed, need_dx
    )
    return x.new_empty(0) if dx is None else dx.view(x.shape), dA, dB, dgate


@torch.library.register_fake("ilora::forward", lib=_LIBRARY)
def _forward_fake(x, weight, bias, base, A, B, gate, segments, scaling, dropout_p, seed, backend):
    xa = x.new_empty(rows(x), A.shape[0], dtype=torch.promote_types(x.dtype, A.dtype))
    return x.new_empty(*x.shape[:-1], B.shape[0]), xa


@torch.library.register_fake("ilora::backward", lib=_LIBRARY)
def _backward_fake(dy, x, xa, weight, A, B, gate, segments, scaling, dropout_p, seed, need_dx, backend):
    return (
        x.new_empty(x.shape if need_dx else 0),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        gate.new_empty(gate.shape),
    )
