"""The whole tensors of an adapter, also of a model that is spread over processes."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import Tensor

from ..adapter.record import Adapter
from .files import AdapterError
from .format import A_EXPERTS, B_EXPERTS, specs_of

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def gather_full_tensors(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors, those that are sharded (FSDP2) gathered, by all processes together. Raises ValueError for one that
    has no values here."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} has no values here: it is on the meta device, as what a device map offloads")
    return {name: tensor.full_tensor() if _sharded(tensor) else tensor for name, tensor in tensors.items()}


def is_writer(tensors: dict[str, Any]) -> bool:
    """Whether this process is the one to write the tensors: the first of those that share them."""
    return not any(any(tensor.device_mesh.get_coordinate() or ()) for tensor in tensors.values() if _sharded(tensor))


def select_from_state_dict(wanted: Collection[str], state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of these names from a state dict that somebody gathered. Raises AdapterError for missing ones."""
    given = {_WRAPPERS.sub("", key): tensor for key, tensor in state_dict.items()}
    missing = [name for name in wanted if name not in given]
    if missing:
        raise AdapterError(f"state_dict: tensor {missing[0]!r} is missing ({len(missing)} of {len(wanted)} are)")
    return {name: given[name] for name in wanted}


def refuse_fragments(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    """Raises AdapterError for a tensor that is not of the shape it has in the model."""
    for name, (shape, _) in specs_of(adapter).items():
        got = tensors[name].shape
        # What stands in the model may be a fragment itself, of what was gathered for here.
        if got != shape and (
            name.endswith((".lora_A", ".lora_B", A_EXPERTS, B_EXPERTS)) or got.numel() <= shape.numel()
        ):
            raise AdapterError(
                f"{name}: expected shape {list(shape)}, got {list(got)}: a fragment of a sharded model? Gather it, "
                "then model.save_pretrained(path, state_dict=gathered)"
            )


def _sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")
