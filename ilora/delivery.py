"""A model whose forward and generate take a gate: the class that `inject` puts in front of the model's own."""

from __future__ import annotations

import functools
import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .config import ILoRAConfig
from .gate import Frame, GateState, capture_checkpoints, framed
from .inputs import Inputs, packed_by, read_inputs
from .layer import ILoRALinear
from .networks import PromptGate, UniformGate
from .patched import under_gate
from .pooling import prompt_mask
from .stats import balance_loss

ARGUMENTS = ("ilora_gate", "ilora_z", "ilora_segments", "ilora_prompt_mask")


@dataclass
class Adapter:
    """One set of updates: the layers by path (each with the frozen layer it stands for), the modules trained whole, the
    gate network, and the blocks that have a gate each, in order. In the model, or kept beside it."""

    name: str
    config: ILoRAConfig
    gate: nn.Module | None
    blocks: list[str]
    layers: dict[str, ILoRALinear]
    saved: dict[str, nn.Module]


@dataclass
class Injection:
    """What `inject` has done to a model, so that it can be undone.

    adapter: the one in the model. others: those kept beside it, by name. originals: the frozen modules that
    modules_to_save took the place of. trainable: the parameters that were trainable. tied: transformers' record of
    tied weights that no longer are. merged: whether a gate is merged into the weights; unmerged: the weights before.
    forward: the one on the instance, if somebody had put one there.
    """

    state: GateState
    trainable: list[str]
    adapter: Adapter
    others: dict[str, Adapter] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    tied: dict[str, Any] = field(default_factory=dict)
    merged: bool = False
    unmerged: dict[str, nn.Parameter] = field(default_factory=dict)
    forward: Any = None

    @property
    def config(self) -> ILoRAConfig:
        return self.adapter.config


