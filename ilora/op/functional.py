"""ilora_linear and ilora_update: the arguments are checked, then the operation is called in the shortest way."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .checks import as_number, check_dtypes, check_tensors, checked_seed
from .registration import FORWARD, Eager, forward, seed_tensor, unseen


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
        gate: [N, E], any float dtype, E divides R. Without segments each of the N instances owns M/N rows, and N must
            divide the first dimension of x or be the product of its first few ([B, L, d_in]: N = B, or N = B·L for a
            token gate, which may also be [B, L, E]).
        scaling: alpha / (R/E).
        segments: int32 [N+1] on x's device, rising from 0 to M: row m belongs to instance i iff
            segments[i] <= m < segments[i+1]. None: instances of equal length. On a GPU the values are not checked.
        dropout_p: 0 <= p < 1, dropout on the low-rank path only. The mask is a function of (seed, row, column), so
            that the backward computes it again.
        seed: an int or one int64 on x's device; None draws one from torch's generator, which torch.manual_seed sets.
        backend: "reference", "native" or "triton"; None means ILORA_BACKEND, else the fastest that fits.
    Returns: y [..., d_out] in x's dtype. Under autocast x, weight, bias, A and B are cast as torch's linear casts them.
    Raises: ValueError or TypeError naming the argument, before any work; ilora.BackendUnavailable for a backend that
        cannot run this call.
    Saved for backward: x, xa [M, R], the arguments and the seed. The same inputs give the same bits.
    Formula: arXiv 2408.10159, with the experts' sum written as a scaling in rank space.
    """
    if native.DIRECT_CALL is not None and segments is None and seed is None and not torch.compiler.is_compiling():
        y = native.DIRECT_CALL(x, weight, bias, A, B, gate, scaling, dropout_p, backend)
        if y is not None:
            return y
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
    scaling, dropout_p = as_number("scaling", scaling), as_number("dropout_p", dropout_p)
    gate = check_tensors(x, weight, bias, base, A, B, gate, segments)
    device = x.device.type
    autocast = autocasts(device)
    if autocast:
        x, weight, bias, base, A, B = autocast_to(torch.get_autocast_dtype(device), x, weight, bias, base, A, B)
    check_dtypes(x, weight, bias, base, A, B)
    seed = seed_tensor(checked_seed(seed, dropout_p, x.device), dropout_p, x)
    settings = (scaling / (1.0 - dropout_p), dropout_p, seed, backend or "")
    if not autocast:
        return _call(x, weight, bias, base, A, B, gate, segments, *settings)
    with torch.autocast(device, enabled=False):  # inner products of float32 partial sums must stay float32
        return _call(x, weight, bias, base, A, B, gate, segments, *settings)


def _call(*args):
    tensors, seed = args[:8], args[10]
    if not unseen(*tensors, seed):
        return FORWARD(*args)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return Eager.apply(*args)[0]
    return forward(*args)[0]


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device; torch has none for meta, and refuses the question."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_to(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """As torch's linear under autocast: every float tensor but float64 goes to the autocast dtype."""
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
