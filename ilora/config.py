"""What to adapt and how: ILoRAConfig, and which modules of a model it means."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn

from .backends import NAMES
from .bases import is_linear
from .layer import ILoRALinear

ALL_LINEAR = "all-linear"
_DTYPES = (None, "float16", "bfloat16", "float32", "float64")


TASK_HEADS = {  # of transformers' classes, by the end of their names
    "ForSequenceClassification": ("classifier", "score"),
    "ForTokenClassification": ("classifier", "score"),
    "ForQuestionAnswering": ("qa_outputs",),
    "ForMultipleChoice": ("classifier",),
}


@dataclass(frozen=True)
class ILoRAConfig:
    """The settings of an adapter. Names follow PEFT's LoraConfig.

    Args:
        r: total rank of a layer, shared by its experts: as many parameters as a LoRA of the same r.
        lora_alpha: scaling = lora_alpha / (r / num_experts).
        lora_dropout: 0 <= p < 1, on the low-rank path, in training mode.
        num_experts: E, which divides r; the gate's width.
        target_modules: names or path endings ("q_proj", "mlp.up_proj"), one regular expression for the whole path, or
            "all-linear": every linear layer but the output head. The head of a transformers classifier (classes called
            ForSequenceClassification and the like) then joins modules_to_save.
        exclude_modules: names, path endings or one regular expression of modules to leave out.
        modules_to_save: names or path endings of modules to train whole, and to save with the adapter.
        layers_to_transform: indices of the blocks to adapt; a module's index is the first number in its path.
        rank_pattern, alpha_pattern: r and lora_alpha of single modules, {path ending or regular expression: value}.
        expert_pattern: number of experts of single modules. It divides num_experts: such a layer weighs each of its
            experts with the sum of the gates of E / E' neighbours.
        adapter_dtype: "float32" and so on for lora_A and lora_B; None means the base layer's.
        backend: as in `ilora.ilora_linear`.
    Raises: TypeError, ValueError naming the field.
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
    adapter_dtype: str | None = None
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

    def layer_settings(self, path: str) -> dict[str, Any]:
        """r, num_experts and lora_alpha of the module at this path, its patterns applied.
        Raises ValueError where they do not fit each other."""
        r = _patterned(self.rank_pattern, path, self.r)
        experts = _patterned(self.expert_pattern, path, self.num_experts)
        if self.num_experts % experts or r % experts:
            raise ValueError(
                f"{path}: r={r} and num_experts={experts} from the patterns; the experts must divide r, and "
                f"the config's num_experts={self.num_experts}"
            )
        return {"r": r, "num_experts": experts, "lora_alpha": _patterned(self.alpha_pattern, path, self.lora_alpha)}


def _check(config: ILoRAConfig) -> None:
    def expect(name: str, good: bool, what: str) -> None:
        if not good:
            value = getattr(config, name)
            raise (TypeError if "expected a" in what else ValueError)(f"{name}: {what}, got {value!r}")

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    for name in ("r", "num_experts"):
        value = getattr(config, name)
        expect(name, isinstance(value, int) and not isinstance(value, bool), "expected an int")
        expect(name, value >= 1, "must be at least 1")
    for name in ("lora_alpha", "lora_dropout"):
        expect(name, number(getattr(config, name)), "expected a number")
    expect("lora_alpha", abs(config.lora_alpha) < float("inf"), "must be finite")
    expect("lora_dropout", 0.0 <= config.lora_dropout < 1.0, "must be 0 <= p < 1")
    if config.r % config.num_experts:
        raise ValueError(f"r={config.r}, num_experts={config.num_experts}: the experts must divide the rank evenly")
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(config, name)
        names = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
        expect(name, names or isinstance(value, str), "expected a name or names")
        if isinstance(value, str) and value != ALL_LINEAR:
            _regex(name, value)
    layers = config.layers_to_transform
    numbers = isinstance(layers, tuple) and all(type(v) is int for v in layers)
    expect("layers_to_transform", numbers or layers is None, "expected a list of ints")
    for name in ("rank_pattern", "alpha_pattern", "expert_pattern"):
        value = getattr(config, name)
        ok = value is None or (
            isinstance(value, dict) and all(isinstance(k, str) and number(v) for k, v in value.items())
        )
        expect(name, ok, "expected a dict from names to numbers")
        finite = all(abs(v) < float("inf") for v in (value or {}).values())
        expect(name, finite, "must hold finite numbers")
        if name != "alpha_pattern":
            expect(name, all(type(v) is int and v >= 1 for v in (value or {}).values()), "must hold positive ints")
        for key in value or {}:
            _regex(name, key)
    expect("adapter_dtype", config.adapter_dtype in _DTYPES, f"must be one of {_DTYPES}")
    expect("backend", config.backend in (None, *NAMES), f"must be None or one of {NAMES}")


