"""Scoring answers under the gate of their prompt, as evaluation harnesses need it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .networks import PromptGate


@contextmanager
def prompt_lengths(model: Any, lengths: int | Sequence[int] | Tensor) -> Iterator[Any]:
    """`with ilora.prompt_lengths(model, lengths): model(input_ids)`: PromptGate reads the prompts, not what follows.

    For forwards that score answers without labels, in evaluation. lengths: how many tokens of each sequence are its
    prompt, one int [N] for each or one for all (at least the gate's min_tokens). Padding on the left does not count,
    if the attention mask or the model's pad token shows it; what follows the prompt does not matter. Labels in the call
    do not change it, ilora_prompt_mask and ilora_gate do. It also holds for `generate` and `gate_of`, and for every
    thread. Blocks nest.
    Raises: ValueError for a model without a PromptGate and negative lengths, TypeError for what is no integer; the
    forward raises ValueError for another number of lengths than sequences.
    """
    if not isinstance(getattr(model, "ilora_gate", None), PromptGate):
        raise ValueError(f"prompt_lengths: {type(model).__name__} has no PromptGate, whose prompts it could tell")
    counts = torch.as_tensor(lengths)
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool or counts.dim() > 1:
        raise TypeError(f"prompt_lengths: expected an int or ints [N], got {counts.dtype} {list(counts.shape)}")
    if counts.numel() == 0 or bool((counts < 0).any()):
        raise ValueError(f"prompt_lengths: expected lengths >= 0, got {counts.tolist()}")
    state = model.ilora.state
    before, state.prompt_lengths = state.prompt_lengths, counts.long().reshape(-1)
    try:
        yield model
    finally:
        state.prompt_lengths = before


class PromptScoring:
    """For lm-evaluation-harness: `class LM(ilora.PromptScoring, HFLM): ...` scores each continuation under the gate of
    its context, as generation after this context would have it.

    `LM(pretrained=model, tokenizer=tokenizer, batch_size=8)` takes the place of the HFLM; generation is HFLM's own, and
    so is everything for a model without a PromptGate and for encoder-decoders, whose gate reads the context alone. HFLM
    gives the model a context and its continuation as one row, without labels. The rows are told apart by their tokens;
    requests that make the same row of contexts of different lengths are scored one after the other.
    """

    _lengths: dict[tuple[int, ...], int]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], *args: Any, **kw: Any) -> Any:
        base: Any = super()
        if self.backend != "causal" or not isinstance(getattr(self.model, "ilora_gate", None), PromptGate):  # type: ignore[attr-defined]
            return base._loglikelihood_tokens(requests, *args, **kw)
        passes: list[tuple[dict[tuple[int, ...], int], list[int]]] = []
        for i, (_, context, continuation) in enumerate(requests):
            row = (context + continuation)[-(self.max_length + 1) :][:-1]  # type: ignore[attr-defined]
            length = len(row) + 1 - len(continuation)
            for lengths, indices in passes:
                if lengths.setdefault(_without_padding(row), length) == length:
                    indices.append(i)
                    break
            else:
                passes.append(({_without_padding(row): length}, [i]))
        scores: dict[int, Any] = {}
        for self._lengths, indices in passes:
            try:
                found = base._loglikelihood_tokens([requests[i] for i in indices], *args, **kw)
            finally:
                self._lengths = {}
            scores |= dict(zip(indices, found, strict=True))
        return [scores[i] for i in range(len(requests))]

    def _model_call(self, inps: Tensor, *args: Any, **kw: Any) -> Any:
        base: Any = super()
        if not getattr(self, "_lengths", None):
            return base._model_call(inps, *args, **kw)
        # A row that is none of the requests' is HFLM's own, to find the largest batch that fits.
        lengths = [self._lengths.get(_without_padding(row), len(row)) for row in inps.tolist()]
        with prompt_lengths(self.model, lengths):  # type: ignore[attr-defined]
            return base._model_call(inps, *args, **kw)


def _without_padding(row: list[int]) -> tuple[int, ...]:
    """The tokens up to the last that is not 0, with which HFLM fills rows on the right."""
    end = len(row)
    while end and row[end - 1] == 0:
        end -= 1
    return tuple(row[:end])
