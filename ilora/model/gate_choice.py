"""Chooses the gate for a call of an injected model, and refuses one that does not fit the batch."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.modules import embeddings as embeddings_of
from ..adapter.record import Adapter
from ..base_layers import compute_device
from ..current_gate import CurrentGate
from ..gates.networks import PromptGate, UniformGate
from ..gates.pooling import attended_tokens, prompt_mask
from ..op.checks import float_gate
from .batch import Inputs, read_media

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


def choose_gate(
    model: Any,
    inputs: Inputs,
    gate: Tensor | None,
    z: Tensor | None,
    segments: Tensor | None,
    mask: Tensor | None,
    media_rows: Any = None,
) -> CurrentGate:
    """The gate of one call and what it belongs to. Raises ValueError, TypeError, RuntimeError naming the argument that
    does not fit."""
    check_argument_types(segments, mask)
    given, outer = [g is not None for g in (gate, z)], model.ilora.state.current
    refuse_replica(model)
    if model.ilora.merged or not model.ilora.state.enabled:
        if model.ilora.merged and model.training and torch.is_grad_enabled():
            raise RuntimeError("a gate is merged into the weights, nothing would be trained: ilora.unmerge first")
        if any(given):
            why = "a gate is merged into the weights" if model.ilora.merged else "the adapter is disabled"
            raise RuntimeError(f"ilora_gate or ilora_z was given, but {why}")
        return CurrentGate()
    if all(given):
        raise ValueError("ilora_gate and ilora_z were both given; one of them decides")
    generating = outer.generating and not any(given)
    if not any(given) and outer.gate is not None:
        gate, segments = outer.gate, outer.segments if segments is None else segments
    elif gate is None:
        gate = ask_network(model, inputs, z, segments, mask)
    elif mask is not None:
        raise ValueError("ilora_prompt_mask was given with ilora_gate; it is for models with a PromptGate")
    check_gate(model, gate, segments, inputs, generating, shared=z is None)
    if segments is not None:
        segments = segments.to(device=gate.device, dtype=torch.int32)
    if generating and media_rows is None:
        media_rows = outer.media_rows
    N = gate.shape[-2]
    media = read_media(model, inputs, N, media_rows, generating, segments is not None) if N > 1 else None
    return CurrentGate(gate, segments, inputs.rows, inputs.lengths, generating=generating, media=media)


def refuse_replica(model: Any) -> None:
    """Raises RuntimeError inside of nn.DataParallel."""
    if getattr(model, "_is_replica", False):
        raise RuntimeError("nn.DataParallel shares one gate among its threads; use DistributedDataParallel")


def check_argument_types(segments: Tensor | None, mask: Tensor | None) -> None:
    """Raises TypeError for an ilora_segments that is no integer tensor and an ilora_prompt_mask that is no tensor."""
    if segments is not None and (not isinstance(segments, Tensor) or segments.is_floating_point()):
        got = getattr(segments, "dtype", type(segments).__name__)
        raise TypeError(f"ilora_segments: expected int32 [N+1] row offsets, got {got}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"ilora_prompt_mask: expected a bool tensor, got {type(mask).__name__}")


def ask_network(
    model: Any,
    inputs: Inputs,
    z: Tensor | None,
    segments: Tensor | None,
    mask: Tensor | None,
    adapter: Adapter | None = None,
) -> Tensor:
    """The gate that the gate network of an adapter (None: the active one) computes from these inputs. Raises ValueError
    for a missing input."""
    kept_for = model.ilora.adapter.name if adapter is None else None  # among several adapters a cache keeps no gate
    adapter = model.ilora.adapter if adapter is None else adapter
    network: Any = adapter.gate
    if network is None:
        wanted = f"ilora_gate [N, {adapter.config.num_experts}]"
        if z is not None:
            raise ValueError(
                f"ilora_z was given to a model without a gate network; give {wanted}, or inject with gate="
            )
        raise ValueError(
            f"{type(model).__name__} needs {wanted}: model(..., ilora_gate=g), or `with ilora.gated(model, g)`"
        )
    if isinstance(network, (PromptGate, UniformGate)):
        if z is not None:
            raise ValueError(f"ilora_z was given to a model whose {type(network).__name__} takes none")
        if isinstance(network, UniformGate):
            if segments is None and packed_by(inputs) is not None:  # it is everybody's
                return network(1, compute_device(model))
            return network(segments.numel() - 1 if segments is not None else inputs.batch or 1, compute_device(model))
        kept = _gate_of_cache(inputs, mask, kept_for)
        return _prompt_gate(model, network, inputs, segments, mask) if kept is None else kept
    if mask is not None:
        raise ValueError(f"ilora_prompt_mask was given to a model whose {type(network).__name__} pools no prompt")
    if z is None:
        raise ValueError(f"{type(model).__name__} needs ilora_z for its {type(network).__name__} (or an ilora_gate)")
    return network(z)


def _prompt_gate(
    model: Any, network: PromptGate, inputs: Inputs, segments: Tensor | None, mask: Tensor | None
) -> Tensor:
    values = inputs.values
    embeddings, has_row = values.get("inputs_embeds"), None
    if embeddings is None:
        if values.get("input_ids") is None:
            raise ValueError("PromptGate needs input_ids or inputs_embeds; give ilora_gate where there are none")
        table = embeddings_of(model)
        if table is None:
            raise ValueError(f"PromptGate needs inputs_embeds: {type(model).__name__} names no input embeddings")
        embeddings, has_row = _embed(table, values["input_ids"])
    if segments is None and packed_by(inputs) is not None:
        raise ValueError(_segments_needed(inputs))
    B, L = embeddings.shape[:2]
    if mask is None:
        labels = values.get("labels") if _answer_follows_prompt(model) else None
        if labels is not None and labels.shape != (B, L):  # one for each sequence: all of it is the prompt
            labels = None
        lengths = model.ilora.state.prompt_lengths
        if labels is None and lengths is None and _answer_follows_prompt(model) and hasattr(model, "generate"):
            _refuse_answers(model, values)
        mask = prompt_mask(
            attended_tokens(model, values),
            labels,
            (B, L),
            network.min_tokens,
            segments=segments,
            device=embeddings.device,
            lengths=lengths,
        )
    elif mask.shape != (B, L):
        raise ValueError(f"ilora_prompt_mask: expected [{B}, {L}] as the input, got {list(mask.shape)}")
    return network(embeddings, mask.bool() if has_row is None else mask.bool() & has_row, segments)


def keep_gate_with_cache(model: Any, current: CurrentGate, *caches: Any) -> None:
    """Notes at the caches of a generate the gate that one adapter computed their tokens under, if it did."""
    note = None if current.gate is None or current.mixture else (model.ilora.adapter.name, current.gate)
    for cache in caches:
        if hasattr(cache, "get_seq_length"):
            cache.ilora_gate = note


def _gate_of_cache(inputs: Inputs, mask: Tensor | None, adapter: str | None) -> Tensor | None:
    """The gate that the cache of this call was filled under, a row for each sequence, or None where it is empty.
    Raises ValueError where it keeps no gate of the adapter with this name, or a prompt mask was given beside it."""
    cache = inputs.values.get("past_key_values")
    if cache is None or (hasattr(cache, "get_seq_length") and cache.get_seq_length() == 0):
        return None
    name, gate = getattr(cache, "ilora_gate", None) or (None, None)
    if gate is None or name != adapter:
        raise ValueError(
            "past_key_values holds tokens that PromptGate does not see, and no gate of this adapter that generate kept "
            "with them: keep one gate for all steps and turns, "
            "`with ilora.gated(model, ilora.gate_of(model, **first_prompt)): ...`"
        )
    if mask is not None:
        raise ValueError("ilora_prompt_mask was given with past_key_values, which keep the gate of their first prompt")
    N, rows = gate.shape[-2], inputs.batch or 1
    return gate.repeat_interleave(rows // N, -2) if 1 < N < rows and rows % N == 0 else gate  # return sequences


def _answer_follows_prompt(model: Any) -> bool:
    """Whether the answer follows the prompt in the same row, so that labels [B, L] show where it begins. In
    encoder-decoders labels are the decoder's, and in taggers and masked language models they describe each token."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return bool(getattr(model, "can_generate", lambda: True)())


