"""What is known of the frozen modules under an adapter: their sizes, where they compute, how they stay trainable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

NESTS = "use_nested_tensor"  # an attribute of nn.TransformerEncoder: whether it may make nested tensors
PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit: whether it may


def is_conv1d(base: nn.Module) -> bool:
    # By name, so that transformers need not be there; its weight is [d_in, d_out].
    return (type(base).__module__, type(base).__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Whether ILoRALinear can wrap this module: one product of its input, by what it is or by what it says."""
    if type(module).__name__.endswith("Router"):
        return False  # transformers has some that are an nn.Linear and return scores and a choice
    if is_conv1d(module) or isinstance(module, nn.Linear):
        return True
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    return all(isinstance(size, int) for size in sizes) and not adapted(module)


def features_of(base: nn.Module) -> tuple[int, int]:
    if adapted(base):
        raise TypeError("base_layer: it is an ILoRALinear already")
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
    """An empty tensor where the base computes, in the adapter's dtype."""
    tensor = next((t for t in (*base.parameters(), *base.buffers())), torch.empty(0))
    if dtype is None:
        dtype = tensor.dtype if tensor.is_floating_point() and tensor.itemsize > 1 else torch.float32
    return torch.empty(0, dtype=dtype, device=compute_device(base))


def compute_device(module: nn.Module) -> torch.device | None:
    """The device a module computes on: its first tensor's, or where accelerate brings a weight that it keeps elsewhere
    (a device map that offloads); None without tensors."""
    for owner in module.modules():
        tensor = next((t for t in (*owner._parameters.values(), *owner._buffers.values()) if t is not None), None)
        if tensor is not None:
            return offloading_to(owner) or tensor.device
    return None


def offloading_to(module: nn.Module) -> torch.device | None:
    """Where accelerate brings the weights of this very module for each forward, if it keeps them elsewhere."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and each.execution_device is not None:
            return torch.device(each.execution_device)
    return None


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """The norms with running statistics and without a parameter that is trained."""
    return [
        norm
        for norm in model.modules()
        if isinstance(norm, _NormBase)
        and norm.running_mean is not None
        and not any(parameter.requires_grad for parameter in norm.parameters())
    ]


def adapted(module: nn.Module) -> bool:
    return hasattr(module, "gate_state")  # an ILoRALinear, whose file needs this one


def keep_unpacked(module: nn.Module) -> list[nn.Module]:
    """Keeps bitsandbytes from packing the 4-bit weights in a module for inference, and unpacks those that are.

    On CPUs with AVX512-BF16 it packs them at the first forward in eval mode; from then on, in training too, no gradient
    passes such a layer, silently. Returns the modules that would pack, for `let_pack`.
    """
    found = [each for each in module.modules() if getattr(each, PACKS, False)]
    for each in found:
        setattr(each, PACKS, False)
        if getattr(getattr(each.weight, "quant_state", None), "packing_format_for_cpu", False):
            each.state_dict()  # which unpacks it first
    return found


def let_pack(modules: list[nn.Module]) -> None:
    """Takes `keep_unpacked` back."""
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