class ILoRAModel:
    """Mixed into the class of an injected model: `type(model)` is still a subclass of what it was, with its name."""

    ilora: Injection
    ilora_gate: nn.Module | None
    ilora_base: type  # the model's own class
    _ilora_parameters: tuple[str, ...]  # of its forward, those that may be given by position

    def forward(
        self,
        *args: Any,
        ilora_gate: Tensor | None = None,
        ilora_z: Tensor | None = None,
        ilora_segments: Tensor | None = None,
        ilora_prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward, its layers under the gate: ilora_gate [N, E], or what the model's gate network makes
        of ilora_z [N, z_dim] or of the prompt; else the gate in force (`gated`, `generate`).

        ilora_segments: int32 [N+1] row offsets where one row holds several sequences (packed, padding-free).
        ilora_prompt_mask: bool, as input_ids; what PromptGate pools instead of its own rule.
        """
        state = self.ilora.state
        inputs = read_inputs(self._ilora_parameters, args, kwargs)
        frame = self._ilora_frame(inputs, ilora_gate, ilora_z, ilora_segments, ilora_prompt_mask)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():  # type: ignore[attr-defined]
            capture_checkpoints(self, state)  # type: ignore[arg-type]
        before, state.frame = state.frame, frame
        try:
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            state.frame = before
        state.last = None if frame.gate is None else frame.gate.detach()
        weight = getattr(self.ilora_gate, "balance", 0.0)
        if weight and self.training and frame.gate is not None:  # type: ignore[attr-defined]
            output = _with_balance(output, weight * balance_loss(frame.gate), inputs)
        return output

    def _ilora_frame(
        self, inputs: Inputs, gate: Tensor | None, z: Tensor | None, segments: Tensor | None, mask: Tensor | None
    ) -> Frame:
        """The frame of one call, checked: a gate that does not fit the batch is refused here, by name."""
        given, inherited = [g is not None for g in (gate, z)], self.ilora.state.frame
        if getattr(self, "_is_replica", False):
            raise RuntimeError("nn.DataParallel shares one gate among its threads; use DistributedDataParallel")
        if self.ilora.merged or not self.ilora.state.enabled:
            if self.ilora.merged and self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
                raise RuntimeError("a gate is merged into the weights, nothing would be trained: ilora.unmerge first")
            if any(given):
                why = "a gate is merged into the weights" if self.ilora.merged else "the adapter is disabled"
                raise RuntimeError(f"ilora_gate or ilora_z was given, but {why}")
            return Frame()
        if all(given):
            raise ValueError("ilora_gate and ilora_z were both given; one of them decides")
        expanded = inherited.expanded and not any(given)
        if not any(given) and inherited.gate is not None:
            gate, segments = inherited.gate, inherited.segments if segments is None else segments
        elif gate is None:
            gate = network_gate(self, inputs, z, segments, mask)
        elif mask is not None:
            raise ValueError("ilora_prompt_mask was given with ilora_gate; it is for models with a PromptGate")
        if segments is not None:
            segments = segments.to(device=gate.device, dtype=torch.int32)
        check_gate(self, gate, segments, inputs, expanded)
        return Frame(gate, segments, inputs.rows, inputs.lengths, expanded)

    def __setattr__(self, name: str, value: Any) -> None:
        # TRL's fused head, accelerate's device maps and others put a forward on the instance, which hides the class's.
        super().__setattr__(name, under_gate(self, value) if name == "forward" else value)
        if name == "ilora_gate":  # another gate network: it is saved and switched with the adapter
            self.ilora.adapter.gate = value

    def disable_adapter(self) -> AbstractContextManager[Any]:
        """As `ilora.disable_adapter(model)`."""
        from .model import disable_adapter

        return disable_adapter(self)

    def print_trainable_parameters(self) -> None:
        """As `ilora.print_trainable_parameters(model)`."""
        from .model import print_trainable_parameters

        print_trainable_parameters(self)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Writes the adapter, not the frozen model: `ilora.save_adapter`. Called by transformers' Trainer as well."""
        from .storage.checkpoint import save_pretrained

        save_pretrained(self, save_directory, *args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """torch's; with strict=False the frozen base may be missing without being reported, as in adapter files."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]
        if not strict:
            trainable = {name for name, p in self.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]
            result.missing_keys[:] = [key for key in result.missing_keys if key in trainable]
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: a copy finds its way back to it through the model's own.
        return _blank, (self.ilora_base,), self.__dict__


class ILoRAGenerator(ILoRAModel):
    """For a model class with a generate of its own."""

    def generate(
        self,
        *args: Any,
        ilora_gate: Tensor | None = None,
        ilora_z: Tensor | None = None,
        ilora_prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate under one gate for each prompt, [N, E], also with beams and return sequences.
        A gate network is asked once, from ilora_z or from the prompt, and its answer kept for all steps."""
        inputs = read_inputs(("input_ids",), args, {**kwargs, **_named_inputs(kwargs)})
        with torch.no_grad():
            if isinstance(self.ilora_gate, PromptGate):
                inputs = _with_padding_mask(self, inputs)
            frame = self._ilora_frame(inputs, ilora_gate, ilora_z, None, ilora_prompt_mask)
        # Which rows a step sees is generate's own affair from here on: some multiple of the prompts, in their order.
        with framed(self.ilora.state, Frame(frame.gate, expanded=True)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def network_gate(model: Any, inputs: Inputs, z: Tensor | None, segments: Tensor | None, mask: Tensor | None) -> Tensor:
    """What the model's gate network says of these inputs. Raises ValueError where it lacks what it needs."""
    network = model.ilora_gate
    if network is None:
        wanted = f"ilora_gate [N, {model.ilora.config.num_experts}]"
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
            N = segments.numel() - 1 if segments is not None else inputs.batch or 1
            return network(N, next(model.parameters()).device)
        return _prompt_gate(model, network, inputs, segments, mask)
    if mask is not None:
        raise ValueError(f"ilora_prompt_mask was given to a model whose {type(network).__name__} pools no prompt")
    if z is None:
        raise ValueError(f"{type(model).__name__} needs ilora_z for its {type(network).__name__} (or an ilora_gate)")
    return network(z)


def _prompt_gate(
    model: Any, network: PromptGate, inputs: Inputs, segments: Tensor | None, mask: Tensor | None
) -> Tensor:
    values = inputs.values
    cache = values.get("past_key_values")
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0):
        raise ValueError(
            "a decoding step does not show PromptGate its prompt: use model.generate, or "
            "`with ilora.gated(model, ilora.gate_of(model, **prompt))` around your own loop"
        )
    embeddings = values.get("inputs_embeds")
    if embeddings is None:
        if values.get("input_ids") is None:
            raise ValueError("PromptGate needs input_ids or inputs_embeds; give ilora_gate where there are none")
        embeddings = model.get_input_embeddings()(values["input_ids"])
    if segments is None and packed_by(inputs) is not None:
        raise ValueError(_needs_segments(inputs))
    B, L = embeddings.shape[:2]
    if mask is None:
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        labels = None if encoder_decoder else values.get("labels")
        if labels is not None and labels.shape != (B, L):  # one for each sequence: all of it is the prompt
            labels = None
        mask = prompt_mask(
            values.get("attention_mask"),
            labels,
            (B, L),
            network.min_tokens,
            segments=segments,
            device=embeddings.device,
        )
    elif mask.shape != (B, L):
        raise ValueError(f"ilora_prompt_mask: expected [{B}, {L}] as the input, got {list(mask.shape)}")
    return network(embeddings, mask.bool(), segments)


def check_gate(model: Any, gate: Tensor, segments: Tensor | None, inputs: Inputs, expanded: bool) -> None:
    """One gate row for each sequence of the batch (or one for all), or segments that say which rows are whose."""
    E, layers = model.ilora.config.num_experts, len(model.ilora.adapter.blocks)
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError(f"gate: expected a float tensor, got {getattr(gate, 'dtype', type(gate).__name__)}")
    if gate.dim() not in (2, 3) or gate.shape[-1] != E or (gate.dim() == 3 and gate.shape[0] != layers):
        raise ValueError(
            f"gate: expected [N, {E}], or [{layers}, N, {E}] with one for each block, got {list(gate.shape)}"
        )
    N = gate.shape[-2]
    if segments is not None:
        if segments.shape != (N + 1,):
            raise ValueError(f"ilora_segments: expected [N+1={N + 1}] row offsets, got {list(segments.shape)}")
        return
    if inputs.rows is None or inputs.batch is None or N == 0:
        return
    packed = None if expanded else packed_by(inputs)
    fits = inputs.rows % N == 0 if expanded else N in (1, inputs.batch, inputs.rows)
    if packed is not None:
        raise ValueError(_needs_segments(inputs))
    if not fits:
        raise ValueError(
            f"gate: it has {N} rows for a batch of {inputs.batch} sequences; give one for each, or one for all, or "
            "ilora_segments=[N+1] row offsets where one row holds several sequences"
        )


def _needs_segments(inputs: Inputs) -> str:
    return (
        f"{packed_by(inputs)} says that a row holds several sequences (packed or padding-free batch): give "
        "ilora_segments, int32 [N+1] offsets of the N instances in the flattened rows"
    )


def _with_balance(output: Any, term: Tensor, inputs: Inputs) -> Any:
    """The output with the load-balance term on its loss, weighed as this batch is weighed in an accumulated step."""
    labels, items = inputs.values.get("labels"), inputs.values.get("num_items_in_batch")
    if labels is None:
        return output
    if items is not None:
        term = term * ((labels != -100).sum() / items)
    if isinstance(output, dict):
        if output.get("loss") is None:
            return output
        output["loss"] = output["loss"] + term
        return output
    return (output[0] + term, *output[1:])


def _named_inputs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": kwargs["inputs"]} if kwargs.get("inputs") is not None else {}


def _with_padding_mask(model: Any, inputs: Inputs) -> Inputs:
    """generate without a mask takes the pad token for padding, if the prompts have it: so does the prompt's gate."""
    values = inputs.values
    ids = values.get("input_ids")
    if ids is None or values.get("attention_mask") is not None or ids.is_floating_point():
        return inputs
    settings = [values, values.get("generation_config"), getattr(model, "generation_config", None)]

    def setting(name: str) -> Any:
        read = (s.get(name) if isinstance(s, dict) else getattr(s, name, None) for s in settings)
        return next((value for value in read if value is not None), None)

    pad, eos = setting("pad_token_id"), setting("eos_token_id")
    if pad is None or pad in (eos if isinstance(eos, (list, tuple)) else [eos]):
        return inputs
    return inputs._replace(values={**values, "attention_mask": ids != pad})


@functools.cache
def ilora_class(base: type) -> type:
    """The subclass of a model class that takes a gate; the same one every time."""
    own = inspect.signature(base.forward)  # type: ignore[attr-defined]
    parameters = list(own.parameters.values())
    tail = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ARGUMENTS]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ILoRAModel.forward(self, *args, **kwargs)

    # transformers' Trainer keeps the columns that the signature names.
    forward.__signature__ = own.replace(parameters=[p for p in parameters if p not in tail] + extra + tail)  # type: ignore[attr-defined]
    del forward.__wrapped__  # who unwraps a forward, as accelerate does, stops at this one
    members: dict[str, Any] = {
        "forward": forward,
        "ilora_base": base,
        "_ilora_parameters": tuple(p.name for p in parameters[1:] if p.kind in positional),
    }
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    if hasattr(base, "tie_weights"):
        members["tie_weights"] = _tie_weights
    mixin = ILoRAGenerator if hasattr(base, "generate") else ILoRAModel
    return type(base.__name__, (mixin, base), members)


def _tie_weights(model: Any, missing_keys: Any = None, recompute_mapping: bool = True) -> None:
    # Never recomputed: inject has taken the modules that are trained whole out of the record.
    super(ILoRAModel, model).tie_weights(missing_keys=missing_keys, recompute_mapping=False)


def _blank(base: type) -> Any:
    kind: Any = ilora_class(base)
    return kind.__new__(kind)
