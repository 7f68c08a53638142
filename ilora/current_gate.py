"""The gate in force: one plain object a model, which its layers share and read."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base_layers import WeightReads
from .gates.media import Media, gate_of_media
from .op.checks import blocks, float_gate


class CurrentGate(NamedTuple):
    """The gate in force and the batch that it belongs to.

    gate: [N, E], or [layers, N, E] with one gate for each layer of the model; None where there is none.
    segments: int32 [N+1] row offsets, or None for instances of equal length.
    rows, lengths: how many sequences the model was given, and how long they may be (() where that is not known); rows
        is None where the gate belongs to no batch (`gated`). By them a layer refuses an x that the gate does not fit.
    copies: how often a module that generate calls by itself may find each of the sequences (beams).
    generating: whether it is the gate of a generate, each of whose steps finds its prompts' rows anew.
    media: whose the images, sounds and videos are, None where there are none or one gate is everybody's.
    media_rows: what the caller said about that.
    mixture: whose adapter each instance has (`ilora.grouped.mixture.Mixture`), None where all have the active one.
    """

    gate: Tensor | None = None
    segments: Tensor | None = None
    rows: int | None = None
    lengths: tuple[int, ...] = ()
    copies: int = 1
    generating: bool = False
    media: Media | None = None
    media_rows: Any = None
    mixture: Any = None


class GateState:
    """What the layers of a model share. It is never copied, pickled or saved.

    current: the gate in force; a call replaces it and puts the one before back afterwards.
    enabled: False makes the layers compute their frozen base alone.
    last: the gate of the last forward, detached, for statistics.
    shared: the input that several layers are reading together (shared.py); another current gate drops it.
    reads: the layers that this forward has called, and those whose weight it has read.
    balance_due: whether the gate network's balance term is still to be added to this forward's loss.
    prompt_lengths: int64 [N] or [1], how many tokens of each sequence are its prompt (`ilora.prompt_lengths`), or None.
    copies: how many sequences generate has made of each prompt (beams, return sequences).
    text_modules: the paths of the modules that see text alone, found once for a model with other media.
    thread_lock: held by the thread that is in a forward or generate of the model; other threads wait.
    """

    __slots__ = (
        "balance_due",
        "copies",
        "current",
        "enabled",
        "last",
        "prompt_lengths",
        "reads",
        "shared",
        "text_modules",
        "thread_lock",
    )

    def __init__(self) -> None:
        self.current, self.enabled, self.last = CurrentGate(), True, None  # type: tuple[CurrentGate, bool, Tensor | None]
        self.shared: Any = None
        self.balance_due = False
        self.prompt_lengths: Tensor | None = None
        self.reads = WeightReads()
        self.text_modules: tuple[str, ...] | None = None
        self.copies, self.thread_lock = 1, threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> GateState:
        copy = memo[id(self)] = GateState()  # layers that share a state share its copy; the gate in force is not copied
        copy.enabled, copy.reads = self.enabled, WeightReads((self.reads.copied | self.reads.read) - self.reads.called)
        return copy

    def __reduce__(self) -> tuple[type[GateState], tuple[()]]:
        return GateState, ()

    def lock(self) -> AbstractContextManager[Any]:
        """The lock for a forward or generate: another thread waits until it is over, since both set the gate."""
        return nullcontext() if torch.compiler.is_compiling() else self.thread_lock

    def set_current(self, current: CurrentGate) -> None:
        """Puts this gate in force."""
        self.current, self.shared = current, None

    def begin_forward(self, current: CurrentGate, model: nn.Module) -> None:
        """Puts the gate of a new forward of the whole model in force."""
        self.set_current(current)
        self.last = None if current.gate is None else current.gate.detach()
        if not torch.compiler.is_compiling():
            self.reads.begin()
            if self.reads.copied and current.gate is not None:
                self.reads.watch(model)

    def end_forward(self) -> None:
        """To call when that forward has ended. Raises RuntimeError for a layer whose weight was read in its stead."""
        if not torch.compiler.is_compiling():
            (self.reads.begin if self.last is None else self.reads.refuse)()

    def gate_for(self, x: Tensor, index: int | slice, name: str) -> tuple[Tensor | None, Tensor | None]:
        """(gate [N, E], segments) for the layer called `name` that sees x [..., d_in]; index picks its layer's gate out
        of one for each, a slice keeps several.
        Raises ValueError where x cannot be what the gate was meant for."""
        current = self.current
        gate, segments = current.gate, current.segments
        if gate is None:
            return None, None
        if current.media is not None and current.media.sees(name):
            gate, segments = gate_of_media(current.media, gate, x, name, current.rows, current.lengths)
        elif current.rows is not None and gate.shape[-2] != 1 and not _fits(x, current):  # one gate fits every row
            raise ValueError(
                f"{name}: its input {list(x.shape)} is not the batch of {current.rows} sequences that the gate "
                f"{list(gate.shape)} belongs to, so no row can be told its instance; leave this module out "
                "(exclude_modules of ILoRAConfig)"
            )
        gate = gate[index] if gate.dim() == 3 else gate
        # A model spread over GPUs. From the host it would be a copy for every layer: that is refused with the others.
        if gate.device != x.device and gate.device.type == x.device.type:
            gate, segments = gate.to(x.device), None if segments is None else segments.to(x.device)
        return gate, segments


def own_gate(gate: Tensor, num_experts: int, gate_experts: int) -> Tensor:
    """A layer's gate [..., num_experts] from the model's [..., gate_experts]: a layer with fewer experts than the gate
    adds up the weights of neighbouring experts. Raises TypeError, ValueError for another width."""
    float_gate(gate, num_experts=gate_experts)
    return gate if num_experts == gate_experts else gate.unflatten(-1, (num_experts, -1)).sum(-1)


def _fits(x: Tensor, current: CurrentGate) -> bool:
    """Whether x [..., d_in] holds the batch's own sequences, one after another."""
    M, prompts = math.prod(x.shape[:-1]), current.rows
    assert prompts is not None
    for rows in (prompts,) if current.copies == 1 else (prompts, prompts * current.copies):
        if x.dim() > 2:
            if rows in blocks(x.shape[:-2]):
                return True
        elif rows == M or (not current.lengths and M % rows == 0) or any(rows * n == M for n in current.lengths):
            return True  # flattened tokens, or one pooled row for each sequence
    return False


