"""Reads from a call's arguments how many sequences the batch holds, how long they are, and whether they are packed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TOKENS = ("input_ids", "decoder_input_ids")
_EMBEDDINGS = ("inputs_embeds", "decoder_inputs_embeds")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


class Inputs(NamedTuple):
    """values: the arguments by name. batch: the size of the first dimension. rows: the number of sequences, which is
    batch · choices for multiple choice [batch, choices, length]. lengths: how many rows a sequence may have in a
    layer's input. batch and rows are None where nothing tells them."""

    values: dict[str, Any]
    batch: int | None
    rows: int | None
    lengths: tuple[int, ...]


def read_inputs(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """What the arguments say. names: those of the forward's positional parameters."""
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    batch: int | None = None
    rows: int | None = None
    lengths: list[int] = []
    for name in _TOKENS + _EMBEDDINGS:
        tensor = values.get(name)
        if isinstance(tensor, Tensor):
            shape = tensor.shape if name in _TOKENS else tensor.shape[:-1]
            if rows is None:
                batch, rows = shape[0], math.prod(shape[:-1])
            lengths.append(shape[-1])
    labels = values.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:  # an encoder-decoder makes its decoder's input of them
        lengths.append(labels.shape[1])
    encoded = values.get("encoder_outputs")
    if encoded is not None:
        lengths.append(encoded[0].shape[-2])
    if rows is None:  # pixels, sounds, a module of another kind
        first = next((v for v in values.values() if isinstance(v, Tensor) and v.dim() >= 2), None)
        if first is not None:
            batch = rows = first.shape[0]
            lengths += first.shape[1:2]
    return Inputs(values, batch, rows, tuple(lengths))


def packed_by(inputs: Inputs) -> str | None:
    """The argument that says that one row holds several sequences, or None."""
    for name in _PACKED:
        if inputs.values.get(name) is not None:
            return name
    positions, mask = inputs.values.get("position_ids"), inputs.values.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or inputs.rows is None:
        return None
    if positions.shape[1] < 2:  # a decoding step: nothing to read back from the device for
        return None
    falls = positions[:, 1:] < positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        attended = mask != 0  # the positions of left padding fall too
        falls = falls & attended[:, 1:] & attended[:, :-1]
    if torch.compiler.is_compiling():  # a value cannot be looked at there, but a graph can be made to fail
        torch._assert_async(~falls.any(), "position_ids restart, so a row holds several sequences: give ilora_segments")
        return None
    return "position_ids" if bool(falls.any()) else None
