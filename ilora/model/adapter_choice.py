"""Chooses the adapters of a call that names one for each instance, and the gate of each; refuses what several adapters
in one batch cannot do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..adapter.modules import dtype_of
from ..adapter.record import Adapter, adapters, find_adapter
from ..adapter.switch import bring
from ..base_layers import compute_device
from ..current_gate import CurrentGate
from ..gates.networks import PromptGate, UniformGate
from ..grouped.mixture import AddUpdates, Mixture
from ..grouped.names import names_of
from .batch import Inputs, read_media
from .gate_choice import (
    ask_network,
    check_argument_types,
    check_rows,
    check_width,
    choose_gate,
    packed_by,
    refuse_replica,
)

_OF_ROWS = ("input_ids", "inputs_embeds", "attention_mask", "labels", "decoder_input_ids", "decoder_inputs_embeds")


def choose(
    model: Any,
    inputs: Inputs,
    gate: Any,
    z: Any,
    segments: Tensor | None,
    mask: Tensor | None,
    media_rows: Any,
    chosen: Any,
) -> CurrentGate:
    """The gate of one call, as `choose_gate`; that of several adapters where the call chooses them, or is a step of a
    generate that did. Raises ValueError, TypeError, RuntimeError; the model is then as it was."""
    outer = model.ilora.state.current
    step = outer.generating and outer.mixture is not None and gate is None and z is None
    if chosen is None and not step:
        return choose_gate(model, inputs, gate, z, segments, mask, media_rows)
    if chosen is None:
        check_rows(model, outer.gate.shape[-2], inputs, generating=True)
        return CurrentGate(outer.gate, None, inputs.rows, inputs.lengths, generating=True, mixture=outer.mixture)
    check_argument_types(segments, mask)
    names = names_of(chosen, adapters(model))
    rows = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names) if name}
    records = [find_adapter(model, name) for name in rows]
    _refuse_call(model, inputs, segments, names, records)
    for record in records:
        _refuse_adapter(record)
    for record in records:
        _bring(model, record)
    by_name = _given(inputs, names, rows, {"ilora_gate": gate, "ilora_z": z, "ilora_prompt_mask": mask}, records)
    found = [
        _gate_of(model, record, _of_rows(inputs, own), len(own), **by_name[record.name])
        for record, own in zip(records, rows.values(), strict=True)
    ]
    _watch(model, records)
    slots = [list(rows).index(name) if name else -1 for name in names]
    mixture = Mixture(records, slots, [each.dim() == 3 for each in found])
    together = _together(found, list(rows.values()), len(names), compute_device(model))
    return CurrentGate(together, None, inputs.rows, inputs.lengths, mixture=mixture)


def _refuse_call(
    model: Any, inputs: Inputs, segments: Tensor | None, names: Sequence[str | None], records: Sequence[Adapter]
) -> None:
    training = model.training and torch.is_grad_enabled()
    refuse_replica(model)
    if model.ilora.merged or not model.ilora.state.enabled:
        why = "a gate is merged into the weights" if model.ilora.merged else "the adapter is disabled"
        raise RuntimeError(f"ilora_adapters was given, but {why}")
    for each in (*records, model.ilora.adapter):
        if each.saved:
            raise ValueError(
                f"ilora_adapters: the adapter {each.name!r} trains {next(iter(each.saved))} whole, which a batch of "
                "several adapters cannot; set_adapter uses it alone, exclude_modules leaves such a module out"
            )
    if inputs.batch is not None and len(names) != inputs.batch:
        raise ValueError(f"ilora_adapters: {len(names)} adapters for a batch of {inputs.batch}; give one for each")
    if segments is not None or packed_by(inputs) is not None:
        raise ValueError("ilora_adapters: a row holds several sequences; give each sequence a row of its own")
    layers = {path for record in records for path in record.layers}
    if read_media(model, inputs, len(names), layers=layers) is not None:
        raise ValueError(
            "ilora_adapters: adapted layers see images, sounds or videos, which several adapters cannot share yet; "
            "leave these layers out (exclude_modules of ILoRAConfig)"
        )
    if training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            "ilora_adapters: several processes would not average the gradients of adapters that are not active; train "
            "several adapters in one process"
        )
    for record in records:
        if training and getattr(record.gate, "balance", 0.0) > 0.0:
            raise ValueError(f"ilora_adapters: the gate network of {record.name!r} has a balance term; set it to 0")


def _refuse_adapter(adapter: Adapter) -> None:
    start = f"ilora_adapters: the adapter {adapter.name!r}"
    if adapter.experts:
        raise ValueError(
            f"{start} adapts the fused experts {next(iter(adapter.experts))}, which have one adapter at a time; "
            "set_adapter uses it alone, exclude_modules=['experts'] leaves them out"
        )
    for name, layer in adapter.layers.items():
        if layer.split is not None or hasattr(layer.lora_A, "device_mesh"):
            raise ValueError(f"{start}: {name} is split over processes, where one adapter at a time works; set_adapter")


def _bring(model: Any, adapter: Adapter) -> None:
    """Moves an adapter that is not active to where the model is by now."""
    if adapter is model.ilora.adapter:
        return
    layer, now = next(iter(adapter.layers.values())), dtype_of(model)
    if adapter.dtype != now or layer.lora_A.device != compute_device(layer.base_layer):
        bring(model, adapter)
        adapter.dtype = now
    if adapter.gate is not None:
        adapter.gate.train(model.training)


def _given(
    inputs: Inputs,
    names: Sequence[str | None],
    rows: dict[str, list[int]],
    arguments: dict[str, Any],
    records: Sequence[Adapter],
) -> dict[str, dict[str, Tensor]]:
    """By adapter, which of the arguments it is given: its rows of a tensor for the batch, or what a dict has for it. A
    tensor of ilora_z or ilora_prompt_mask is for the adapters whose gate network reads it."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in rows}
    for what, value in arguments.items():
        if isinstance(value, Mapping):
            if lost := [name for name in value if name not in rows]:
                raise ValueError(f"{what}: no instance has the adapter {lost[0]!r}, only {list(rows)}")
            for name, own in value.items():
                found[name][what] = own
        elif value is not None:
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{what}: expected a tensor, or a dict of one for each adapter, got {type(value).__name__}"
                )
            dimension = -2 if what == "ilora_gate" else 0
            if value.dim() < 2 or value.shape[dimension] != len(names):
                raise ValueError(f"{what}: expected a row for each of {len(names)} instances, got {list(value.shape)}")
            readers = [record.name for record in records if _reads(record, what)]
            if not readers:
                raise ValueError(f"{what} was given, but no adapter of {list(rows)} has a gate network that reads it")
            for name in readers:
                found[name][what] = value.index_select(dimension, torch.tensor(rows[name], device=value.device))
    return found