def _refuse_answers(model: Any, values: dict[str, Any]) -> None:
    if model.training and torch.is_grad_enabled() and values.get("labels") is None:
        raise ValueError(
            "PromptGate: a forward in training without labels would show it the answer, which no generation does: give "
            "labels, or ilora_prompt_mask (bool, as input_ids; Trainer takes the labels away for label smoothing and "
            "for losses of your own: GateCollator(collator, prompt_mask=True) makes the mask of them), or ilora_gate"
        )


def warn_of_answer(model: Any, network: nn.Module | None, inputs: Inputs, mask: Tensor | None) -> None:
    """Warns once for a PromptGate that reads the whole input of a forward, since an answer may be in it."""
    state = model.ilora.state
    if not isinstance(network, PromptGate) or network.warned or mask is not None or state.current.gate is not None:
        return
    told = state.prompt_lengths is not None or inputs.values.get("labels") is not None
    if (
        told
        or not hasattr(model, "generate")
        or not _answer_follows_prompt(model)
        or max(inputs.lengths, default=0) < 2
    ):
        return
    network.warned = True
    warnings.warn(
        "PromptGate reads every token of this forward as the prompt. If an answer is among them, as where an "
        "evaluation scores answers, its gate is not the one of training and generation: give labels or "
        "ilora_prompt_mask, or score inside `with ilora.prompt_lengths(model, lengths)`",
        stacklevel=2,
    )


