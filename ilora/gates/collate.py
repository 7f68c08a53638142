"""Adds what the gate needs to the batches of another collator, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .pooling import prompt_mask

COLUMNS = ("ilora_z", "ilora_gate")


class GateCollator:
    """`GateCollator(collator)`: the collator's batch, and with it what the model's gate needs.

    Columns `ilora_z` or `ilora_gate` hold one row of numbers for each example. The collator does not see them; they are
    in the batch as float32 [N, z_dim] or [N, E].
    Where the collator lays several examples in one row (padding-free batches: transformers' DataCollatorWithFlattening,
    TRL's padding_free), the batch gets `ilora_segments`, int32 [N+1]: each example is an instance with its own gate. An
    example that is packed already, as by TRL's packing, has a column `seq_lengths`: each of its documents is an
    instance, and has its row in the example's columns, [documents, z_dim]. Rows that fill the end (pad_to_multiple_of)
    go to the last instance. Padded batches get no segments. (transformers keeps packed sequences apart in attention
    only with use_cache=False, which its Trainer and TRL's set.)

    transformers' Trainer: `Trainer(..., data_collator=GateCollator(collator))`; `seq_lengths` also needs
    `remove_unused_columns=False`. TRL's SFTTrainer refuses a collator for padding-free batches, so set it afterwards:
    `trainer.data_collator = GateCollator(trainer.data_collator)`, with `SFTConfig(remove_unused_columns=False)` where
    there are columns. TRL's packing drops all columns but its own, so it goes with PromptGate only; for columns use
    `padding_free=True`, or a dataset that you have packed yourself.

    prompt_mask=True adds `ilora_prompt_mask`, bool as input_ids: what the labels leave for PromptGate to read (the
    first token of a row that is labelled from its start). It is for trainers that take the labels away from the model
    (label smoothing, a loss of your own).

    Raises: ValueError naming the column that is missing from some examples or has rows of another length or number, and
    where several documents lie in a row but their lengths are not known.
    """

    def __init__(self, collator: Callable[..., Any], prompt_mask: bool = False) -> None:
        self.collator, self.prompt_mask = collator, prompt_mask

    @property
    def tokenizer(self) -> Any:
        """The wrapped collator's, which Trainer saves with its checkpoints."""
        return self.collator.tokenizer  # type: ignore[attr-defined]

    def __call__(self, features: list[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        counts = [len(feature["seq_lengths"]) if _packed(feature) else 1 for feature in features]
        columns = {name: rows for name in COLUMNS if (rows := _stack(name, features, counts)) is not None}
        rest = [{name: value for name, value in feature.items() if name not in COLUMNS} for feature in features]
        batch = self.collator(rest, *args, **kwargs)
        batch.update(columns)
        segments = _segments(batch, features)
        if segments is not None:
            batch["ilora_segments"] = segments
        if self.prompt_mask:
            batch["ilora_prompt_mask"] = _prompt_mask(batch)
        return batch


def _prompt_mask(batch: Mapping[str, Any]) -> Tensor:
    labels = batch.get("labels")
    if labels is None:
        raise ValueError("prompt_mask=True: the collator makes no labels, which show where the answer begins")
    shape, segments = tuple(batch["input_ids"].shape), batch.get("ilora_segments")
    return prompt_mask(batch.get("attention_mask"), labels, shape, 1, segments=segments, device=labels.device)


def _packed(feature: Mapping[str, Any]) -> bool:
    return feature.get("seq_lengths") is not None


def _stack(name: str, features: list[Mapping[str, Any]], counts: list[int]) -> Tensor | None:
    """float32 [N, width] of the column, or None where no example has it."""
    values = [feature.get(name) for feature in features]
    if all(value is None for value in values):
        return None
    rows: list[Tensor] = []
    for value, feature, count in zip(values, features, counts, strict=True):
        if value is None:
            raise ValueError(f"{name}: {sum(v is None for v in values)} of the batch's {len(values)} examples lack it")
        row = torch.as_tensor(value, dtype=torch.float32)
        if _packed(feature) and (row.dim() != 2 or row.shape[0] != count):
            raise ValueError(f"{name}: expected [{count}, width], a row for each of seq_lengths, got {list(row.shape)}")
        if not _packed(feature) and row.dim() != 1:
            raise ValueError(f"{name}: expected one row of numbers for an example, got {list(row.shape)}")
        rows.append(row.reshape(count, -1))
    if len({row.shape[1] for row in rows}) > 1:
        raise ValueError(f"{name}: its rows have different lengths, {sorted({row.shape[1] for row in rows})}")
    return torch.cat(rows)


def _segments(batch: Mapping[str, Any], features: list[Mapping[str, Any]]) -> Tensor | None:
    """int32 [N+1] offsets of the examples in the batch's flattened rows, or None where each has a row of its own."""
    ids = batch.get("input_ids")
    if ids is None or batch.get("ilora_segments") is not None:
        return None
    B, L = ids.shape[:2]
    packed = any(_packed(feature) for feature in features)
    if len(features) == B and not packed and not (B == 1 and _is_marked_as_packed(batch)):
        return None
    if B not in (1, len(features)):
        raise ValueError(f"{len(features)} examples became {B} rows: no row can be told its instance")
    lengths = [_lengths(feature) for feature in features]
    if len(features) == 1 and not packed and _restarts(batch, lengths[0][0]):
        raise ValueError("one example holds several sequences (positions restart in it), but it has no seq_lengths")
    if len(features) == B:  # each example has a padded row; the padding goes to the document next to it
        for row, own in enumerate(lengths):
            mask = batch.get("attention_mask")
            own[0 if mask is not None and not mask[row, 0] else -1] += L - sum(own)
    offsets = [0, *accumulate(length for own in lengths for length in own)]
    if offsets[-1] > B * L or any(length < 0 for own in lengths for length in own):
        raise ValueError(f"the collator cut examples: they have {offsets[-1]} tokens, its batch is {list(ids.shape)}")
    offsets[-1] = B * L
    return torch.tensor(offsets, dtype=torch.int32)


def _lengths(feature: Mapping[str, Any]) -> list[int]:
    """The tokens of each document of an example."""
    whole = len(feature["input_ids"])
    if not _packed(feature):
        return [whole]
    lengths = [int(n) for n in feature["seq_lengths"]]
    if sum(lengths) != whole or min(lengths) < 0:
        raise ValueError(f"seq_lengths: {lengths} of an example of {whole} tokens")
    return lengths


def _is_marked_as_packed(batch: Mapping[str, Any]) -> bool:
    if any(batch.get(name) is not None for name in ("cu_seq_lens_q", "cu_seqlens", "seq_idx")):
        return True
    return batch.get("attention_mask") is None and _restarts(batch, batch["input_ids"].shape[1])


def _restarts(batch: Mapping[str, Any], length: int) -> bool:
    """Whether the positions start again within the first `length` tokens of the first row."""
    positions = batch.get("position_ids")
    return positions is not None and positions.dim() == 2 and bool((positions[0, :length].diff() < 0).any())
