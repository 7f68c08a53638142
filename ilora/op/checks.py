"""What a call may look like. Every bad argument is refused here, by name, with what was expected and what came."""

from __future__ import annotations

import math
import operator
import sys
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .backends import NAMES

MAX_RANK = 256
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    segments: Tensor | None,
) -> None:
    """Kinds, devices and shapes. Reads no values, so it costs no synchronisation and traces under torch.compile."""
    _check_kinds(x, weight, bias, base, A, B, gate, segments)
    if x.layout is not torch.strided:
        raise TypeError(f"x: expected a dense tensor, got one of layout {x.layout}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected [..., d_in] with d_in >= 1, got {_shape(x)}")
    d_in, M = x.shape[-1], rows(x)
    if A.dim() != 2 or A.shape[1] != d_in:
        raise ValueError(_misfit(x, weight, A))
    R = A.shape[0]
    if not 1 <= R <= MAX_RANK:
        raise ValueError(f"A: expected a rank of 1 to {MAX_RANK}, got R={R} from {_shape(A)}")
    if B.dim() != 2 or B.shape[1] != R:
        raise ValueError(f"B: expected [d_out, R={R}] to go with A {_shape(A)}, got {_shape(B)}")
    d_out = B.shape[0]
    if d_out < 1:
        raise ValueError(f"B: expected [d_out, R={R}] with d_out >= 1, got {_shape(B)}")
    if weight is not None and tuple(weight.shape) != (d_out, d_in):
        raise ValueError(f"weight: expected [d_out={d_out}, d_in={d_in}] from B and x, got {_shape(weight)}")
    if bias is not None and tuple(bias.shape) != (d_out,):
        raise ValueError(f"bias: expected [d_out={d_out}], got {_shape(bias)}")
    if base is not None and tuple(base.shape) != (*x.shape[:-1], d_out):
        raise ValueError(f"base: expected {[*x.shape[:-1], d_out]} to go with x {_shape(x)}, got {_shape(base)}")
    _check_gate(gate, segments, M, R)


def float_gate(gate: Any, expected: str, what: str = "gate") -> Tensor:
    """The gate. Raises TypeError for anything but a float tensor. expected: its shape, in words; what: who asks."""
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        got = gate.dtype if isinstance(gate, Tensor) else type(gate).__name__
        raise TypeError(f"{what}: expected a float tensor, {expected}, got {got}")
    return gate


def _misfit(x: Tensor, weight: Tensor | None, A: Tensor) -> str:
    """What is wrong where x and A have no d_in in common: x, if the weight agrees with A."""
    if weight is not None and A.dim() == weight.dim() == 2 and A.shape[1] == weight.shape[1]:
        return f"x: expected [..., {A.shape[1]}], as weight {_shape(weight)} and A {_shape(A)} have it, got {_shape(x)}"
    return f"A: expected [R, d_in={x.shape[-1]}] to go with x {_shape(x)}, got {_shape(A)}"


def _check_gate(gate: Tensor, segments: Tensor | None, M: int, R: int) -> None:
    if gate.dim() != 2 or gate.shape[1] < 1:
        raise ValueError(f"gate: expected [N, E], one row of expert weights an instance, got {_shape(gate)}")
    N, E = gate.shape
    if R % E:
        raise ValueError(f"gate: its E={E} experts must divide the rank R={R}; gate is {_shape(gate)}")
    if segments is None:
        if (N == 0 and M > 0) or (N > 0 and M % N):
            raise ValueError(
                f"gate: its N={N} rows do not divide the M={M} rows of x evenly; "
                "pass segments=[N+1] row offsets where instances differ in length"
            )
    elif tuple(segments.shape) != (N + 1,):
        raise ValueError(
            f"segments: expected [N+1={N + 1}] row offsets to go with gate {_shape(gate)}, got {_shape(segments)}"
        )


