"""A forward that another library puts in front of an injected model's own: TRL's fused head, accelerate's hooks."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..current_gate import capture_checkpoints, framed
from .batch import read_inputs
from .gate_choice import frame_of


def under_gate(model: Any, forward: Any) -> Any:
    """The forward that somebody puts before the model's own, which it may never call: it finds the gate in force."""
    if getattr(forward, "__self__", None) is not model:
        return functools.update_wrapper(functools.partial(_through, model, forward), forward)
    function = forward.__func__

    @functools.wraps(function)
    def gated_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _through(self, functools.partial(function, self), *args, **kwargs)

    return MethodType(gated_forward, model)  # accelerate takes methods apart, and a copied model's is bound to the copy


def _through(
    model: Any,
    function: Any,
    *args: Any,
    ilora_gate: Tensor | None = None,
    ilora_z: Tensor | None = None,
    ilora_segments: Tensor | None = None,
    ilora_prompt_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    with model.ilora.state.turn():
        return _run(model, function, args, kwargs, ilora_gate, ilora_z, ilora_segments, ilora_prompt_mask)


def _run(model: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *given: Tensor | None) -> Any:
    """given: gate, z, segments, prompt mask."""
    state, training = model.ilora.state, model.training and torch.is_grad_enabled()
    inputs = read_inputs(model._ilora_parameters, args, kwargs)
    frame = frame_of(model, inputs, *given)
    if training and not torch.compiler.is_compiling():
        capture_checkpoints(model, state)
    state.last = None
    with framed(state, frame):
        state.begin(frame)
        output = function(*args, **kwargs)
    state.refuse_reading()
    if state.last is None and frame.gate is not None:  # the model's own forward was passed by
        if training and getattr(model.ilora_gate, "balance", 0.0):
            raise RuntimeError(
                "the gate's balance term has no loss to go to: this trainer replaced the model's forward and computes "
                "the loss itself (TRL's do); use balance=0 there, or add ilora.balance_loss to the loss yourself"
            )
        state.last = frame.gate.detach()
    return output
