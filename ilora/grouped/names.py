"""The adapters of a batch by name, one for each instance, and the loss of each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def names_of(chosen: Any, known: Sequence[str]) -> list[str | None]:
    """The adapter's name for each instance, None for the frozen model, out of names or of an index tensor into the
    known ones with -1 for None. Raises TypeError for anything else, ValueError for an adapter that is not known."""
    for each in _keys(chosen):
        if each is not None and each not in (range(len(known)) if isinstance(chosen, Tensor) else known):
            raise ValueError(
                f"ilora_adapters: there is no adapter {each!r}; the model has {', '.join(map(repr, known))}, "
                "None (in an index tensor -1) is the frozen model"
            )
    return [known[each] if isinstance(each, int) else each for each in _keys(chosen)]


def _keys(chosen: Any) -> list[Any]:
    """The name or index of each instance, None for the frozen model."""
    if isinstance(chosen, Tensor):
        if chosen.dim() != 1 or chosen.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ilora_adapters: expected integers [N], got {chosen.dtype} {list(chosen.shape)}")
        return [None if each == -1 else each for each in chosen.tolist()]
    named = isinstance(chosen, (list, tuple)) and all(each is None or isinstance(each, str) for each in chosen)
    if not named or not chosen:
        raise TypeError(f"ilora_adapters: expected a name or None for each instance, or integers [N], got {chosen!r}")
    return list(chosen)


def adapter_losses(logits: Tensor, labels: Tensor, adapters: Any, shift: bool = True) -> dict[Any, Tensor]:
    """Each adapter's own mean loss, by name: what the model's loss would be for a batch of its instances alone.

    `sum(ilora.adapter_losses(model(input_ids, ilora_adapters=names).logits, labels, names).values()).backward()` gives
    every adapter the gradient that it would have alone, whatever the others' numbers of rows and tokens.

    logits: [N, L, V] ([N, V] for one label an instance). labels: int64 [N, L] ([N]); -100 is not counted. adapters: as
    `ilora_adapters` of the call; of an index tensor the keys are the indices. Rows of the frozen model are left out.
    shift: whether position l predicts label l + 1, as in causal language models, not encoder-decoders or classifiers.
    The cross entropy is in float32 or wider, as transformers' own; it is 0 for an adapter without a label.
    Raises: ValueError for shapes or a number of adapters that do not fit, TypeError as the call.
    """
    keys = _keys(adapters)
    if logits.shape[:-1] != labels.shape or len(labels) != len(keys) or (shift and labels.dim() < 2):
        raise ValueError(
            f"adapter_losses: expected logits [N, L, V], labels [N, L] and N adapters, got {list(logits.shape)}, "
            f"{list(labels.shape)} and {len(keys)}"
        )
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = {}
    for key in dict.fromkeys(key for key in keys if key is not None):
        rows = torch.tensor([row for row, each in enumerate(keys) if each == key], device=logits.device)
        own, wanted = logits[rows].flatten(0, -2), labels.to(logits.device)[rows].flatten()
        wide = own.to(torch.promote_types(own.dtype, torch.float32))
        total = F.cross_entropy(wide, wanted, ignore_index=-100, reduction="sum")
        losses[key] = total / (wanted != -100).sum().clamp(min=1)
    return losses
