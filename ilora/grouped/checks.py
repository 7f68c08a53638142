"""What a call of the grouped operation may look like. Every bad argument is refused here, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op.checks import FLOATS, MAX_RANK

_NAMES = ("x", "weight", "bias", "base", "A", "B", "gate", "offsets", "instances")


def check_tensors(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    offsets: Tensor,
    instances: Tensor,
) -> None:
    """Kinds, devices and shapes. Reads no values. Raises TypeError, ValueError naming the argument."""
    tensors = dict(zip(_NAMES, (x, weight, bias, base, A, B, gate, offsets, instances), strict=True))
    for name, tensor in tensors.items():
        _check_kind(name, tensor, x)
    M, d_in = _two("x", x, "[M, d_in]")
    if A.dim() != 3 or A.shape[2] != d_in:
        raise ValueError(f"A: expected [X, R, d_in={d_in}] to go with x {list(x.shape)}, got {list(A.shape)}")
    X, R = A.shape[:2]
    if not 1 <= R <= MAX_RANK:
        raise ValueError(f"A: expected a rank of 1 to {MAX_RANK}, got R={R} from {list(A.shape)}")
    if B.dim() != 3 or (B.shape[0], B.shape[2]) != (X, R) or B.shape[1] < 1:
        raise ValueError(f"B: expected [X={X}, d_out, R={R}] to go with A {list(A.shape)}, got {list(B.shape)}")
    d_out = B.shape[1]
    N, E = _two("gate", gate, "[N, E]")
    if E < 1 or R % E:
        raise ValueError(f"gate: its E={E} experts must divide the rank R={R}; gate is {list(gate.shape)}")
    shared = weight is not None and weight.dim() == 2
    _expect("weight", weight, [d_out, d_in] if shared else [X, d_out, d_in])
    _expect("bias", bias, [d_out] if shared else [X, d_out])
    _expect("base", base, [M, d_out])
    _expect("offsets", offsets, [X + 1])
    _expect("instances", instances, [M])


def check_offsets(offsets: Tensor, instances: Tensor, M: int, N: int) -> None:
    """Offsets rise from 0 to M, and instances are of the N. On a GPU the values stay unread, which would stop it.
    Raises ValueError."""
    if offsets.device.type != "cpu":
        return
    if offsets[0] != 0 or offsets[-1] != M or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"offsets: expected offsets rising from 0 to M={M}, got {offsets.tolist()[:16]}")
    if M and (instances.min() < 0 or instances.max() >= N):
        raise ValueError(
            f"instances: expected numbers from 0 to N-1={N - 1}, got {instances.min()} to {instances.max()}"
        )


def _check_kind(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None and name in ("weight", "bias", "base"):
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected it on x's device {x.device}, got {tensor.device}")
    if name in ("offsets", "instances"):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}: expected torch.int32, got {tensor.dtype}")
    elif tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, FLOATS))}, got {tensor.dtype}")
    if name in ("weight", "bias") and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: it is frozen here and gets no gradient; {name}.detach() says so")


def _two(name: str, tensor: Tensor, shape: str) -> tuple[int, int]:
    if tensor.dim() != 2 or tensor.shape[1] < 1:
        raise ValueError(f"{name}: expected {shape}, got {list(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def _expect(name: str, tensor: Tensor | None, shape: list[int]) -> None:
    if tensor is not None and list(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, got {list(tensor.shape)}")
