"""The native backend: C++ loops for the four primitives on the CPU, and torch's matrix multiplication for the frozen
layer. Each function takes 2-D tensors that have been checked, as in `reference`. The libraries are built when ilora is
installed (see setup.py).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import dropout_threshold

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
FEW_ROWS = 16
DECODE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DECODE_ROWS, DECODE_FUSED_ROWS, DECODE_RANKS = 64, 16, 128  # as csrc/cuda/decode.h has them


def _load(name: str, needs: str, variable: str) -> str | None:
    """Registers the ops of a library; returns the reason when that cannot be done."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        checkout = Path(__file__).resolve().parents[2]  # it hides an installed ilora from a Python that starts there
        here, what = (f" in {checkout}", f"-e {checkout}") if (checkout / "setup.py").exists() else ("", ".")
        return (
            f"it was not built{here}; it needs torch and {needs}; "
            f"this builds it or says what fails: {variable}=1 pip install --no-build-isolation {what}"
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
    return _UNAVAILABLE or _load("ilora._native_cuda", "nvcc, and the torch for CUDA", "ILORA_BUILD_CUDA")


def _load_call() -> tuple[Any, str | None]:
    """(the function ilora_linear of ilora._call or None, the reason why not)."""
    if _UNAVAILABLE is not None:
        return None, _UNAVAILABLE
    again = "ILORA_BUILD_CALL=1 pip install --no-build-isolation builds it"
    try:
        call = importlib.import_module("ilora._call")
    except ImportError as error:
        return None, f"it was not built, or not for torch {torch.__version__} ({error}); {again}"
    if call.torch_version != torch.__version__:
        return None, f"it was built for torch {call.torch_version}, and this is torch {torch.__version__}; {again}"
    call.set_hardware_bfloat16(_HARDWARE_BFLOAT16)
    return call.ilora_linear, None


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
    """(y [M, d_out], xa [M, R]). A few rows are one call of C++, which is quicker than two."""
    if weight is not None and seed is None and len(x) < FEW_ROWS and not through_float32(x, weight.t()):
        op = torch.ops.ilora_native.decode.default
        return op(x, weight, bias, None, A, B, dense_gate(gate, x), segments, scaling)
    xa = shrink_x(x, A, dropout_p, seed)
    return expand_xa(x, xa, weight, bias, base, B, gate, segments, scaling), xa


def shrink_x(x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """xa [M, R] = dropout(x) Aᵀ."""
    return torch.ops.ilora_native.shrink_x.default(x, A, dropout_threshold(dropout_p), seed)


def expand_xa(
    x: Tensor,
    xa: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    B: Tensor,
    gate: Tensor,
    segments: Tensor | None,
    scaling: float,
) -> Tensor:
    """y [M, d_out] = x Wᵀ + b + (γ ⊙ xa) Bᵀ, or base + (γ ⊙ xa) Bᵀ: the update first, then x Wᵀ added onto it."""
    product = () if weight is None else ((x, weight.t()),)
    wide = any(through_float32(*each) for each in product)
    y = torch.ops.ilora_native.expand_xa.default(
        x, xa, bias if product else None, None if product else base, B, dense_gate(gate, x), segments, scaling, wide
    )
    return add_products(y, product).to(x.dtype)


def backward_dy(
    dy: Tensor, xa: Tensor, B: Tensor, gate: Tensor, segments: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dxa [M, R], dB [d_out, R], dgate [N, E]); dxa is float32, beside float64 it is float64."""
    dxa, dB, dgate = torch.ops.ilora_native.backward_dy.default(dy, xa, B, dense_gate(gate, dy), segments, scaling)
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
    """(dx [M, d_in] in x's dtype or None, dA [R, d_in]): dropout(dxa A) first, then each product dy W added onto it."""
    wide = need_dx and any(through_float32(*each) for each in products)
    dx, dA = torch.ops.ilora_native.backward_x.default(dxa, x, A, dropout_threshold(dropout_p), seed, need_dx, wide)
    return add_products(dx, products).to(x.dtype) if need_dx else None, dA


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


def add_products(out: Tensor, products: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """out += Σ a b. With beta = 1 this saves a pass over out; but for a few rows or columns MKL then rounds at every
    term of the sum, to ten times the error, and the pass costs nothing."""
    for a, b in products:
        if min(out.shape) < FEW_ROWS:
            out.add_(a.to(out.dtype) @ b.to(out.dtype))
        else:
            out.addmm_(a.to(out.dtype), b.to(out.dtype))
    return out


def through_float32(a: Tensor, b: Tensor) -> bool:
    """Whether the frozen product a b is taken in float32 and rounded once.

    Without bfloat16 instructions torch multiplies bfloat16 matrices with naive loops, up to hundreds of times slower
    than in float32, temporary float32 copies included; only dot products of a few rows do not pay for those copies.
    """
    return a.dtype == torch.bfloat16 and not _HARDWARE_BFLOAT16 and (a.shape[0] >= 8 or b.stride(0) != 1)


_HARDWARE_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def dense_gate(gate: Tensor, x: Tensor) -> Tensor:
    """The gate as the kernels read it."""
    return gate.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


# A call of `ilora_linear` in one step of C++, for the common case on the CPU; see csrc/call/call.cpp.
DIRECT_CALL, CALL_UNAVAILABLE = _load_call()
