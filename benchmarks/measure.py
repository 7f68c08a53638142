"""Checking a peer against the reference, timing peers side by side.

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
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from peers import Case, Peer, Settings
from torch import Tensor

from ilora import reference

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PARTS = ("forward", "backward", "both")


_passed: dict[tuple[Callable[[Case], Peer], Settings], float] = {}


class WrongPeer(AssertionError):
    """A peer does not compute what the reference computes; the message says which tensor is off and by how much."""


def check(peer: Peer, build: Callable[[Case], Peer], case: Case) -> float:
    """Compares a peer, made by `build` from the case, with the reference: y and every gradient.

    Returns the largest error over the largest value of its tensor; raises WrongPeer beyond the tolerance.
    The reference runs in float32 (float64) on the same tensors. With dropout, a peer whose mask can be drawn again from
    the same state of torch's generator is compared under that very mask. The one whose mask cannot (torch.compile) is
    compared at p = 0, and then the update at p > 0 must have the right mean and the right variance; its gradients at
    p > 0 are not checked.
    """
    without = replace(case.settings, dropout=0.0)
    if case.settings == without or peer.mask is not None or not peer.trained:
        passed = _passed[build, case.settings] = _check_exactly(peer, case)
        return passed
    if (build, without) not in _passed:  # compiling it again only for this would cost seconds
        plain = replace(case, settings=without)
        _passed[build, without] = _check_exactly(build(plain), plain)
    _check_moments(peer, case)
    return _passed[build, without]


def _check_exactly(peer: Peer, case: Case) -> float:
    torch.manual_seed(1)
    mask = None if peer.mask is None else peer.mask()
    torch.manual_seed(1)
    y = peer.call(case.x)
    grads = iter(torch.autograd.grad(y, [case.x, *peer.parameters], case.dy))
    found = {"y": y, "x": next(grads)}
    for name, tensors in peer.trained.items():
        found[name] = torch.cat([next(grads) for _ in tensors], dim=1 if name == "B" else 0)
    wanted = _expected(peer.gate, mask, case)
    errors = {name: _error(value, wanted[name]) for name, value in found.items()}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= TOLERANCE[case.x.dtype]:  # so written that nan fails
        what = "y" if worst == "y" else f"the gradient of {worst}"
        raise WrongPeer(f"{what} differs from the reference by {errors[worst]:.2g} of its largest value")
    return errors[worst]


def _expected(gate: Tensor, mask: Tensor | None, case: Case) -> dict[str, Tensor]:
    """y and the gradients of x, A, B, gate by the reference, where the update sees x · mask."""
    wide = torch.promote_types(case.x.dtype, torch.float32)
    x, A, B = (t.detach().to(wide).requires_grad_() for t in (case.x, case.A, case.B))
    weight, bias, gate = case.weight.to(wide), case.bias.to(wide), gate.detach().to(wide).requires_grad_()
    seen = x if mask is None else x * mask
    update = reference.ilora_linear(seen, torch.zeros_like(weight), None, A, B, gate, case.scaling)
    y = F.linear(x, weight, bias) + update
    grads = torch.autograd.grad(y, [x, A, B, gate], case.dy.to(wide))
    return {"y": y.detach(), **dict(zip(("x", "A", "B", "gate"), grads, strict=True))}


def _error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        raise WrongPeer(f"shape {list(found.shape)}, expected {list(wanted.shape)}")
    return float((found.detach() - wanted).abs().max() / wanted.abs().max())


def _check_moments(peer: Peer, case: Case) -> None:
    """Inverted dropout of x leaves the update's mean as it is and adds p/(1-p) of its energy as noise."""
    p, base = case.settings.dropout, F.linear(case.x, case.weight, case.bias).detach().float()
    plain = _expected(peer.gate, None, case)["y"].float() - base
    update = peer.call(case.x).detach().float() - base
    mean = float((update * plain).sum() / plain.square().sum())
    noise = float((update - plain).square().sum() / plain.square().sum()) * (1.0 - p) / p
    if not (abs(mean - 1.0) < 0.05 and 0.5 < noise < 2.0):
        raise WrongPeer(f"dropout {p:g}: the update's mean is {mean:.3g} of the expected, its variance {noise:.3g}")


class Program(Protocol):
    """What is timed: its parts in order (forward, backward), each over all its input sets."""

    sets: int

    @property
    def parts(self) -> Sequence[Callable[[], object]]: ...


class Eager:
    """Plain calls: the host's launches count."""

    def __init__(self, peers: list[Peer], cases: list[Case]) -> None:
        self.pairs, self.sets, self.outputs = list(zip(peers, cases, strict=True)), len(peers), list[Tensor]()

    @property
    def parts(self) -> Sequence[Callable[[], object]]:
        return self.forward, self.backward

    def forward(self) -> None:
        self.outputs = [peer.call(case.x) for peer, case in self.pairs]

    def backward(self) -> None:
        for (peer, case), y in zip(self.pairs, self.outputs, strict=True):
            torch.autograd.grad(y, [case.x, *peer.parameters], case.dy)
        self.outputs = []

    def both(self) -> None:
        self.forward()
        self.backward()


class Graphed:
    """The same calls as CUDA graphs, one for each part: only the device's time is left."""

    def __init__(self, program: Program) -> None:
        self.sets, stream = program.sets, torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazy set-up (workspaces, autotuning) must not happen inside a capture
            for part in [*program.parts] * 3:
                part()
        torch.cuda.current_stream().wait_stream(stream)
        graphs: list[torch.cuda.CUDAGraph] = []
        for part in program.parts:  # one pool: a backward reads what its forward has left there
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
                part()
            graphs.append(graph)
        self.parts: Sequence[Callable[[], object]] = [graph.replay for graph in graphs]


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
