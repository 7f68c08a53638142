"""Which tokens of a batch a gate may read, and their mean. B rows of L tokens, N instances, H features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, segments: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[N, H] means of x [B, L, H] over the true mask [B, L] of each instance, 0 where there is none, in dtype or wider.

    Sums in a fixed order, no atomics. Raises: ValueError for other shapes, TypeError for other dtypes.
    """
    if x.ndim != 3 or mask.shape != x.shape[:2]:
        raise ValueError(f"expected embeddings [B, L, H] and a mask [B, L], got {list(x.shape)} and {list(mask.shape)}")
    if not x.is_floating_point() or mask.dtype != torch.bool:
        raise TypeError(f"expected float embeddings and a bool mask, got {x.dtype} and {mask.dtype}")
    dtype = torch.promote_types(x.dtype, dtype)
    x = x.masked_fill(~mask[..., None], 0)  # not a product: padding may hold inf or nan
    if segments is None:
        return x.sum(1, dtype=dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    segments = segments.to(x.device)
    m = torch.arange(mask.numel(), dtype=segments.dtype, device=x.device)
    owned = (segments[:-1, None] <= m) & (m < segments[1:, None]) & mask.flatten()
    return (owned.to(dtype) @ x.flatten(0, 1).to(dtype)) / owned.sum(1, keepdim=True).clamp(min=1)


def _count_so_far(flags: Tensor, segments: Tensor | None) -> Tensor:
    """[B, L] int64: how many flags are true up to each token and with it, in its row or, if packed, its segment."""
    if segments is None:
        return flags.cumsum(1)
    total = F.pad(flags.flatten().cumsum(0), (1, 0))
    return (total[1:] - total[_of_each_token(segments.to(flags.device), flags, segments).flatten()]).reshape(
        flags.shape
    )


def _of_each_token(values: Tensor, like: Tensor, segments: Tensor | None) -> Tensor:
    """For each token of like [B, L] the value of its instance: [B, L] from [N] values, or [B, 1] where rows are the
    instances. One value is everyone's. Raises ValueError for another number of values."""
    N = like.shape[0] if segments is None else segments.numel() - 1
    if values.numel() == 1:
        return values.reshape(1, 1)
    if segments is None:
        if values.shape != (N,):
            raise ValueError(f"prompt_lengths: expected one length for each of {N} sequences, got {values.numel()}")
        return values[:, None]
    m = torch.arange(like.numel(), dtype=segments.dtype, device=like.device)
    owner = (torch.bucketize(m, segments.to(like.device), right=True) - 1).clamp(0, N - 1)
    return values[owner].reshape(like.shape)


def prompt_mask(
    attention_mask: Tensor | None,
    labels: Tensor | None,
    shape: tuple[int, int],
    min_tokens: int = 1,
    segments: Tensor | None = None,
    device: torch.device | str | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The tokens a gate may read: bool [B, L] on the device (None: that of the tensors given).

    With lengths, int [N] or [1], these are the first lengths[i] attended tokens of instance i. Else, with labels, those
    before the first labelled one (label != -100): a gate that saw the answer in training would not find it when
    generating. Else all attended tokens. The first min_tokens attended ones always count, so that a row that is
    labelled from its start has a prompt.
    attention_mask, labels: [B, L] = shape; nonzero means attended. segments: int32 [N+1], the rule then holds per
    instance of the B·L packed rows.
    Raises: ValueError for another shape, such as a 4-D attention_mask.
    """
    given = {"attention_mask": attention_mask, "labels": labels}
    for name, tensor in given.items():
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.shape != tuple(shape)):
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: expected [B, L] = {list(shape)}, got {got}; pass ilora_prompt_mask instead")
    if device is None:
        device = next((t.device for t in (*given.values(), segments) if t is not None), None)
    attended = torch.ones(shape, dtype=torch.bool, device=device)
    if attention_mask is not None:
        attended = (attention_mask != 0).to(device)
    if lengths is not None:
        lengths = _of_each_token(lengths.to(attended.device), attended, segments)
        return attended & (_count_so_far(attended, segments) <= lengths.clamp(min=min_tokens))
    if labels is None:
        return attended
    answered = _count_so_far(attended & (labels != -100).to(device), segments) > 0
    return attended & (~answered | (_count_so_far(attended, segments) <= min_tokens))


def attended_tokens(model: Any, values: dict[str, Any]) -> Tensor | None:
    """The attention mask of a call with these arguments. Where there is none, it is what transformers' `generate`
    infers from the pad token, so that a gate reads no padding; None where nothing tells the padding."""
    ids, mask = values.get("input_ids"), values.get("attention_mask")
    if mask is not None or ids is None or ids.is_floating_point():
        return mask
    pad, eos = (generation_setting(model, values, name) for name in ("pad_token_id", "eos_token_id"))
    return None if pad is None or pad in (eos if isinstance(eos, (list, tuple)) else [eos]) else ids != pad


def generation_setting(model: Any, values: dict[str, Any], name: str) -> Any:
    """What generate takes for this setting: its argument, or what its generation config or the model's says."""
    configs = (values.get("generation_config"), getattr(model, "generation_config", None))
    read = (values.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in read if value is not None), None)
