"""Timing peers side by side.

Forward is timed with gradients on, as in training. Backward computes the gradients of x and of all that the peer trains
(for our layer and its peers A, B and the gate; PEFT has no gate; for the frozen layer x alone).
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from checking import TOLERANCE, WrongPeer
from peers import Case, Peer
from torch import Tensor

PARTS = ("forward", "backward", "both")
AHEAD = 400_000  # cycles that the device waits while graphs are queued: 0.2 ms, a launch takes the host some 10 µs


class Program(Protocol):
    """What is timed: its parts in order (forward, backward), each over all its input sets.

    queued: whether a part does no more than queue work for the device. outputs: what the first part has left.
    """

    sets: int
    queued: bool

    @property
    def parts(self) -> Sequence[Callable[[], object]]: ...

    @property
    def outputs(self) -> list[Tensor]: ...


class Eager:
    """Plain calls: the host's launches count."""

    queued = False

    def __init__(self, peers: list[Peer], cases: list[Case]) -> None:
        self.pairs, self.sets, self.outputs = list(zip(peers, cases, strict=True)), len(peers), list[Tensor]()

    @property
    def parts(self) -> Sequence[Callable[[], object]]:
        return self.forward, self.backward

    def forward(self) -> None:
        self.outputs = [peer.call(case.x) for peer, case in self.pairs]

    def backward(self) -> None:
        kept = []  # lest every set's gradients be written to the same memory, which a cache holds
        for (peer, case), y in zip(self.pairs, self.outputs, strict=True):
            kept.append(torch.autograd.grad(y, [case.x, *peer.parameters], case.dy))
        self.outputs = []

    def both(self) -> None:
        self.forward()
        self.backward()


class Graphed:
    """The same calls as CUDA graphs, one for each part: only the device's time is left.

    Raises WrongPeer where a replay does not compute what the calls do; whatever a capture raises.
    """

    queued = True

    def __init__(self, program: Program) -> None:
        self.sets, self.outputs = program.sets, list[Tensor]()
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # lazy set-up (workspaces, autotuning) must not happen inside a capture
            for part in [*program.parts] * 3:
                part()
            expected = [_first_output(program) for _ in range(2)]
        current.wait_stream(stream)
        graphs: list[torch.cuda.CUDAGraph] = []
        try:
            for part in program.parts:  # one pool: a backward reads what its forward has left there
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
                    part()
                if not graphs:
                    _check_replay(graph, program.outputs, *expected)
                graphs.append(graph)
        except BaseException:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own in force
            raise
        self.parts: Sequence[Callable[[], object]] = [graph.replay for graph in graphs]


def _first_output(program: Program) -> Tensor:
    program.parts[0]()
    return program.outputs[0].detach().clone()


def _check_replay(graph: torch.cuda.CUDAGraph, outputs: list[Tensor], first: Tensor, second: Tensor) -> None:
    """A replay writes all outputs anew; and the first one's values, where two calls agree on them (no dropout)."""
    outputs = [y.data for y in outputs if y.is_floating_point()]
    for y in outputs:
        y.fill_(math.nan)
    graph.replay()
    if any(bool(y.isnan().any()) for y in outputs):
        raise WrongPeer("a replay of its graph does not write all of y")
    if outputs and torch.equal(first, second):
        error = float((outputs[0].float() - first.float()).abs().max() / first.float().abs().max())
        if not error <= TOLERANCE[first.dtype]:
            raise WrongPeer(f"a replay of its graph differs from its call by {error:.2g} of y's largest value")


def time_once(program: Program, device: torch.device) -> tuple[float, ...]:
    """Milliseconds of each part, per input set."""
    if device.type == "cpu":
        marks = [time.perf_counter()]
        for part in program.parts:
            part()
            marks.append(time.perf_counter())
        times = [1e3 * (end - start) for start, end in zip(marks, marks[1:], strict=False)]
    else:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(program.parts) + 1)]
        torch.cuda.synchronize(device)
        if program.queued:  # or the first part's time would begin with the host's launch of it
            torch.cuda._sleep(AHEAD)
        events[0].record()
        for part, event in zip(program.parts, events[1:], strict=True):
            part()
            event.record()
        torch.cuda.synchronize(device)
        times = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return tuple(each / program.sets for each in times)


def interleave(
    programs: Mapping[str, Program],
    device: torch.device,
    seconds: float,
    repeats: int,
    progress: Callable[[int], None] = lambda round_number: None,
) -> dict[str, list[tuple[float, ...]]]:
    """Rounds over all programs, each in a new random order, so that a slow moment of the machine hits all alike.

    Rounds end after `seconds` for each program or after `repeats`, but not before the third.
    """
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in programs}
    order, shuffle = list(programs), random.Random(0).shuffle
    gc.collect()
    deadline = time.perf_counter() + seconds * len(programs)
    for done in range(max(repeats, 1)):
        if done >= 3 and time.perf_counter() > deadline:
            break
        shuffle(order)
        for name in order:
            times[name].append(time_once(programs[name], device))
        progress(done + 1)
    return times


def summarise(times: list[tuple[float, ...]], frozen: list[tuple[float, ...]]) -> dict[str, dict[str, float]]:
    """For forward, backward and both (forward alone, where that is all): the median in ms, and the ratio to the frozen
    layer.

    The ratio is taken within each round and its median reported, with the quartiles as low and high.
    """
    summary = {}
    for i, part in enumerate(PARTS if len(frozen[0]) > 1 else PARTS[:1]):
        mine, limit = ([sum(t) if i == 2 else t[i] for t in series] for series in (times, frozen))
        ratios = [a / b for a, b in zip(mine, limit, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        summary[part] = {"ms": statistics.median(mine), "ratio": statistics.median(ratios), "low": low, "high": high}
    return summary


def input_sets(case: Case) -> int:
    """On a GPU enough sets of tensors that three L2 caches cannot hold them; on a CPU one."""
    if case.x.device.type == "cpu":
        return 1
    size = sum(t.nbytes for t in (case.x, case.dy, case.weight, case.A, case.B))
    return math.ceil(3 * torch.cuda.get_device_properties(case.x.device).L2_cache_size / size)


def bf16_cost() -> float:
    """Time of dy W in bfloat16 over float32, on one thread: some CPUs have no fast path for it."""
    best, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # beside other work two threads would mostly wait for each other
    for dtype in (torch.float32, torch.bfloat16):
        dy, weight = torch.randn(128, 576).to(dtype), torch.randn(576, 576).to(dtype)
        best[dtype] = math.inf
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(dy, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return best[torch.bfloat16] / best[torch.float32]
