"""The native backend: C++ kernels for the low-rank term on the CPU, torch's matrix multiplication on top of it; and
`decode`, CUDA kernels for a few rows, where they were built.

A backend as `ilora.reference` is one: `forward` and `backward` below take 2-D tensors that `ilora.ops` has checked.
The library is built when the package is installed (see setup.py) and found here; nothing is compiled at run time.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .reference import dropout_threshold

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DECODE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DECODE_ROWS, DECODE_FUSED_ROWS, DECODE_RANKS = 64, 16, 128  # as csrc/cuda/decode.h has them


def _load(name: str, wants: str, variable: str) -> str | None:
    """Registers torch.ops.ilora_native; returns the reason when that cannot be done."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        checkout = Path(__file__).resolve().parents[2]
        if (checkout / "setup.py").exists():  # it hides an installed ilora from Python processes that start there
            return (
                f"it was not built in {checkout}, which ilora is imported from; "
                f"to build it there: {variable}=1 pip install --no-build-isolation -e {checkout}"
            )
        return (
            f"it was not built when ilora was installed, for want of torch or of {wants}; "
            f"to build it, and see what fails: {variable}=1 pip install --no-build-isolation ."
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"{spec.origin} does not load with torch {torch.__version__}: {error}"
    return None


_UNAVAILABLE = _load("ilora._native", "a C++ compiler (gcc or clang)", "ILORA_BUILD_EXT")


def unavailable() -> str | None:
    """None if the native backend works here, else why not."""
    return _UNAVAILABLE


@cache
def cuda_unavailable() -> str | None:
    """None if `decode` works here, else why not."""
    return _UNAVAILABLE or _load("ilora._native_cuda", "nvcc beside a torch for CUDA", "ILORA_BUILD_CUDA")


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    segments: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [M, d_out] in x's dtype and xa [M, R]: the update (plus bias or base) first, then x Wᵀ accumulated onto it."""
    x = _unit_columns(x)
    if weight is None:
        bias, base = None, None if base is None else _unit_columns(base)
    else:
        base = None
    w_t = None if weight is None else weight.t()
    wide = w_t is not None and _through_float32(x, w_t)
    y, xa = torch.ops.ilora_native.forward.default(
        x, bias, base, A, B, _compute_gate(gate, x), segments, scaling, dropout_threshold(dropout_p), seed, wide
    )
    return _add_product(y, x, w_t), xa


def backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    segments: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """dx [M, d_in] in x's dtype (None unless need_dx), dA, dB and dgate: as in forward, dy W goes onto the update."""
    dy, x = _unit_columns(dy), _unit_columns(x)
    wide = need_dx and weight is not None and _through_float32(dy, weight)
    threshold, gate_c = dropout_threshold(dropout_p), _compute_gate(gate, x)
    dx, dA, dB, dgate = torch.ops.ilora_native.backward.default(
        dy, x, xa, A, B, gate_c, segments, scaling, threshold, seed, need_dx, wide
    )
    return _add_product(dx, dy, weight) if need_dx else None, dA, dB, dgate.to(gate.dtype)


# The halves of them, for projections that share x, by the same kernels: with an identity for A or B and a gate of one,
# a kernel's other half does nothing, at the cost of products of R × R. Between them ranks are float32 at least.


def shrink_x(x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """xa [M, R] = dropout(x) Aᵀ: an update of no columns."""
    one, threshold = _one(x), dropout_threshold(dropout_p)
    A = A.to(one.dtype)
    nothing = A.new_empty(0, A.shape[0])
    arguments = (_unit_columns(x), None, None, A, nothing, one, None, 1.0, threshold, seed, False)
    return torch.ops.ilora_native.forward.default(*arguments)[1]


def expand_xa(
    x: Tensor,
    xa: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base: None,
    B: Tensor,
    gate: Tensor,
    segments: Tensor | None,
    scaling: float,
) -> Tensor:
    """y [M, d_out] = x Wᵀ + b + (γ ⊙ xa) Bᵀ: the update of xa by an identity, then x Wᵀ accumulated onto it."""
    w_t = weight.t()
    pieces, eyes = _pieces(xa, x.dtype, B.dtype)
    arguments = (pieces, bias, None, eyes.t(), B, _compute_gate(gate, x), segments, scaling, 0, None)
    y = torch.ops.ilora_native.forward.default(*arguments, _through_float32(x, w_t))[0]
    return _add_product(y, _unit_columns(x), w_t)


def backward_dy(
    dy: Tensor, xa: Tensor, B: Tensor, gate: Tensor, segments: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dxa [M, R], dB, dgate): dxa comes out as the dx of an identity, in float32 at least."""
    dy, eye, stand_in = _unit_columns(dy), torch.eye(xa.shape[1], dtype=B.dtype, device=xa.device), xa.to(dy.dtype)
    arguments = (dy, stand_in, xa, eye, B, _compute_gate(gate, dy), segments, scaling, 0, None, True, True)
    dxa, _, dB, dgate = torch.ops.ilora_native.backward.default(*arguments)
    return dxa, dB, dgate.to(gate.dtype)


def backward_x(
    dxa: Tensor,
    x: Tensor,
    A: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    products: list[tuple[Tensor, Tensor]],
    need_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """(dx in x's dtype or None, dA): dxa comes in as the dy of an identity."""
    x, (pieces, eyes) = _unit_columns(x), _pieces(dxa, x.dtype, A.dtype)
    wide = need_dx and any(_through_float32(each, weight) for each, weight in products)
    threshold, one = dropout_threshold(dropout_p), _one(x)
    arguments = (pieces, x, dxa, A, eyes, one, None, 1.0, threshold, seed, need_dx, wide)
    dx, dA, _, _ = torch.ops.ilora_native.backward.default(*arguments)
    for each, weight in products if need_dx else ():
        dx = _accumulate(dx, _unit_columns(each), weight)
    return dx.to(x.dtype) if need_dx else None, dA


def decode(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    segments: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor] | None:
    """(y, xa) = (x Wᵀ + bias + base + ((x Aᵀ) ⊙ γ) Bᵀ, x Aᵀ) in one launch on x's GPU, without dropout.

    Takes up to 64 rows without a weight and 16 with one, R <= 128 and matrices whose columns lie side by side; None
    where these do not hold. Reads no values, waits for nothing, allocates y and xa alone: CUDA graphs may hold it.
    """
    matrices = [t for t in (x, weight, base, A, B) if t is not None]
    fits = len(x) <= (DECODE_ROWS if weight is None else DECODE_FUSED_ROWS) and len(A) <= DECODE_RANKS
    types = x.dtype in DECODE_DTYPES and gate.dtype in DECODE_DTYPES
    if not fits or not types or any(t.stride(1) != 1 and t.shape[1] > 1 for t in matrices):
        return None
    bias = None if bias is None else bias.contiguous()
    return torch.ops.ilora_native.decode.default(x, weight, bias, base, A, B, gate, segments, scaling)


def _add_product(out: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    """out + a b in a's dtype."""
    return (out if b is None else _accumulate(out, a, b)).to(a.dtype)


def _accumulate(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a b, in out's dtype. beta = 1 saves the pass that adding afterwards takes, but for a few rows MKL then
    rounds at every term of the sum, to ten times the error, and the pass costs nothing."""
    if a.shape[0] < 16:
        return out.add_(a.to(out.dtype) @ b.to(out.dtype))
    return out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _through_float32(a: Tensor, b: Tensor) -> bool:
    """Whether the frozen product a b is taken in float32 and rounded once.

    Without bfloat16 instructions torch multiplies bfloat16 matrices with naive loops, up to hundreds of times slower
    than in float32, temporary float32 copies included; only dot products of a few rows do not pay for those copies.
    """
    return a.dtype == torch.bfloat16 and not _HARDWARE_BFLOAT16 and (a.shape[0] >= 8 or b.stride(0) != 1)


_HARDWARE_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _compute_gate(gate: Tensor, x: Tensor) -> Tensor:
    return gate.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


def _pieces(ranks: Tensor, dtype: torch.dtype, factor: torch.dtype) -> tuple[Tensor, Tensor]:
    """(t [M, R] in dtype, an identity [R, R] in the factors'): their product is `ranks`. In bfloat16 t [M, 2R] is a sum
    of two terms side by side, which hold 16 bits, and the identity is there twice."""
    eye, high = torch.eye(ranks.shape[1], dtype=factor, device=ranks.device), ranks.to(dtype)
    if high.dtype == ranks.dtype:
        return high, eye
    return torch.cat([high, (ranks - high).to(dtype)], 1), torch.cat([eye, eye])


def _one(x: Tensor) -> Tensor:
    return x.new_ones(1, 1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _unit_columns(t: Tensor) -> Tensor:
    """Rows of consecutive elements, as the kernels read them; an expanded gradient has stride 0, for one."""
    return t if t.stride(1) == 1 or t.shape[1] < 2 else t.contiguous()
