"""Layers whose weight is read instead of the layer being called, so that their update would be left out: noticing them,
and keeping torch from doing so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

NESTS = "use_nested_tensor"  # an attribute of nn.TransformerEncoder: whether it may make nested tensors


class WeightReads:
    """What has become of the layers that share a gate, by their names. Compiled code is not recorded.

    called, read: the layers that this forward has called, and those whose weight it has read. copied: the layers whose
    weight was read before it, perhaps to make another layer of it, and which have not been called since.
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
        """To call then, where there are copied layers: notes which of their parents this forward of the model calls.
        A parent that has left the model counts as called."""
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
        """To call after a forward under a gate. Raises RuntimeError for layers that it left out."""
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
    """Keeps nn.TransformerEncoder from turning a padded batch into a nested tensor, which no ILoRALinear can read.
    Returns the modules that would, for `let_nest`."""
    found = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and getattr(m, NESTS, False)]
    for module in found:
        setattr(module, NESTS, False)
    return found


def let_nest(modules: list[nn.Module]) -> None:
    """Takes `keep_padded` back."""
    for module in modules:
        setattr(module, NESTS, True)


def calls_its_layers(parent: nn.Module, layer: nn.Module) -> None:
    """Lets nn.TransformerEncoderLayer call a layer in it: where no module in it has a hook, in eval mode, it reads the
    weights and gives them to one fused kernel."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer.register_forward_pre_hook(_nothing)


def _nothing(*_: Any) -> None: ...
