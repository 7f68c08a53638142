"""Groups of layers that get one input, such as q, k and v: `ilora.share_inputs` lets them share the pass over it.

A group is found by the names of its layers. That they really get the same input is seen at each call: it is the very
same tensor, unchanged since the first layer of the group was called, under the same gate, modes and parameters. A layer
that gets another one (cross-attention's keys) begins a new pass, and the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .op.checks import MAX_RANK, rows
from .op.functional import autocasts
from .op.registration import unseen
from .op.shared_input import Projection, SharedInput

if TYPE_CHECKING:
    from .layer import ILoRALinear

FAMILIES = (  # names of children of one module
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)
FEW_ROWS = 64  # a decoding step: its x is in the cache, and a GPU computes each layer in one launch


def group(layers: Iterable[ILoRALinear], share: bool) -> tuple[tuple[str, ...], ...]:
    """Puts the layers into groups: those of one family that are alike and have plain weights, as many as fit into the
    largest rank. Returns the paths of each group's layers. share=False: no layer is in a group."""
    families: dict[Any, list[ILoRALinear]] = {}
    for layer in layers:
        layer.input_group = None
        parent, _, name = layer.name.rpartition(".")
        family = next((family for family in FAMILIES if name in family), None)
        if share and family is not None and layer.plain_weight() is not None:
            families.setdefault((parent, family, _settings(layer)), []).append(layer)
    groups = []
    for members in families.values():
        most = max(MAX_RANK // members[0].r, 1)
        chunks = [members[first : first + most] for first in range(0, len(members), most)]
        groups += [SharedInputGroup(chunk) for chunk in chunks if len(chunk) > 1]
    return tuple(tuple(layer.name for layer in each.layers) for each in groups)


class SharedInputGroup:
    """Layers of a model that may get one input. layers: all of them; each knows its group as `input_group`."""

    def __init__(self, layers: Iterable[ILoRALinear]) -> None:
        self.layers = tuple(layers)
        for layer in self.layers:
            layer.input_group = self

    def output(self, layer: ILoRALinear, x: Tensor) -> Tensor | None:
        """What the layer makes of x [..., d_in], out of a pass it shares; None where it is to compute by itself."""
        if torch.compiler.is_compiling():  # a graph holds no state between two calls
            return None
        state = layer.gate_state
        current: _Pass | None = state.shared
        if current is None or not current.serves(layer, x):
            current = state.shared = self._begin(layer, x)
        if current is None:
            return None
        y = current.output(layer)
        if not current.waiting:
            state.shared = None
        return y

    def _begin(self, layer: ILoRALinear, x: Tensor) -> _Pass | None:
        if not unseen(x) or x.is_inference():  # whether it changes in inference mode, nobody could tell
            return None
        # Not in training, also without gradients: a re-entrant checkpoint's recomputation must draw the same seeds.
        if rows(x) <= FEW_ROWS and not layer.training and not torch.is_grad_enabled():
            return None
        settings = _settings(layer)
        members = [each for each in self.layers if _can_share(each) and _settings(each) == settings]
        gate, segments = layer.gate_state.gate_for(x, layer.gate_index, layer.name)
        if gate is None or not unseen(gate) or layer not in members or len(members) < 2:
            return None
        projections = [
            Projection(m.plain_weight(), m.base_layer.bias, m.lora_A, m.lora_B)  # type: ignore[arg-type]
            for m in members
        ]
        dropout_p = layer.lora_dropout if layer.training else 0.0
        own = layer.own_gate(gate)
        return _Pass(
            members, x, SharedInput(x, projections, own, layer.scaling, segments, dropout_p, None, layer.backend)
        )


class _Pass:
    """One pass over an input that several layers share. waiting: those of them that have not been called yet."""

    def __init__(self, layers: list[ILoRALinear], x: Tensor, shared: SharedInput) -> None:
        self.x, self.conditions, self.shared = x, _conditions(layers[0], x), shared
        self.kept = [_tensors(layer) for layer in layers]  # so that no id in a stamp is given to another tensor
        self.waiting = {layer: (j, _stamp(layer)) for j, layer in enumerate(layers)}

    def serves(self, layer: ILoRALinear, x: Tensor) -> bool:
        """Whether this layer would make of x what has been prepared."""
        place = self.waiting.get(layer)
        if x is not self.x or place is None or self.shared.spent or layer.plain_weight() is None or layer.merged:
            return False
        return self.conditions == _conditions(layer, x) and place[1] == _stamp(layer)

    def output(self, layer: ILoRALinear) -> Tensor:
        return self.shared.y(self.waiting.pop(layer)[0])


def _settings(layer: ILoRALinear) -> tuple[Any, ...]:
    """What the layers of a group have in common. One r and E, so that the A's can be taken apart again; one gate; one
    dropout."""
    A, weight = layer.lora_A, layer.base_layer.weight
    same = (layer.in_features, layer.r, layer.num_experts, layer.gate_experts, layer.gate_index, layer.scaling)
    modes = (layer.lora_dropout, layer.training, layer.backend)
    return (*same, *modes, A.dtype, A.device, weight.dtype, weight.device, id(layer.gate_state))


def _can_share(layer: ILoRALinear) -> bool:
    plain = not layer.merged and layer.plain_weight() is not None
    return plain and unseen(*_tensors(layer))


def _tensors(layer: ILoRALinear) -> tuple[Tensor, ...]:
    four: tuple[Any, ...] = (layer.base_layer.weight, layer.base_layer.bias, layer.lora_A, layer.lora_B)
    return tuple(t for t in four if t is not None)


def _stamp(layer: ILoRALinear) -> tuple[Any, ...]:
    """Changes whenever anything changes that the layer's output depends on, but for the call."""
    return (*_settings(layer), *((id(t), _version(t), t.requires_grad) for t in _tensors(layer)))


def _conditions(layer: ILoRALinear, x: Tensor) -> tuple[Any, ...]:
    """Changes with the values of x and the gate, and with torch's modes; with the hooks on saved tensors too, since a
    checkpointed region must save what it saves again when it is recomputed."""
    (gate, segments, *_), device = layer.gate_state.current, x.device.type
    modes = (torch.is_grad_enabled(), autocasts(device) and torch.get_autocast_dtype(device))
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (*modes, hooks, layer.gate_state.enabled, *map(_version, (gate, segments, x)), x.requires_grad)


def _version(t: Tensor | None) -> int | None:
    """Counts the changes of t; an inference tensor has no count, and outside inference mode no changes."""
    return None if t is None or t.is_inference() else t._version