def _embed(embedding: Any, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """The embeddings [B, L, H] of ids [B, L], and which of them are rows of the embedding: the placeholder of an image
    or a sound may be outside of the vocabulary."""
    if hasattr(getattr(embedding, "weight", None), "device_mesh"):
        from torch.distributed.fsdp import FSDPModule

        if not isinstance(embedding, FSDPModule):  # which would gather its own weight when it is called
            raise RuntimeError(
                "PromptGate reads the input embeddings before the model's forward, and fully_shard has spread them "
                "with the whole model: call fully_shard(model.get_input_embeddings()) too, before fully_shard(model)"
            )
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None:
        return embedding(ids), None
    has_row = (ids >= 0) & (ids < rows)
    return embedding(torch.where(has_row, ids, 0)), has_row


def check_gate(
    model: Any, gate: Tensor, segments: Tensor | None, inputs: Inputs, generating: bool, shared: bool = True
) -> None:
    """Raises ValueError unless there is one gate row for each sequence, or one for all, or segments that say which row
    belongs to which instance; TypeError for a gate that is no float tensor. generating: it is a step of generate.
    shared: whether one gate row may be for several sequences packed in one row, as one made of a single z is not."""
    check_width(model.ilora.adapter, gate)
    N = gate.shape[-2]
    if segments is None:
        check_rows(model, N, inputs, generating, shared)
    elif segments.shape != (N + 1,):
        raise ValueError(f"ilora_segments: expected [N+1={N + 1}] row offsets, got {list(segments.shape)}")


def check_width(adapter: Adapter, gate: Tensor) -> None:
    """Raises ValueError, TypeError unless the gate is a float tensor with the adapter's experts and blocks."""
    E, layers = adapter.config.num_experts, len(adapter.blocks)
    expected = f"[N, {E}], or [{layers}, N, {E}] with one for each block"
    float_gate(gate, expected, num_experts=E)
    if gate.dim() not in (2, 3) or (gate.dim() == 3 and gate.shape[0] != layers):
        raise ValueError(f"gate: expected {expected}, got {list(gate.shape)}")


def check_rows(model: Any, N: int, inputs: Inputs, generating: bool, shared: bool = True) -> None:
    """Raises ValueError unless N gate rows, without segments, fit the sequences; the arguments are `check_gate`'s."""
    if inputs.rows is None or inputs.batch is None or N == 0 or (N == 1 and shared):
        return
    if generating:
        copies = model.ilora.state.copies
        # Whisper looks for speech in its prompts once more, before it has made copies of them.
        meant = {N, N * copies} if hasattr(model, "generate_with_fallback") else {N * copies}
        if inputs.rows not in meant and N > 1:
            raise ValueError(
                f"generate runs {inputs.rows} rows for {N} prompts under a gate each (expected {N * copies}), so no "
                "row can be told its prompt; generate for one prompt at a time, or under one gate"
            )
        return
    if packed_by(inputs) is not None:
        raise ValueError(_segments_needed(inputs))
    if not (N == 1 or inputs.rows == N or inputs.batch == N):  # no `in`: sizes may be symbols
        raise ValueError(
            f"gate: it has {N} rows for a batch of {inputs.batch} sequences; give one for each, or one for all, or "
            "ilora_segments=[N+1] row offsets where one row holds several sequences"
        )


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


def _segments_needed(inputs: Inputs) -> str:
    return (
        f"{packed_by(inputs)} says that a row holds several sequences (packed or padding-free batch): give "
        "ilora_segments, int32 [N+1] offsets of the N instances in the flattened rows"
    )