def _reads(adapter: Adapter, what: str) -> bool:
    network = adapter.gate
    if what == "ilora_prompt_mask":
        return isinstance(network, PromptGate)
    return what == "ilora_gate" or not (network is None or isinstance(network, (PromptGate, UniformGate)))


def _of_rows(inputs: Inputs, rows: list[int]) -> Inputs:
    """The inputs of these rows of the batch alone, as far as a gate network reads them."""
    if len(rows) == inputs.batch:
        return inputs
    values = dict(inputs.values)
    for name in _OF_ROWS:
        value = values.get(name)
        if isinstance(value, Tensor) and len(value) == inputs.batch:
            values[name] = value[torch.tensor(rows, device=value.device)]
    return inputs._replace(values=values, batch=len(rows), rows=len(rows))


def _gate_of(
    model: Any,
    adapter: Adapter,
    inputs: Inputs,
    n: int,
    ilora_gate: Tensor | None = None,
    ilora_z: Tensor | None = None,
    ilora_prompt_mask: Tensor | None = None,
) -> Tensor:
    """The gate [n, E] or [blocks, n, E] of one adapter for its n rows. Errors name the adapter."""
    try:
        if ilora_gate is not None and (ilora_z is not None or ilora_prompt_mask is not None):
            raise ValueError("ilora_gate decides; give what its gate network reads to the others, in a dict by name")
        gate = ilora_gate
        if gate is None:
            gate = ask_network(model, inputs, ilora_z, None, ilora_prompt_mask, adapter)
        check_width(adapter, gate)
        if gate.shape[-2] not in (1, n):
            raise ValueError(f"gate: it has {gate.shape[-2]} rows for {n} instances; give one for each, or one for all")
    except (TypeError, ValueError) as error:
        error.args = (f"adapter {adapter.name!r}: {error}",)
        raise
    return gate.expand(*gate.shape[:-2], n, -1)


def _together(found: list[Tensor], rows: list[list[int]], N: int, device: Any) -> Tensor:
    """One gate [N, E], or [blocks, N, E] where an adapter has one for each, of the adapters' own, which are widened by
    zeros; rows of the frozen model are zeros."""
    E = max((gate.shape[-1] for gate in found), default=1)
    blocks = max((gate.shape[0] for gate in found if gate.dim() == 3), default=0)
    wide = [F.pad(gate, (0, E - gate.shape[-1])) for gate in found]
    if blocks:
        wide = [F.pad(g, (0, 0, 0, 0, 0, blocks - len(g))) if g.dim() == 3 else g.expand(blocks, -1, -1) for g in wide]
    order = [row for own in rows for row in own]
    frozen = sorted(set(range(N)).difference(order))
    like = torch.zeros(0, device=device) if not wide else wide[0]
    wide = [gate.to(torch.promote_types(gate.dtype, torch.float32)) for gate in wide]
    wide.append(like.new_zeros(*([blocks] if blocks else []), len(frozen), E, dtype=torch.float32))
    gate = torch.cat(wide, -2)
    if order + frozen == list(range(N)):
        return gate
    return gate.index_select(-2, torch.tensor(order + frozen, device=gate.device).argsort())


def _watch(model: Any, records: Sequence[Adapter]) -> None:
    """Hooks for the layers of these adapters that the active one leaves frozen. `detach` removes them."""
    injection = model.ilora
    active, watched = injection.adapter.layers, injection.watched
    bases = {id(layer.base_layer) for layer in active.values()}
    for record in records:
        for path, layer in record.layers.items():
            if path not in active and path not in watched and layer.name == path:
                if id(layer.base_layer) in bases:
                    raise ValueError(
                        f"ilora_adapters: {path} is one layer in two places, of which {record.name!r} and "
                        f"{injection.adapter.name!r} adapt one each; adapt the same place in both"
                    )
                hook = AddUpdates(injection.state, path)
                watched[path] = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
