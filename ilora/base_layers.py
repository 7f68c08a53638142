"""Facts about the frozen modules that get an adapter: sizes, dtype, device, norms, 4-bit packing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

NESTS = "use_nested_tensor"  # an attribute of nn.TransformerEncoder: whether it may make nested tensors
PACKS = "support_avx512bf16_for_cpu"  # an attribute of bitsandbytes' Linear4bit: whether it may pack its weights


def is_conv1d(base: nn.Module) -> bool:
    # By its name, since transformers may not be installed. Its weight is [d_in, d_out].
    return (type(base).__module__, type(base).__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Whether ILoRALinear can wrap this module: an nn.Linear, a Conv1D, or one with in_features and out_features."""
    if type(module).__name__.endswith("Router"):
        return False  # some of transformers' are subclasses of nn.Linear and return scores and indices
    if is_conv1d(module) or isinstance(module, nn.Linear):
        return True
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    return all(isinstance(size, int) for size in sizes) and not adapted(module)


def features_of(base: nn.Module) -> tuple[int, int]:
    """(d_in, d_out). Raises TypeError for a module that ILoRALinear cannot wrap."""
    if adapted(base):
        raise TypeError("base_layer: expected a layer without an adapter, got an ILoRALinear already")
    if is_conv1d(base):
        d_in, d_out = cast(Tensor, base.weight).shape
        return d_in, d_out
    sizes = tuple(getattr(base, name, None) for name in ("in_features", "out_features"))
    if not all(isinstance(size, int) for size in sizes):
        raise TypeError(
            "base_layer: expected nn.Linear, transformers' Conv1D or a module with integer in_features and "
            f"out_features, got {type(base).__name__} with in_features={sizes[0]!r}, out_features={sizes[1]!r}"
        )
    return sizes  # type: ignore[return-value]


def adapter_like(base: nn.Module, dtype: torch.dtype | None) -> Tensor:
    """An empty tensor on the base's device, in this dtype, or in the base's if that is a float of 16 bits or more."""
    tensor = next((t for t in (*base.parameters(), *base.buffers())), torch.empty(0))
    if dtype is None:
        dtype = tensor.dtype if tensor.is_floating_point() and tensor.itemsize > 1 else torch.float32
    return torch.empty(0, dtype=dtype, device=compute_device(base))


def compute_device(module: nn.Module) -> torch.device | None:
    """The device a module computes on: that of its first tensor, or the one accelerate copies offloaded weights to.
    None for a module without tensors."""
    for owner in module.modules():
        tensor = next((t for t in (*owner._parameters.values(), *owner._buffers.values()) if t is not None), None)
        if tensor is not None:
            return offloading_to(owner) or tensor.device
    return None


def offloading_to(module: nn.Module) -> torch.device | None:
    """Where accelerate copies this module's own weights for each forward; None if they are not offloaded."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and each.execution_device is not None:
            return torch.device(each.execution_device)
    return None


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """The norm layers with running statistics of which no parameter is trained."""
    return [
        norm
        for norm in model.modules()
        if isinstance(norm, _NormBase)
        and norm.running_mean is not None
        and not any(parameter.requires_grad for parameter in norm.parameters())
    ]


def frozen_experts(model: nn.Module) -> dict[str, int]:
    """The experts of sparse mixtures that no adapter changes and that are frozen: how many weights each has, by path.

    Experts are a module in the model's own list or tensor of experts: of a class called ...Experts, or below a module
    called experts."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        parts, parent = path.split("."), model.get_submodule(path.rpartition(".")[0])
        own = type(module).__name__.endswith("Experts")
        if adapted(module) or (path and adapted(parent)) or not (own or "experts" in parts):
            continue
        count = sum(weights_in(p) for p in module.parameters(recurse=False) if not p.requires_grad)
        if count:
            top = path if own else ".".join(parts[: parts.index("experts") + 1])
            found[top] = found.get(top, 0) + count
    return found


