"""grouped_linear and grouped_update: the arguments are checked, then the operation is called in the shortest way.

torch.ops.ilora.grouped_forward computes (y, xa) and has gradients by torch.ops.ilora.grouped_backward, which refuses to
be differentiated itself, as the plain operation's do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..op import backends
from ..op.checks import as_number, check_dtypes, checked_seed
from ..op.functional import autocast_to, autocasts
from ..op.registration import count_flops, eager_function, refuse_second_derivative, seed_tensor, unseen
from .checks import check_offsets, check_tensors


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    scaling: float,
    offsets: Tensor,
    instances: Tensor,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[m] = x[m] W[s]ᵀ + b[s] + (γ[m] ⊙ (dropout(x)[m] A[s]ᵀ)) B[s]ᵀ for rows sorted by their slot s, where
    γ[m, r] = scaling · gate[instances[m], r // (R/E)].

    Args:
        x: [M, d_in], the rows of slot 0 first, then those of slot 1, and so on.
        weight, bias: frozen, [X, d_out, d_in] and [X, d_out] or None; or [d_out, d_in] and [d_out], the same for all.
        A, B: [X, R, d_in] and [X, d_out, R]; dtypes as in `ilora_linear`. 1 <= R <= 256.
        gate: [N, E], any float dtype, E divides R.
        scaling: alpha / (R/E).
        offsets: int32 [X+1] on x's device, rising from 0 to M: slot s has the rows offsets[s] <= m < offsets[s+1].
        instances: int32 [M] on x's device: row m has the gate row instances[m]. On a GPU, values of both are trusted.
        dropout_p, seed: as in `ilora_linear`; a row's mask goes by its place in x.
        backend: "reference", "native" or "triton"; None means ILORA_BACKEND, else the fastest that fits.
    Returns: y [M, d_out] in x's dtype. Under autocast x, weight, bias, A and B are cast as torch's linear casts them.
    Raises: ValueError or TypeError naming the argument, before any work; ilora.BackendUnavailable.
    Saved for backward: x, xa [M, R], the arguments and the seed. The same inputs give the same bits.
    """
    if weight is None:
        raise TypeError("weight: expected a torch.Tensor, got None; grouped_update computes the update alone")
    return _apply(x, weight, bias, None, A, B, gate, scaling, offsets, instances, dropout_p, seed, backend)


