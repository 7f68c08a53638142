"""Groups of layers that get one input, such as q, k and v. `ilora.share_inputs` lets them read it once for all.

A group is found by the names of its layers. Each call checks that its layers really get the same input: it must be the
very tensor that the first layer got, unchanged since, under the same gate, modes and parameters. A layer that gets
another tensor (cross-attention's keys) begins a new pass, and the result is right in any case.
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
FEW_ROWS = 64  # as in a decoding step: x is in the cache then, and a GPU computes each layer in one launch


def group(layers: Iterable[ILoRALinear], share: bool) -> tuple[tuple[str, ...], ...]:
    """Puts layers of one family, with equal settings and plain weights, into groups whose ranks add up to at most
    MAX_RANK. Returns the paths of each group's layers. share=False removes all groups."""
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
    """Layers of a model that may get one input; each has the group as its `input_group`."""

    def __init__(self, layers: Iterable[ILoRALinear]) -> None:
        self.layers = tuple(layers)
        for layer in self.layers:
            layer.input_group = self

    def output(self, layer: ILoRALinear, x: Tensor) -> Tensor | None:
        """The layer's output for x [..., d_in] from a pass that it shares, or None where it must compute by itself."""
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
        if x.is_inference():  # an inference tensor does not count its changes
            return None
        # A layer in training shares here too: a re-entrant checkpoint runs its forward without gradients and later with
        # them, and must draw the same seeds both times.
        if rows(x) <= FEW_ROWS and not layer.training and not torch.is_grad_enabled():
            return None
        settings = _settings(layer)
        members = [each for each in self.layers if _can_share(each) and _settings(each) == settings]
        gate, segments = layer.gate_state.gate_for(x, layer.gate_index, layer.name)
        if gate is None or layer not in members or len(members) < 2 or not unseen(x, gate, segments):
            return None
        projections = [
            Projection(m.plain_weight(), m.base_layer.bias, m.lora_A, m.lora_B)  # type: ignore[arg-type]
            for m in members
        ]
        options = (layer.scaling, segments, layer.lora_dropout if layer.training else 0.0, None, layer.backend)
        try:
            return _Pass(members, x, SharedInput(x, projections, layer.own_gate(gate), *options))
        except (TypeError, ValueError) as error:
            error.args = (f"{layer.name}: {error}",)
            raise


class _Pass:
    """One pass over an input that several layers share. waiting: those of them that have not been called yet."""

    def __init__(self, layers: list[ILoRALinear], x: Tensor, shared: SharedInput) -> None:
        self.x, self.conditions, self.shared = x, _conditions(layers[0], x), shared
        self.kept = [_tensors(layer) for layer in layers]  # so that no other tensor gets an id that a stamp holds
        self.waiting = {layer: (j, _stamp(layer)) for j, layer in enumerate(layers)}

    def serves(self, layer: ILoRALinear, x: Tensor) -> bool:
        """Whether this layer's output for x is the one that was prepared: nothing that decides it has changed."""
        place = self.waiting.get(layer)
        if x is not self.x or place is None or self.shared.spent or not _can_share(layer):
            return False
        return self.conditions == _conditions(layer, x) and place[1] == _stamp(layer)

    def output(self, layer: ILoRALinear) -> Tensor:
        return self.shared.y(self.waiting.pop(layer)[0])


def _settings(layer: ILoRALinear) -> tuple[Any, ...]:
    """What the layers of a group have in common: r, since one product gives the ranks of all, the gate, the dropout."""
    A, weight = layer.lora_A, layer.base_layer.weight
    same = (layer.in_features, layer.r, layer.num_experts, layer.gate_experts, layer.gate_index, layer.scaling)
    modes = (layer.lora_dropout, layer.training, layer.backend)
    return (*same, *modes, A.dtype, A.device, weight.dtype, weight.device, id(layer.gate_state))


def _can_share(layer: ILoRALinear) -> bool:
    return not layer.merged and layer.plain_weight() is not None and unseen(*_tensors(layer))


def _tensors(layer: ILoRALinear) -> tuple[Tensor, ...]:
    four: tuple[Any, ...] = (layer.base_layer.weight, layer.base_layer.bias, layer.lora_A, layer.lora_B)
    return tuple(t for t in four if t is not None)


def _stamp(layer: ILoRALinear) -> tuple[Any, ...]:
    """Changes whenever a setting or a tensor of the layer changes."""
    return (*_settings(layer), *((id(t), _version(t), t.requires_grad) for t in _tensors(layer)))


def _conditions(layer: ILoRALinear, x: Tensor) -> tuple[Any, ...]:
    """Changes with the values of x and of the gate, and with torch's modes. Hooks on saved tensors count among these: a
    checkpoint must save the same tensors when it computes its region again."""
    (gate, segments, *_), device = layer.gate_state.current, x.device.type
    modes = (torch.is_grad_enabled(), autocasts(device) and torch.get_autocast_dtype(device))
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (*modes, hooks, layer.gate_state.enabled, *map(_version, (gate, segments, x)), x.requires_grad)


def _version(t: Tensor | None) -> int | None:
    """How often t has been changed. An inference tensor has no such count, and cannot change outside inference mode."""
    return None if t is None or t.is_inference() else t._version