def _regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def named(path: str, names: str | Iterable[str]) -> bool:
    """Whether the path is meant: by a regular expression for all of it, or by one of several path endings."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(_ends(path, name) for name in names)


def _patterned(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    for key, value in (patterns or {}).items():
        if _ends(path, key) or re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default


def block_of(path: str) -> str | None:
    """The block that a module belongs to, such as "model.layers.3": its path up to the first number."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
    return match.group() if match else None


def with_head(model: nn.Module, config: ILoRAConfig) -> ILoRAConfig:
    """With "all-linear" the head of a classifier is trained whole, and so saved, as PEFT does for such tasks: it was
    made anew when the model was loaded, and the next time it would be another."""
    if config.target_modules != ALL_LINEAR:
        return config
    heads = next((heads for ending, heads in TASK_HEADS.items() if type(model).__name__.endswith(ending)), ())
    here = [name for name, _ in model.named_children() if name in heads]
    new = [name for name in here if not named(name, config.modules_to_save) and not named(name, config.exclude_modules)]
    return replace(config, modules_to_save=(*config.modules_to_save, *new)) if new else config


def find_targets(model: nn.Module, config: ILoRAConfig) -> list[str]:
    """The paths of the linear layers to adapt, in the model's order.
    Raises ValueError where a matched module cannot take an adapter, or nothing matched."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    everything = config.target_modules == ALL_LINEAR
    targets: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        block = block_of(path)
        index = int(block.rsplit(".", 1)[-1]) if block else None
        if config.layers_to_transform is not None and index not in config.layers_to_transform:
            continue
        if named(path, config.exclude_modules) or _inside(path, config.modules_to_save):
            continue
        if everything:
            wanted = is_linear(module) and module is not head
        else:
            wanted = bool(path) and named(path, config.target_modules)
        if wanted and targets and path.startswith(targets[-1] + "."):
            continue  # a part of a layer that is adapted as a whole
        if wanted:
            _refuse_unfit(model, path, module)
            targets.append(path)
    if not targets:
        raise ValueError(_nothing_matched(model, config))
    return targets


def _inside(path: str, names: tuple[str, ...]) -> bool:
    parts = path.split(".")
    return any(named(".".join(parts[: i + 1]), names) for i in range(len(parts)))


def _refuse_unfit(model: nn.Module, path: str, module: nn.Module) -> None:
    if isinstance(module, ILoRALinear):
        raise ValueError(f"{path}: it is an ILoRALinear already")
    if not is_linear(module):
        raise ValueError(
            f"{path}: target_modules matches this {type(module).__name__}, which is no linear layer; "
            "make the name longer, or list it in exclude_modules"
        )
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(f"{path}: nn.MultiheadAttention reads this weight without calling the layer; exclude it")
    if re.search(r"(^|\.)experts\.\w*\d+(\.|$)", path):
        raise ValueError(
            f"{path}: an expert of a sparse mixture sees a routed part of the rows, so a gate for each instance cannot "
            r"be mapped to them; leave the experts out, e.g. exclude_modules=r'.*\.experts\..*'"
        )


def _nothing_matched(model: nn.Module, config: ILoRAConfig) -> str:
    paths = [path for path, module in model.named_modules() if path and is_linear(module)]
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    return (
        f"no module of {type(model).__name__} matches target_modules={config.target_modules!r} with "
        f"exclude_modules={config.exclude_modules!r}, layers_to_transform={config.layers_to_transform}; "
        f"its linear layers end in {', '.join(names) or 'nothing: it has none'}"
    )
