"""The class that `inject` puts in front of a model's own: calling the model, and generating, take a gate."""

from __future__ import annotations

import functools
import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.modules import freeze_statistics
from ..adapter.record import Injection, is_injected, print_trainable_parameters
from ..adapter.switch import adapter_methods, bind, disable_adapter
from ..current_gate import CurrentGate, capture_checkpoints, using
from ..gates.pooling import generation_setting
from ..gates.stats import balance_loss
from ..storage.save import save_pretrained
from .adapter_choice import choose
from .batch import Inputs, read_inputs
from .gate_choice import keep_gate_with_cache, warn_of_answer

ARGUMENTS = ("ilora_gate", "ilora_z", "ilora_segments", "ilora_prompt_mask", "ilora_media_rows", "ilora_adapters")


class ILoRAModel:
    """A mixin. The class of an injected model derives from this and from its class before, whose name it keeps."""

    ilora: Injection
    ilora_gate: nn.Module | None
    ilora_base: type  # the class that the model had before
    _ilora_parameters: tuple[str, ...]  # the names of its forward's positional parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call, its layers under a gate: ilora_gate [N, E], or what the model's gate network makes of
        ilora_z [N, z_dim] or of the prompt; else the gate in force (`gated`, `generate`).

        ilora_segments: int32 [N+1] row offsets where one row holds several sequences (packed, padding-free).
        ilora_prompt_mask: bool, as input_ids; what PromptGate pools instead of its own rule.
        ilora_media_rows: for each image, sound or video the row of the batch that it belongs to, in the order in which
        the model is given them, for layers that see them; {argument: rows} where several arguments hold media. Needed
        where the placeholders in input_ids do not tell it.
        ilora_adapters: the adapter of each instance, by name, None for the frozen model; or int64 [N] into
        `ilora.adapters(model)`, -1 for the frozen model. Each adapter has its own gate: its network's, or its rows of
        ilora_gate; that and ilora_z may be dicts, with the rows of each adapter under its name.
        A forward that another library puts on the model (TRL's fused head, accelerate's hooks) runs inside of this.
        """
        state = self.ilora.state
        with state.lock():
            before = state.current
            try:
                output = super().__call__(*args, **kwargs)  # type: ignore[misc]
                if state.balance_due:
                    raise RuntimeError(
                        "the gate network's balance term has no loss to be added to: another library's forward stands "
                        "before the model's own and computes the loss itself (as TRL's does); set its balance to 0, or "
                        "add ilora.balance_loss to the loss yourself"
                    )
            finally:
                state.set_current(before)
            state.end_forward()
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        adapter = self.ilora.adapter if name == "ilora_gate" else None
        if adapter is not None:  # another gate network: it is saved and switched with the adapter
            bind(self, adapter.config, value, len(adapter.blocks))
        super().__setattr__(name, value)
        if adapter is not None:
            adapter.gate = value

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own train; frozen norms that keep running statistics stay in eval mode."""
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        freeze_statistics(self)
        return result

    def disable_adapter(self) -> AbstractContextManager[Any]:
        """As `ilora.disable_adapter(model)`."""
        return disable_adapter(self)

    def print_trainable_parameters(self) -> None:
        """As `ilora.print_trainable_parameters(model)`."""
        print_trainable_parameters(self)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Writes the adapter, not the frozen model: `ilora.save_adapter`. Called by transformers' Trainer as well."""
        save_pretrained(self, save_directory, *args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """torch's. With strict=False, missing weights of the frozen base are not reported: adapter files have none."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]
        if not strict:
            trainable = {name for name, p in self.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]
            missing = [key for key in result.missing_keys if key in trainable or key.startswith("ilora_gate.")]
            result.missing_keys[:] = missing
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        # This class is made at run time, so a copy or a pickle makes it anew from the model's own class.
        return _blank, (self.ilora_base,), self.__dict__


class ILoRAGenerator(ILoRAModel):
    """The mixin for model classes that can generate."""

    def generate(
        self,
        *args: Any,
        ilora_gate: Tensor | None = None,
        ilora_z: Tensor | None = None,
        ilora_prompt_mask: Tensor | None = None,
        ilora_media_rows: Any = None,
        ilora_adapters: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate under one gate row for each prompt [N, E], also with beams and return sequences.
        The gate network computes the gate once, from ilora_z or from the prompts, and it holds for all steps. The cache
        keeps it: a PromptGate's next call with that cache, as a chat's second turn, goes on under the same gate.
        ilora_media_rows, ilora_adapters: as in the model's call."""
        main, state = getattr(self, "main_input_name", "input_ids"), self.ilora.state
        named = {main: kwargs["inputs"]} if kwargs.get("inputs") is not None else {}
        inputs = read_inputs((main,), args, {**kwargs, **named})
        with state.lock():
            with torch.no_grad():
                given = (ilora_gate, ilora_z, None, ilora_prompt_mask, ilora_media_rows, ilora_adapters)
                current = choose(self, inputs, *given)
            # Each step runs the prompts in their order, each of them `copies` times in a row; what generate calls by
            # itself (an encoder, a language model within) may find them before or after they are copied.
            settings = [generation_setting(self, kwargs, name) for name in ("num_beams", "num_return_sequences")]
            current = current._replace(
                lengths=(), copies=max(1, *(n or 1 for n in settings)), generating=True, media_rows=ilora_media_rows
            )
            before, state.copies = state.copies, 1
            try:
                with using(state, current):
                    output = super().generate(*args, **kwargs)  # type: ignore[misc]
            finally:
                state.copies = before
        caches = (kwargs.get("past_key_values"), getattr(output, "past_key_values", None))
        keep_gate_with_cache(self, current, *caches)
        return output

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        self.ilora.state.copies = expand_size
        return super()._expand_inputs_for_generation(expand_size, *args, **kwargs)  # type: ignore[misc]


class ILoRATranscriber(ILoRAGenerator):
    """The mixin for Whisper, whose generate goes on with those recordings alone that are not over yet, and tries those
    again whose text is doubtful."""

    _ilora_doubtful: list[int]

    def generate_with_fallback(self, *args: Any, batch_idx_map: list[int], seek: Tensor, **kwargs: Any) -> Any:
        """transformers' own, under the gates of the recordings in batch_idx_map, which are not over."""
        state, self._ilora_doubtful = self.ilora.state, []
        gate, current = state.current.gate, state.current
        if gate is not None and gate.shape[-2] > 1:
            copies = len(seek) // gate.shape[-2]  # return sequences are recordings of their own here
            current = _with_rows(current, [i // copies for i in batch_idx_map])
        with using(state, current):
            return super().generate_with_fallback(*args, batch_idx_map=batch_idx_map, seek=seek, **kwargs)  # type: ignore[misc]

    def _need_fallback(self, sequence: Any, outputs: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        again, skipped = super()._need_fallback(sequence, outputs, index, *args, **kwargs)  # type: ignore[misc]
        state, doubtful = self.ilora.state, self._ilora_doubtful
        doubtful += [index] * bool(again)
        if state.current.gate is not None and index == state.current.gate.shape[-2] - 1:  # the last one of this try
            if doubtful:
                state.set_current(_with_rows(state.current, doubtful))
            doubtful.clear()
        return again, skipped


def _with_rows(current: CurrentGate, rows: list[int]) -> CurrentGate:
    """The current gate of these rows of it alone."""
    assert current.gate is not None
    gate = current.gate.index_select(-2, torch.tensor(rows, device=current.gate.device))
    mixture = None if current.mixture is None else current.mixture.of_rows(rows)
    return current._replace(gate=gate, rows=len(rows), mixture=mixture)


def put_gate_in_force(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The forward pre-hook of an injected model. It takes our arguments out of the call and puts the gate they mean in
    force. It is a hook so that FSDP's own, which gathers the gate network's parameters, runs first."""
    own = {name: value for name, value in kwargs.items() if name not in ARGUMENTS}
    state = model.ilora.state
    inputs = read_inputs(model._ilora_parameters, args, own)
    current = choose(model, inputs, *(kwargs.get(name) for name in ARGUMENTS))
    if current.gate is not None and kwargs.get("ilora_gate") is None and not torch.compiler.is_compiling():
        for adapter in (model.ilora.adapter,) if current.mixture is None else current.mixture.adapters:
            warn_of_answer(model, adapter.gate, inputs, kwargs.get("ilora_prompt_mask"))
    if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        capture_checkpoints(model, state)
    state.begin_forward(current, model)
    one = model.training and torch.is_grad_enabled() and current.gate is not None and current.mixture is None
    state.balance_due = one and getattr(model.ilora_gate, "balance", 0.0) > 0.0
    return args, own


def _with_balance(model: Any, output: Any, inputs: Inputs) -> Any:
    """The output, the gate network's load-balance term added to its loss. In an accumulated step the term has the
    weight that this batch has in the loss. Raises RuntimeError where the output holds no loss to add it to."""
    labels, items = inputs.values.get("labels"), inputs.values.get("num_items_in_batch")
    if labels is None or (isinstance(output, dict) and output.get("loss") is None):
        raise RuntimeError(
            "the gate network's balance term has no loss to be added to: the model was given no labels; set its "
            "balance to 0, or add ilora.balance_loss to the loss yourself"
        )
    term = model.ilora_gate.balance * balance_loss(model.ilora.state.current.gate)
    if items is not None:
        term = term * ((labels != -100).sum() / items)
    model.ilora.state.balance_due = False
    if isinstance(output, dict):
        output["loss"] = output["loss"] + term
        return output
    return (output[0] + term, *output[1:])


def _awaits_gate(model: Any) -> bool:
    """Whether this forward was called by itself, as sentence-transformers does, so that no gate was chosen for it."""
    if not is_injected(model) or model.ilora.state.current.gate is not None:
        return False
    return bool(model.ilora.state.enabled and not model.ilora.merged)


@functools.cache
def ilora_class(base: type) -> type:
    """The class of injected models of class `base`. Made once for each base."""
    own = inspect.signature(base.forward)  # type: ignore[attr-defined]
    parameters = list(own.parameters.values())
    tail = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ARGUMENTS]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name) is not None for name in ARGUMENTS) or _awaits_gate(self):
            return self(*args, **kwargs)
        output = base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        if is_injected(self) and self.ilora.state.balance_due:
            output = _with_balance(self, output, read_inputs(self._ilora_parameters, args, kwargs))
        return output

    # transformers' Trainer keeps the columns that the signature names, and generate takes them for known.
    forward.__signature__ = own.replace(parameters=[p for p in parameters if p not in tail] + extra + tail)  # type: ignore[attr-defined]
    del forward.__wrapped__  # accelerate follows __wrapped__; without it unwrapping ends at this forward
    members: dict[str, Any] = {
        "forward": forward,
        "ilora_base": base,
        "_ilora_parameters": tuple(p.name for p in parameters[1:] if p.kind in positional),
    }
    members |= adapter_methods(base)
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    if hasattr(base, "tie_weights"):
        members["tie_weights"] = _tie_weights
    mixin = ILoRAGenerator if hasattr(base, "generate") else ILoRAModel
    mixin = ILoRATranscriber if hasattr(base, "generate_with_fallback") else mixin
    return type(base.__name__, (mixin, base), members)


def _tie_weights(model: Any, missing_keys: Any = None, recompute_mapping: bool = True) -> None:
    # Never recomputed: inject has taken the modules that are trained whole out of transformers' list of tied weights.
    super(ILoRAModel, model).tie_weights(missing_keys=missing_keys, recompute_mapping=False)


def _blank(base: type) -> Any:
    kind: Any = ilora_class(base)
    return kind.__new__(kind)
