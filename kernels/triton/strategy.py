"""How the frozen product and the update meet: a pure function of the device, shapes, strides and dtypes.

"beta": `expand` writes the update, and cuBLAS adds the frozen product to it (beta = 1). "fused": one kernel computes
both (fused_layer.py). By a count of launches and bytes on an H100 (M = 4096, R = 16), a forward and backward takes
2.19, 1.51, 1.23, 1.11 times as long as the frozen layer by "beta" and 1.54, 1.40, 1.29, 1.25 by "fused", at d = 1024,
2048, 4096, 8192: for small layers launches decide, for large ones the speed of the product.
ILORA_STRATEGY=beta or fused forces one, auto (the default) chooses. It is about `forward` and `backward`. The four
primitives, where ranks are shared between projections or already gated, always take "beta".
"""

import os

from torch import Tensor

from .device import Device
from .fused_layer import MAX_RANK, by_rows
from .tiles import misalignment

LARGEST = 2048  # the most features, in and out, for which "fused" is faster by the count above


def requested(strategy: str | None = None) -> str:
    """The strategy that was given, or else ILORA_STRATEGY, or else "auto"; raises ValueError for an unknown name."""
    name = strategy or os.environ.get("ILORA_STRATEGY") or "auto"
    if name not in ("beta", "fused", "auto"):
        raise ValueError(f"ILORA_STRATEGY={name!r}: expected beta, fused or auto")
    return name


def fuses(name: str, device: Device, x: Tensor, weight: Tensor | None, A: Tensor, product_of_x: Tensor | None) -> bool:
    """Whether "fused" computes y [M, D] = x [M, K] weightᵀ + …, where backward has dx for y and dy for x.

    name: what `requested` returned. weight: [D, K], or None. A: for its rank and dtype. product_of_x: the [R, K] matrix
    that the kernel multiplies x by to get the ranks, or None if it finds them summed. Raises ValueError if "fused" was
    requested and cannot run.
    """
    if name == "beta":
        return False
    reason = why_not_fused(device, x, weight, A, product_of_x)
    if name == "fused" and reason is not None:
        raise ValueError(f"ILORA_STRATEGY='fused' cannot run this layer: {reason}")
    return name == "fused" or (reason is None and weight is not None and max(weight.shape) <= LARGEST)


def why_not_fused(
    device: Device, x: Tensor, weight: Tensor | None, A: Tensor, product_of_x: Tensor | None
) -> str | None:
    """None if "fused" can run, else the reason. Arguments as of `fuses`."""
    if not device.tma:
        return "the device does not load tiles by tensor descriptor, as sm_90 and later do"
    if weight is None:
        return "there is no weight to read: the base layer is opaque"
    if x.dtype.itemsize != 2:
        return f"it computes in float16 and bfloat16, not {x.dtype}"
    if not x.dtype == weight.dtype == A.dtype:
        return f"the activations are {x.dtype}, the weight {weight.dtype}, A and B {A.dtype}: they must be one dtype"
    if len(A) > MAX_RANK:
        return f"rank {len(A)} is above {MAX_RANK}"
    if len(weight) % 8:
        return f"rows of {len(weight)} outputs are not a multiple of 16 bytes"
    reason = _why_not_described("the input", x) or _why_not_described("the weight", by_rows(weight)[0])
    if reason is None and product_of_x is not None:
        reason = _why_not_described("A or B", by_rows(product_of_x)[0])
    return reason


def _why_not_described(name: str, matrix: Tensor) -> str | None:
    """None if a tensor descriptor can stand for the matrix."""
    if matrix.stride(1) != 1 or matrix.stride(0) * 2 % 16 or matrix.stride(0) < matrix.shape[1]:
        return f"{name}'s strides {tuple(matrix.stride())} are not those of rows a multiple of 16 bytes long"
    return f"{name} does not start at a multiple of 16 bytes" if misalignment(matrix) else None
