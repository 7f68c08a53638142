"""How a gate reaches the layers that need it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class GateState:
    """The gate in force for the layers that hold this object: gate [N, E] and segments int32 [N+1], or None.

    A plain object, not a buffer: it is set for a forward and cleared after it, never copied, pickled or saved.
    """

    __slots__ = ("gate", "segments")

    def __init__(self, gate: Tensor | None = None, segments: Tensor | None = None) -> None:
        self.gate, self.segments = gate, segments

    def __deepcopy__(self, memo: dict[int, Any]) -> GateState:
        copy = memo[id(self)] = GateState()  # layers that shared a state share its copy; live tensors stay behind
        return copy

    def __reduce__(self) -> tuple[type[GateState], tuple[()]]:
        return GateState, ()


@contextmanager
def gated(model: nn.Module, gate: Tensor, segments: Tensor | None = None) -> Iterator[nn.Module]:
    """`with ilora.gated(model, gate): model(...)`: every iLoRA layer of the model uses gate [N, E] inside the block.

    Afterwards, also after an exception, the layers are as they were. Blocks nest.
    Raises ValueError where the model holds no iLoRA layer.
    """
    states = {id(s): s for s in (getattr(m, "gate_state", None) for m in model.modules()) if isinstance(s, GateState)}
    if not states:
        raise ValueError(f"gated: {type(model).__name__} holds no ILoRALinear layer, so a gate would do nothing")
    before = [(state, state.gate, state.segments) for state in states.values()]
    try:
        for state in states.values():
            state.gate, state.segments = gate, segments
        yield model
    finally:
        for state, old_gate, old_segments in before:
            state.gate, state.segments = old_gate, old_segments
