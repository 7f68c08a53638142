"""Checks the arguments of a call. Every error names the argument and says what was expected and what came."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from itertools import accumulate
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .backends import NAMES

MAX_RANK = 256
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    segments: Tensor | None,
) -> Tensor:
    """Checks types, devices and shapes, and returns the gate as [N, E]. It reads no values, so it costs no
    synchronisation and torch.compile can trace it."""
    _check_kinds(x, weight, bias, base, A, B, gate, segments)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected [..., d_in] with d_in >= 1, got {_shape(x)}")
    d_in = x.shape[-1]
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
    return _flat_gate(gate, segments, x, R)


def float_gate(gate: Any, expected: str = "", what: str = "gate", num_experts: int | None = None) -> Tensor:
    """The gate. Raises TypeError for anything but a float tensor, and ValueError where its last dimension is not
    num_experts. expected: its shape, in words; what: the name of the argument."""
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        got = gate.dtype if isinstance(gate, Tensor) else type(gate).__name__
        raise TypeError(f"{what}: expected a float tensor, {expected or '[N, num_experts]'}, got {got}")
    if num_experts is not None and gate.shape[-1:] != (num_experts,):
        raise ValueError(f"{what}: expected {expected or f'[N, num_experts={num_experts}]'}, got {_shape(gate)}")
    return gate


def gate_fits(N: int, leading: Sequence[int]) -> bool:
    """Whether the shape of x [*leading, d_in] tells which rows belong to which of N instances of equal length.

    N divides the first dimension (the rows of an instance are side by side, as beams are), or it is the product of the
    first few dimensions, as of [batch, choices, length, d_in]; of all of them for a token gate. Any other N would cut
    an instance in the middle of a sequence.
    """
    if N == 1 or (leading and N and leading[0] % N == 0):
        return True
    return N in blocks(leading)


def blocks(leading: Sequence[int]) -> list[int]:
    """[d0, d0·d1, …]: how many blocks x [d0, d1, …, d_in] consists of, by its first dimension, its first two, …"""
    return list(accumulate(leading, operator.mul))


def _flat_gate(gate: Tensor, segments: Tensor | None, x: Tensor, R: int) -> Tensor:
    """The gate as [N, E] if it fits x [..., d_in]; a gate [..., E] may have the first dimensions of x instead of N."""
    leading = x.shape[:-1]
    if gate.dim() > 2 and segments is None and gate.shape[:-1] == leading[: gate.dim() - 1]:
        gate = gate.flatten(0, -2)
    if gate.dim() != 2 or gate.shape[1] < 1:
        raise ValueError(
            f"gate: expected [N, E], one row of expert weights an instance, or x's first dimensions and E; "
            f"got {_shape(gate)} for x {_shape(x)}"
        )
    N, E = gate.shape
    if R % E:
        raise ValueError(f"gate: its E={E} experts must divide the rank R={R}; gate is {_shape(gate)}")
    if segments is None and not gate_fits(N, leading):
        known = [f"divide {leading[0]}", *(f"be {n}" for n in blocks(leading)[1:])] if leading else ["be 1"]
        raise ValueError(
            f"gate: {_shape(gate)} does not fit x {_shape(x)}: N={N} must {' or '.join(known)}; "
            "give segments=[N+1] row offsets where instances differ in length"
        )
    if segments is not None and tuple(segments.shape) != (N + 1,):
        raise ValueError(
            f"segments: expected [N+1={N + 1}] row offsets to go with gate {_shape(gate)}, got {_shape(segments)}"
        )
    return gate


def _misfit(x: Tensor, weight: Tensor | None, A: Tensor) -> str:
    """The error for an x and an A of different d_in. It blames x if the weight agrees with A."""
    if weight is not None and A.dim() == weight.dim() == 2 and A.shape[1] == weight.shape[1]:
        return f"x: expected [..., {A.shape[1]}], as weight {_shape(weight)} and A {_shape(A)} have it, got {_shape(x)}"
    return f"A: expected [R, d_in={x.shape[-1]}] to go with x {_shape(x)}, got {_shape(A)}"


_NAMES = ("x", "weight", "bias", "base", "A", "B", "gate", "segments")


def _check_kinds(*tensors: Tensor | None) -> None:
    device = getattr(tensors[0], "device", None)
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if tensor is None and name in ("weight", "bias", "base", "segments"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
            raise TypeError(f"{name}: expected a dense tensor, got {kind}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected it on x's device {device}, got {tensor.device}")
        if name == "segments":
            if tensor.dtype != torch.int32:
                raise TypeError(f"segments: expected torch.int32, got {tensor.dtype}")
        elif tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, FLOATS))}, got {tensor.dtype}")


def check_dtypes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, A: Tensor, B: Tensor
) -> None:
    """weight, bias and base have x's dtype. A and B have one dtype: x's, or float32 beside a 16-bit x."""
    for name, tensor in (("weight", weight), ("bias", bias), ("base", base)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    if A.dtype != B.dtype:
        raise TypeError(f"B: expected A's dtype {A.dtype}, got {B.dtype}")
    if A.dtype not in (x.dtype, torch.float32) or (x.dtype == torch.float64) != (A.dtype == torch.float64):
        raise TypeError(f"A, B: expected x's dtype {x.dtype}, or torch.float32 beside a 16-bit x, got {A.dtype}")


def check_segments(segments: Tensor | None, M: int) -> None:
    """The offsets rise from 0 to M. On a GPU their values are not read: each call would wait for the device."""
    if segments is None or segments.device.type != "cpu":
        return
    if segments[0] != 0 or segments[-1] != M or bool((segments[1:] < segments[:-1]).any()):
        raise ValueError(f"segments: expected offsets rising from 0 to M={M}, got {segments.tolist()[:16]}")


def checked_seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> int | Tensor | None:
    """The seed: None, an int of 64 bits, or a tensor with one int64 on the device."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed: expected one torch.int64 on {device}, got {seed.dtype} {_shape(seed)} on {seed.device}"
            )
    elif seed is not None:
        if not isinstance(seed, int):  # a symbolic int counts as one; operator.index would guard on its value
            if not hasattr(seed, "__index__"):
                raise TypeError(f"seed: expected an int, a tensor or None, got {type(seed).__name__}")
            seed = operator.index(seed)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected 64 bits, got {seed}")
    return seed


def as_number(name: str, value: Any) -> float:
    """The float in a Python number, another library's number or a tensor of one element. Raises TypeError for anything
    else, and for a tensor that asks for a gradient, since a number has none."""
    if isinstance(value, float):
        return value
    if isinstance(value, Tensor):
        if value.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name}: expected a number, got a tensor that requires a gradient, which it would not get; "
                "multiply the gate by it to learn a scaling, or detach it"
            )
        got = f"a tensor {_shape(value)} of {value.dtype} on {value.device}"
        if value.numel() != 1 or value.is_complex() or value.is_meta:
            raise TypeError(f"{name}: expected a number, got {got}")
        return float(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{name}: expected a number, got {value!r}")


def rows(x: Tensor) -> int:
    """M: the leading dimensions of x [..., d], flattened."""
    return math.prod(x.shape[:-1])


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


# The settings of an adapter, which ILoRALinear takes and ILoRAConfig has.
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