def grouped_update(
    x: Tensor,
    base: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    scaling: float,
    offsets: Tensor,
    instances: Tensor,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """base[m] + (γ[m] ⊙ (dropout(x)[m] A[s]ᵀ)) B[s]ᵀ for a frozen layer that is a black box: base [M, d_out] is its
    output, left as it is; None means the update alone. Everything else as in `grouped_linear`."""
    return _apply(x, None, None, base, A, B, gate, scaling, offsets, instances, dropout_p, seed, backend)


def _apply(x, weight, bias, base, A, B, gate, scaling, offsets, instances, dropout_p, seed, backend):
    scaling, dropout_p = as_number("scaling", scaling), as_number("dropout_p", dropout_p)
    check_tensors(x, weight, bias, base, A, B, gate, offsets, instances)
    device = x.device.type
    if autocasts(device):
        x, weight, bias, base, A, B = autocast_to(torch.get_autocast_dtype(device), x, weight, bias, base, A, B)
    check_dtypes(x, weight, bias, base, A, B)
    seed = seed_tensor(checked_seed(seed, dropout_p, x.device), dropout_p, x)
    tensors = (x, weight, bias, base, A, B, gate, offsets.contiguous(), instances.contiguous())
    settings = (scaling / (1.0 - dropout_p), dropout_p, seed, backend or "")
    if device == "meta":
        return _call(*tensors, *settings)
    with torch.autocast(device, enabled=False):  # inner products of float32 partial sums must stay float32
        return _call(*tensors, *settings)


def _call(*args: Any) -> Tensor:
    tensors = args[:9]
    if not unseen(*tensors):
        return FORWARD(*args)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return Eager.apply(*args)[0]
    return forward(*args)[0]


_LIBRARY = torch.library.Library("ilora", "FRAGMENT")
_LIBRARY.define(
    "grouped_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor A, Tensor B, Tensor gate, "
    "Tensor offsets, Tensor instances, float scaling, float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "grouped_backward(Tensor dy, Tensor x, Tensor xa, Tensor? weight, Tensor A, Tensor B, Tensor gate, "
    "Tensor offsets, Tensor instances, float scaling, float dropout_p, Tensor? seed, bool need_dx, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
FORWARD, BACKWARD = torch.ops.ilora.grouped_forward.default, torch.ops.ilora.grouped_backward.default


@torch.library.impl(_LIBRARY, "grouped_forward", "CompositeExplicitAutograd")
def forward(x, weight, bias, base, A, B, gate, offsets, instances, scaling, dropout_p, seed, backend):
    """(y [M, d_out], xa [M, R]) by the backend of this name, "" for the fastest that fits."""
    check_offsets(offsets, instances, len(x), len(gate))
    module = backends.select(backend, x.device.type, x.dtype, backends.GROUPED)
    xa = module.shrink_x(x, A, offsets, dropout_p, seed)
    return module.expand_xa(x, xa, weight, bias, base, B, offsets, gate, instances, scaling), xa


@torch.library.impl(_LIBRARY, "grouped_backward", "CompositeExplicitAutograd")
def backward(dy, x, xa, weight, A, B, gate, offsets, instances, scaling, dropout_p, seed, need_dx, backend):
    """(dx, empty unless need_dx; dA, dB, dgate)."""
    check_offsets(offsets, instances, len(x), len(gate))  # again: they may lie in a buffer that has been used anew
    module = backends.select(backend, x.device.type, x.dtype, backends.GROUPED)
    dxa, dB, dgate = module.backward_dy(dy, xa, B, offsets, gate, instances, scaling)
    products = [] if weight is None else [(dy, weight)]
    dx, dA = module.backward_x(dxa, x, A, offsets, dropout_p, seed, products, need_dx)
    return x.new_empty(0) if dx is None else dx, dA, dB, dgate


@torch.library.register_fake("ilora::grouped_forward", lib=_LIBRARY)
def _forward_fake(x, weight, bias, base, A, B, gate, offsets, instances, scaling, dropout_p, seed, backend):
    xa = x.new_empty(x.shape[0], A.shape[1], dtype=torch.promote_types(x.dtype, A.dtype))
    return x.new_empty(x.shape[0], B.shape[1]), xa


@torch.library.register_fake("ilora::grouped_backward", lib=_LIBRARY)
def _backward_fake(dy, x, xa, weight, A, B, gate, offsets, instances, scaling, dropout_p, seed, need_dx, backend):
    dx = x.new_empty(x.shape if need_dx else 0)
    return dx, A.new_empty(A.shape), B.new_empty(B.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _, A, B, gate, offsets, instances, scaling, dropout_p, seed, backend = inputs
    ctx.save_for_backward(x, output[1], weight, A, B, gate, offsets, instances, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.settings = scaling, dropout_p, backend


def _gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if dy is None:
        return (None,) * len(needs)
    x, xa, weight, A, B, gate, offsets, instances, seed = ctx.saved_tensors
    scaling, dropout_p, backend = ctx.settings
    tensors = (dy, x, xa, weight, A, B, gate, offsets, instances)
    op = backward if not torch.is_grad_enabled() and unseen(*tensors) else BACKWARD
    dx, dA, dB, dgate = op(*tensors, scaling, dropout_p, seed, needs[0], backend)
    grads = (dx, None, None, dy, dA, dB, dgate, *[None] * 6)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


torch.library.register_autograd("ilora::grouped_forward", _gradients, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("ilora::grouped_backward", refuse_second_derivative, lib=_LIBRARY)
count_flops(torch.ops.ilora.grouped_forward, torch.ops.ilora.grouped_backward)


Eager = eager_function(forward, _save, _gradients)
