"""What ilora calls: the four primitives, `forward` and `backward`.

Each runs its plan (see plans.py) and adds the frozen product by cuBLAS, unless the plan has it. Shapes: M rows, N gate
rows, E experts, R ranks; x [M, d_in], weight [d_out, d_in], A [R, d_in], B [d_out, R], gate [N, E]; segments int32
[N+1], or None for rows that the instances share equally; seed int64 [1], or None without dropout.
"""

import torch
from torch import Tensor

from . import plans
from .replay import replay


def shrink_x(x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """xa [M, R] = x̃ Aᵀ in float32. Only `expand_xa` rounds it, after the gate."""
    (xa,), _ = replay(plans.shrink_x, (x, A, seed), (dropout_p,))
    return xa


def expand_xa(
    x: Tensor, xa: Tensor, weight: Tensor, bias: Tensor | None, base: None, B: Tensor, gate: Tensor,
    segments: Tensor | None, scaling: float,
) -> Tensor:  # fmt: skip
    """y [M, d_out] = x Wᵀ + bias + (γ ⊙ xa) Bᵀ. Without a weight the merged `forward` serves, so base is None."""
    (y,), _ = replay(plans.expand_xa, (x, xa, bias, B, gate, segments), (scaling,))
    return _add_product(y, x, weight.t())


def backward_dy(
    dy: Tensor, xa: Tensor, B: Tensor, gate: Tensor, segments: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dxa [M, R] = γ ⊙ (dy B), dB, dgate)."""
    (dxa, dB, dgate), _ = replay(plans.backward_dy, (dy, xa, B, gate, segments), (scaling,))
    return dxa, dB, dgate


def backward_x(
    dxa: Tensor, x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None, products: list[tuple[Tensor, Tensor]],
    need_dx: bool,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(dx or None, dA): dx = keep ⊙ (dxa A) + Σ dy W over the (dy, weight) of `products`."""
    (dx, dA), _ = replay(plans.backward_x, (x, dxa, A, seed), (dropout_p, need_dx))
    for dy, weight in products if dx is not None else ():
        _add_product(dx, dy, weight)
    return dx, dA


KEPT = (2,)  # leading dimensions of what `forward` keeps of the ranks for `backward`: xa, and h = γ ⊙ xa


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, A: Tensor, B: Tensor, gate: Tensor,
    segments: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, d_out], ranks [2, M, R]): y = x Wᵀ + bias + h Bᵀ, or base + h Bᵀ without a weight. ranks: xa and
    h = γ ⊙ xa."""
    bias, base = (None, base) if weight is None else (bias, None)
    inputs = (x, weight, bias, base, A, B, gate, segments, seed)
    (y, ranks), has_product = replay(plans.forward, inputs, (scaling, dropout_p))
    if weight is not None and not has_product:
        _add_product(y, x, weight.t())
    return y, ranks


def backward(
    dy: Tensor, x: Tensor, ranks: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, gate: Tensor,
    segments: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None, need_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [M, d_in] or None, dA, dB, dgate): dx = dy W + keep ⊙ (dxa A), without a weight the second term alone.
    ranks: as `forward` returned them."""
    inputs = (dy, x, *ranks, weight, A, B, gate, segments, seed)
    (dx, dA, dB, dgate), has_product = replay(plans.backward, inputs, (scaling, dropout_p, need_dx))
    if dx is not None and weight is not None and not has_product:
        _add_product(dx, dy, weight)
    return dx, dA, dB, dgate


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a b. cuBLAS sums the product by itself and rounds once. In the interpreter MKL would add a narrow one term
    by term onto out, and round at each."""
    if not out.numel():
        return out
    if not out.is_cuda and out.shape[1] < 16 and out.dtype in (torch.float32, torch.float64):
        return out.add_(a @ b)
    return out.addmm_(a, b)