def _check_kinds(x: Tensor, *others: Tensor | None) -> None:
    for name, tensor in zip(("x", "weight", "bias", "base", "A", "B", "gate", "segments"), (x, *others), strict=True):
        if tensor is None and name in ("weight", "bias", "base", "segments"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected it on x's device {x.device}, got {tensor.device}")
        if name == "segments":
            if tensor.dtype != torch.int32:
                raise TypeError(f"segments: expected torch.int32, got {tensor.dtype}")
        elif tensor.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, _FLOATS))}, got {tensor.dtype}")


def check_dtypes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, A: Tensor, B: Tensor, gate: Tensor
) -> None:
    """The combinations that are defined: the layer in one dtype; A and B in it too, or float32 beside 16 bits."""
    for name, tensor in (("weight", weight), ("bias", bias), ("base", base)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    if A.dtype != B.dtype:
        raise TypeError(f"B: expected A's dtype {A.dtype}, got {B.dtype}")
    if A.dtype not in (x.dtype, torch.float32) or (x.dtype == torch.float64) != (A.dtype == torch.float64):
        raise TypeError(f"A, B: expected x's dtype {x.dtype}, or torch.float32 beside a 16-bit x, got {A.dtype}")


def check_segments(segments: Tensor | None, M: int) -> None:
    """The offsets rise from 0 to M. On a GPU the values stay unread: that would stop the stream on every call."""
    if segments is None or segments.device.type != "cpu":
        return
    if segments[0] != 0 or segments[-1] != M or bool((segments[1:] < segments[:-1]).any()):
        raise ValueError(f"segments: expected offsets rising from 0 to M={M}, got {segments.tolist()[:16]}")


def checked_seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> int | Tensor | None:
    """The seed as an int that fits 64 bits, or as it came: one int64 on the device, or None."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed: expected one torch.int64 on {device}, got {seed.dtype} {_shape(seed)} on {seed.device}"
            )
    elif seed is not None:
        if not isinstance(seed, int):  # numpy's integers; of torch's symbolic ones an index would be a guard
            if not hasattr(seed, "__index__"):
                raise TypeError(f"seed: expected an int, a tensor or None, got {type(seed).__name__}")
            seed = operator.index(seed)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected 64 bits, got {seed}")
    return seed


def as_number(name: str, value: Any) -> float:
    """A setting that is no Python number: one of another library, or of one element. Raises TypeError for others."""
    if isinstance(value, (Real, Tensor)):
        return float(value)
    raise TypeError(f"{name}: expected a number, got {value!r}")


def rows(x: Tensor) -> int:
    """M: the leading dimensions of x [..., d], flattened."""
    return math.prod(x.shape[:-1])


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


# The settings of an adapter: those of a layer, which a model's config has too.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def check_settings(r: Any, num_experts: Any, lora_alpha: Any, lora_dropout: Any, backend: Any) -> None:
    """Raises TypeError, ValueError naming the setting."""
    for name, value in (("r", r), ("num_experts", num_experts)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if r > MAX_RANK:
        raise ValueError(f"r: must be at most {MAX_RANK}, got {r}")
    if r % num_experts:
        raise ValueError(f"r={r}, num_experts={num_experts}: the experts must divide the rank evenly")
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if not is_number(value):
            raise TypeError(f"{name}: expected a number, got {value!r}")
    if not is_finite(lora_alpha):
        raise ValueError(f"lora_alpha: must be finite, got {lora_alpha}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout: must be 0 <= p < 1, got {lora_dropout}")
    if backend not in (None, *NAMES):
        raise ValueError(f"backend: must be None or one of {NAMES}, got {backend!r}")


def dtype_named(dtype: Any) -> torch.dtype | None:
    """The adapter_dtype of this name, or the very dtype; None means the base's. Raises ValueError for another."""
    if dtype is None or any(dtype is known for known in DTYPES.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"adapter_dtype: must be one of {(None, *DTYPES)}, as a name or a torch.dtype, got {dtype!r}")
    return DTYPES[dtype]


def dtype_name(dtype: Any) -> str | None:
    """The name of an adapter_dtype, which a file can hold. Raises as `dtype_named`."""
    found = dtype_named(dtype)
    return None if found is None else str(found).removeprefix("torch.")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: float) -> bool:
    return abs(value) <= sys.float_info.max  # also of an int that no float holds