def weights_in(parameter: nn.Parameter) -> int:
    """How many values it has; 4-bit weights count each of theirs, of which bitsandbytes packs two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def adapted(module: nn.Module) -> bool:
    return hasattr(module, "gate_state")  # not isinstance: the file of ILoRALinear imports this one


def keep_unpacked(module: nn.Module) -> list[nn.Module]:
    """Keeps bitsandbytes from packing the 4-bit weights in a module for inference, and unpacks what it has packed.

    On CPUs with AVX512-BF16 it packs them at the first forward in eval mode. From then on no gradient passes such a
    layer, without an error. Returns the modules that would pack, for `let_pack`.
    """
    found = [each for each in module.modules() if getattr(each, PACKS, False)]
    for each in found:
        setattr(each, PACKS, False)
        if getattr(getattr(each.weight, "quant_state", None), "packing_format_for_cpu", False):
            each.state_dict()  # unpacks the weight
    return found


def let_pack(modules: list[nn.Module]) -> None:
    """Undoes `keep_unpacked`."""
    for module in modules:
        setattr(module, PACKS, True)


class WeightReads:
    """Notices layers whose weight is read and that are not called, so that their update is left out. Layers go by their
    names. Compiled code is not recorded.

    called, read: the layers that this forward has called, and those whose weight it has read. copied: the layers whose
    weight was read before this forward, perhaps to make another layer of it, and that were not called since.
    """

    def __init__(self, copied: Iterable[str] = ()) -> None:
        self.called: set[str] = set()
        self.read: set[str] = set()
        self.copied: set[str] = set(copied)
        self._parents: set[str] = set()  # the paths of copied layers' parents that this forward has called
        self._hooks: list[Any] = []

    def begin(self) -> None:
        """To call before a forward, and after one under no gate."""
        if self.read or self.copied:
            self.copied = (self.copied | self.read) - self.called
        self.called.clear()
        self.read.clear()
        self._parents.clear()
        while self._hooks:
            self._hooks.pop().remove()

    def watch(self, model: nn.Module) -> None:
        """To call after `begin` if there are copied layers: records which of their parents this forward of the model
        calls. A parent that is no longer in the model counts as called."""
        for path in {name.rpartition(".")[0] for name in self.copied}:
            try:
                parent = model.get_submodule(path)
            except AttributeError:
                parent = model
            if parent is model:
                self._parents.add(path)
            else:
                self._hooks.append(parent.register_forward_pre_hook(self._note(path)))

    def _note(self, path: str) -> Any:
        def hook(*_: Any) -> None:
            if not torch.compiler.is_compiling():  # which does not record the layer's call either
                self._parents.add(path)

        return hook

    def refuse(self) -> None:
        """To call after a forward under a gate. Raises RuntimeError naming the layers that it left out."""
        left_out = sorted(self.read - self.called)
        if left_out:
            raise RuntimeError(
                f"{left_out[0]}: the model reads this layer's weight and does not call it, so its update would be left "
                f"out ({len(left_out)} such); {_exclude(left_out)}"
            )
        waiting = sorted(self.copied - self.called) if self.copied else []
        replaced = [name for name in waiting if name.rpartition(".")[0] in self._parents]
        self.begin()
        if replaced:
            raise RuntimeError(
                f"{replaced[0]}: this layer's weight was read between two forwards, and now the layer is not called "
                f"({len(replaced)} such), so another layer that was made of the weight would have no update; undo "
                f"that (in diffusers: unfuse_qkv_projections), or fuse before inject and adapt the fused layer, or "
                f"{_exclude(replaced)}; code that only looks at a weight should read base_layer.weight"
            )


def _exclude(names: list[str]) -> str:
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    return f"exclude_modules={endings} of ILoRAConfig, or their whole paths, helps"


def keep_padded(model: nn.Module) -> list[nn.Module]:
    """Keeps nn.TransformerEncoder from making a nested tensor of a padded batch, which ILoRALinear cannot read. Returns
    the modules that would, for `let_nest`."""
    found: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and getattr(m, NESTS, False)
    ]
    for module in found:
        setattr(module, NESTS, False)
    return found


def let_nest(modules: list[nn.Module]) -> None:
    """Undoes `keep_padded`."""
    for module in modules:
        setattr(module, NESTS, True)


def keep_called(parent: nn.Module, layer: nn.Module) -> None:
    """Makes nn.TransformerEncoderLayer call a layer in it. In eval mode it gives the weights to a fused kernel instead,
    unless a module in it has a hook; so the layer gets one that does nothing."""
    if isinstance(parent, nn.TransformerEncoderLayer) and not layer._forward_pre_hooks:
        layer.register_forward_pre_hook(_nothing)


def _nothing(*_: Any) -> None: ...
