"""ILoRAConfig: what to adapt and how."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..op.checks import MAX_RANK, check_settings, dtype_name, is_finite, is_number

ALL_LINEAR = "all-linear"
PATTERNS = ("rank_pattern", "alpha_pattern", "expert_pattern")


@dataclass(frozen=True)
class ILoRAConfig:
    """The settings of an adapter. Names follow PEFT's LoraConfig.

    Args:
        r: total rank of a layer, 1 to 256, shared by its experts: as many parameters as a LoRA of the same r.
        lora_alpha: scaling = lora_alpha / (r / num_experts).
        lora_dropout: 0 <= p < 1, on the low-rank path, in training mode.
        num_experts: E, which divides r; the gate's width.
        target_modules: names or path endings ("q_proj", "mlp.up_proj"), one regular expression for the whole path, or
            "all-linear": every linear layer but the output head, and the fused experts of sparse mixtures, which are
            meant by the name of their module ("experts") otherwise.
        exclude_modules: names, path endings or one regular expression of modules to leave out.
        modules_to_save: names, path endings or "^" and a whole path, of modules to train whole (all of their
            parameters) and to save with the adapter. For a task class of transformers (ForSequenceClassification and
            the like) `inject` and `add_adapter` add its head, unless exclude_modules names it, or target_modules by a
            name that no other module has.
        layers_to_transform: indices of the blocks to adapt; a module's index is the first number in its path.
        rank_pattern, alpha_pattern: r and lora_alpha of single modules, {path ending or regular expression: value}.
        expert_pattern: the number of experts E' of single modules, which divides num_experts. Each expert of such a
            layer is weighted by the sum of E / E' neighbouring gates.
        adapter_dtype: of lora_A and lora_B, as "float32" or torch.float32 (kept as a string); None means the base
            layer's.
        backend: as in `ilora.ilora_linear`.
    Raises: TypeError, ValueError naming the field. `inject` and `add_adapter` refuse names, patterns and blocks that
        are not in the model.
    """

    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    num_experts: int = 4
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    expert_pattern: dict[str, int] | None = None
    adapter_dtype: str | torch.dtype | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save: expected a list of names, got the string {self.modules_to_save!r}")
        if isinstance(self.layers_to_transform, int):
            object.__setattr__(self, "layers_to_transform", (self.layers_to_transform,))
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set, frozenset)):
                object.__setattr__(self, name, tuple(sorted(value) if isinstance(value, (set, frozenset)) else value))
        object.__setattr__(self, "adapter_dtype", dtype_name(self.adapter_dtype))
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `ILoRAConfig.from_dict` gives an equal config."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ILoRAConfig:
        """Raises ValueError for unknown fields, TypeError for values of another kind."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"ILoRAConfig has no field {', '.join(map(repr, unknown))}")
        return cls(**values)


def _check(config: ILoRAConfig) -> None:
    def expect(name: str, good: bool, what: str) -> None:
        if not good:
            value = getattr(config, name)
            raise (TypeError if "expected a" in what else ValueError)(f"{name}: {what}, got {value!r}")

    check_settings(config.r, config.num_experts, config.lora_alpha, config.lora_dropout, config.backend)
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(config, name)
        names = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
        expect(name, names or isinstance(value, str), "expected a name or names")
        if isinstance(value, str) and value != ALL_LINEAR:
            _regex(name, value)
    layers = config.layers_to_transform
    numbers = isinstance(layers, tuple) and all(type(v) is int for v in layers)
    expect("layers_to_transform", numbers or layers is None, "expected a list of ints")
    for name in PATTERNS:
        value = getattr(config, name)
        ok = value is None or (
            isinstance(value, dict) and all(isinstance(k, str) and is_number(v) for k, v in value.items())
        )
        expect(name, ok, "expected a dict from names to numbers")
        values = (value or {}).values()
        expect(name, all(map(is_finite, values)), "must hold finite numbers")
        if name != "alpha_pattern":
            expect(name, all(type(v) is int and v >= 1 for v in values), "must hold positive ints")
        if name == "rank_pattern":
            expect(name, all(v <= MAX_RANK for v in values), f"must hold ranks of at most {MAX_RANK}")
        for key in value or {}:
            _regex(name, key)


def _regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None