@contextmanager
def using(state: GateState, current: CurrentGate) -> Iterator[None]:
    """This gate in force inside the block; afterwards, also after an exception, what was there before."""
    before = state.current
    state.set_current(current)
    try:
        yield
    finally:
        state.set_current(before)


@contextmanager
def gated(model: nn.Module, gate: Tensor, segments: Tensor | None = None) -> Iterator[nn.Module]:
    """`with ilora.gated(model, gate): model(...)`: every iLoRA layer of the model uses gate [N, E] inside the block.

    gate may be [layers, N, E] for a model whose layers have a gate each. Afterwards, also after an exception, the
    layers are as they were. Blocks nest; it holds for every thread, so threads with gates of their own pass them as
    arguments. Raises ValueError where the model holds no iLoRA layer, TypeError for a gate that is no float tensor and
    segments that are no integer one.
    """
    float_gate(gate, "[N, E] or [layers, N, E]")
    if segments is not None and (not isinstance(segments, Tensor) or segments.is_floating_point()):
        got = getattr(segments, "dtype", type(segments).__name__)
        raise TypeError(f"segments: expected int32 [N+1] row offsets, got {got}")
    states = {id(s): s for s in (getattr(m, "gate_state", None) for m in model.modules()) if isinstance(s, GateState)}
    if not states:
        raise ValueError(f"gated: {type(model).__name__} holds no ILoRALinear layer, so a gate would do nothing")
    before: list[tuple[GateState, CurrentGate]] = []
    try:
        for state in states.values():
            with state.lock():  # not for the whole block, in which a thread may be started that runs the model
                before.append((state, state.current))
                state.set_current(CurrentGate(gate, segments))
                state.reads.begin()
        yield model
    finally:
        for state, current in before:
            with state.lock():
                state.set_current(current)
    for state in states.values():
        with state.lock():
            state.reads.refuse()


class CapturingCheckpoint:
    """Wraps a checkpoint function so that recomputation runs under the gate of its own forward.

    The recomputation runs when the forward is long over, and perhaps after others. So what is in force is captured, and
    the gate goes through `checkpoint`, a function like torch.utils.checkpoint.checkpoint, as an explicit argument: only
    so does its gradient survive the re-entrant kind.
    """

    def __init__(self, checkpoint: Any, state: GateState) -> None:
        self.checkpoint, self.state = checkpoint, state

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        state, current = self.state, self.state.current
        # A compiled model is traced once, recomputation and all: its gate is an input of the graph already.
        if current.gate is None or torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)

        def run(gate: Tensor, *args: Any, **kwargs: Any) -> Any:
            with using(state, current._replace(gate=gate)):
                return function(*args, **kwargs)

        return self.checkpoint(run, current.gate, *args, **kwargs)


def capture_checkpoints(model: nn.Module, state: GateState) -> None:
    """Puts CapturingCheckpoint around every checkpoint function of the model that does not have it yet: transformers'
    `_gradient_checkpointing_func`, and `checkpoint_fn` of torch's CheckpointWrapper, which accelerate uses for FSDP."""
    for module in model.modules():
        values = module.__dict__
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            function = values.get(name)
            if function is not None and not isinstance(function, CapturingCheckpoint):
                values[name] = CapturingCheckpoint(function, state)


def release_checkpoints(model: nn.Module) -> None:
    """Undoes `capture_checkpoints`."""
    for module in model.modules():
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            function = module.__dict__.get(name)
            if isinstance(function, CapturingCheckpoint):
                module.__dict__[name] = function.checkpoint
