"""Which layers of a model may share their input, and the one input that is being shared now.

Siblings are found by their names; that they do get the same input is seen when they are called: by the very same
tensor, unchanged since the first of them was called, under the same frame, modes and parameters. One that is called
with another (cross-attention's keys) begins anew, to the same result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .op.checks import MAX_RANK, rows
from .op.functional import autocasts
from .op.shared_input import Projection, SharedInput

if TYPE_CHECKING:
    from .layer import ILoRALinear

FAMILIES = (  # of children of one module
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)
FEW_ROWS = 64  # a decoding step: its x is in the cache, and a GPU does each layer in one launch
_PLAIN = (Tensor, torch.nn.Parameter)


def group(layers: Iterable[ILoRALinear], share: bool) -> tuple[tuple[str, ...], ...]:
    """Tells each layer its siblings: those of its family that are alike and plain, as many as fit the largest rank.
    Returns their paths, by group. share=False: no layer has any."""
    families: dict[Any, list[ILoRALinear]] = {}
    for layer in layers:
        layer.siblings = ()
        parent, _, name = layer.name.rpartition(".")
        family = next((family for family in FAMILIES if name in family), None)
        if share and family is not None and layer.plain_weight() is not None:
            families.setdefault((parent, family, _alike(layer)), []).append(layer)
    groups = []
    for members in families.values():
        most = MAX_RANK // members[0].r
        for first in range(0, len(members), max(most, 1)):
            siblings = tuple(members[first : first + most])
            if len(siblings) > 1:
                groups.append(tuple(layer.name for layer in siblings))
                for layer in siblings:
                    layer.siblings = siblings
    return tuple(groups)


def shared_output(layer: ILoRALinear, x: Tensor) -> Tensor | None:
    """The layer's output from an input it shares with its siblings; None where it is to compute by itself."""
    if torch.compiler.is_compiling():  # a graph holds no state between two calls: there every layer is by itself
        return None
    state = layer.gate_state
    held = state.shared
    if held is None or not held.serves(layer, x):
        held = state.shared = _begin(layer, x)
    if held is None:
        return None
    y = held.take(layer)
    if not held.places:
        state.shared = None
    return y


class _Held:
    """An input that has been multiplied by the A's of several layers, those that have not been called yet."""

    def __init__(self, layers: list[ILoRALinear], x: Tensor, shared: SharedInput) -> None:
        self.x, self.call, self.shared = x, _call(layers[0], x), shared
        self.kept = [_tensors(layer) for layer in layers]  # so that no id below is given to another tensor
        self.places = {layer: (j, _stamp(layer)) for j, layer in enumerate(layers)}

    def serves(self, layer: ILoRALinear, x: Tensor) -> bool:
        place = self.places.get(layer)
        if x is not self.x or place is None or self.shared.spent or layer.plain_weight() is None or layer.merged:
            return False
        return self.call == _call(layer, x) and place[1] == _stamp(layer)

    def take(self, layer: ILoRALinear) -> Tensor:
        return self.shared.y(self.places.pop(layer)[0])


def _begin(layer: ILoRALinear, x: Tensor) -> _Held | None:
    if type(x) not in _PLAIN or x.is_inference():  # whether it changes in inference mode, nobody could tell
        return None
    # Not in training, also without gradients: a re-entrant checkpoint's recomputation must draw the same seeds.
    if rows(x) <= FEW_ROWS and not layer.training and not torch.is_grad_enabled():
        return None
    if not _ready(layer):
        return None
    alike = _alike(layer)
    members = [other for other in layer.siblings if _ready(other) and _alike(other) == alike]
    gate, segments = layer.gate_state.gate_for(x, layer.gate_index, layer.name)
    if gate is None or len(members) < 2:
        return None
    dropout_p = layer.lora_dropout if layer.training else 0.0
    shared = SharedInput(
        x,
        [Projection(m.plain_weight(), m.base_layer.bias, m.lora_A, m.lora_B) for m in members],  # type: ignore[arg-type]
        layer.own_gate(gate),
        layer.scaling,
        segments,
        dropout_p,
        None,
        layer.backend,
    )
    return _Held(members, x, shared)


def _alike(layer: ILoRALinear) -> tuple[Any, ...]:
    """What siblings have in common. One r and E, so that the A's can be taken apart again; one gate; one dropout."""
    A, weight = layer.lora_A, layer.base_layer.weight
    same = (layer.in_features, layer.r, layer.num_experts, layer.gate_experts, layer.gate_index, layer.scaling)
    modes = (layer.lora_dropout, layer.training, layer.backend)
    return (*same, *modes, A.dtype, A.device, weight.dtype, weight.device, id(layer.gate_state))


def _ready(layer: ILoRALinear) -> bool:
    plain = not layer.merged and layer.plain_weight() is not None
    return plain and all(type(t) in _PLAIN for t in _tensors(layer))


def _tensors(layer: ILoRALinear) -> tuple[Tensor, ...]:
    four: tuple[Any, ...] = (layer.base_layer.weight, layer.base_layer.bias, layer.lora_A, layer.lora_B)
    return tuple(t for t in four if t is not None)


def _stamp(layer: ILoRALinear) -> tuple[Any, ...]:
    """Changes whenever anything changes that the layer's output depends on, but for the call."""
    return (*_alike(layer), *((id(t), _version(t), t.requires_grad) for t in _tensors(layer)))


def _call(layer: ILoRALinear, x: Tensor) -> tuple[Any, ...]:
    """Changes with the values of x and the gate, and with torch's modes; with the hooks on saved tensors too, since a
    checkpointed region must save what it saves again when it is recomputed."""
    (gate, segments, *_), device = layer.gate_state.frame, x.device.type
    modes = (torch.is_grad_enabled(), autocasts(device) and torch.get_autocast_dtype(device))
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (*modes, hooks, layer.gate_state.enabled, *map(_version, (gate, segments, x)), x.requires_grad)


def _version(t: Tensor | None) -> int | None:
    """Counts the changes of t; an inference tensor has no count, and outside inference mode no changes."""
    return None if t is None or t.is_inference() else t._version
