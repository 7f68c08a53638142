"""What the settings of an adapter may be: those of a layer, which a model's config has too. Each is refused by name."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .backends import NAMES
from .checks import MAX_RANK

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
