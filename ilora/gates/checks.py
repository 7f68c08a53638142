"""Checks of gates, which are float tensors with a weight for each expert in the last dimension, and of settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..op.checks import float_gate


def gate_rows(gate: Any) -> Tensor:
    """A gate [N, E] or [G, N, E] of at least one instance, in float32 or wider. Raises ValueError, TypeError."""
    gate = float_gate(gate, "[N, E] or [G, N, E]")
    if gate.dim() not in (2, 3) or 0 in gate.shape:
        raise ValueError(f"gate: expected [N, E] or [G, N, E], not empty, got {list(gate.shape)}")
    return gate.to(torch.promote_types(gate.dtype, torch.float32))


def one_gate(gate: Any, num_experts: int, blocks: int, what: str) -> Tensor:
    """One gate for a whole model, [1, E] or [blocks, E] from [E], [1, E] or [blocks, 1, E].
    Raises ValueError, TypeError in the name of `what`."""
    E = num_experts
    expected = f"one user's gate, [{E}] or [1, {E}] or, with one for each block, [{blocks}, 1, {E}]"
    if float_gate(gate, expected, what, E).shape not in ((E,), (1, E), (blocks, 1, E)):
        raise ValueError(f"{what}: expected {expected}, got {list(gate.shape)}")
    return gate.reshape(-1, E)


def expect(ok: bool, name: str, expected: str, value: object) -> None:
    """Raises ValueError naming the setting unless ok."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def is_int(value: object, low: int = 1) -> bool:
    """Whether it is an int from low to 2**31 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**31


def is_real(value: object, low: float, high: float = 1e9) -> bool:
    """Whether it is an int or float, low <= value < high."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high
