"""Timing programs side by side: the one way in which all benchmarks here measure.

On a CPU the calls themselves are timed. On CUDA they are timed twice: as plain calls, where the time that Python and
the driver take to launch kernels counts, and as replays of CUDA graphs, which leave the device's time alone. Both go
through more input sets than three L2 caches hold. Programs take turns in a new random order each round, and a ratio is
taken within a round, so a slow moment of the machine hits all of them alike.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from checking import TOLERANCE, WrongPeer
from peers import Case, Peer
from torch import Tensor

Result = TypeVar("Result")
Rows = dict[str, dict[str, Any]]
PARTS = ("forward", "backward", "both")
BASELINE = "frozen"  # the program that the ratios are taken to
GATED, UNGATED = "ilora[triton]", "ilora[ungated]"  # one over the other is what the gate costs
WAIT_CYCLES = 400_000  # the device waits so long (0.2 ms) while graphs are queued; launching one takes about 10 µs
MAX_SETS = 96


class Program:
    """What is timed.

    parts: called in order (forward, backward), each over all input sets. outputs: the tensors that the first part
    makes. sets: how many input sets there are; times are divided by it. queued: whether a part only queues work for the
    device and returns.
    """

    def __init__(
        self, parts: Sequence[Callable[[], object]], outputs: list[Tensor], sets: int, queued: bool = False
    ) -> None:
        self.parts, self.outputs, self.sets, self.queued = parts, outputs, sets, queued

    def run(self) -> None:
        for part in self.parts:
            part()


def calls(functions: Sequence[Callable[[], Tensor]], per_call: int = 1) -> Program:
    """Functions called one after another, as one part. per_call: how many things (tokens, say) one call does."""
    outputs: list[Tensor] = []

    def run() -> None:
        outputs[:] = [function() for function in functions]  # all live until the next run

    return Program([run], outputs, len(functions) * per_call)


def training(peers: Sequence[Peer], cases: Sequence[Case]) -> Program:
    """Forward and backward of a peer, once for each input set.

    Forward runs with gradients on, as in training. Backward computes the gradients of x and of all that the peer trains
    (A, B and the gate for our layer; A and B for PEFT, which has no gate; x alone for the frozen layer).
    """
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs[:] = [peer.call(case.x) for peer, case in zip(peers, cases, strict=True)]

    def backward() -> None:
        kept = []  # otherwise all sets would write their gradients to the same memory, which a cache holds
        for peer, case, y in zip(peers, cases, outputs, strict=True):
            kept.append(torch.autograd.grad(y, [case.x, *peer.parameters], case.dy))
        outputs.clear()

    return Program([forward, backward], outputs, len(peers))


def graphed(program: Program) -> Program:
    """The same program as CUDA graphs, one for each part.

    Raises WrongPeer where a replay does not compute what the calls compute, and whatever a capture raises.
    """
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # workspaces and autotuning must be over before a capture begins
        for _ in range(3):
            program.run()
        expected = [_first_output(program) for _ in range(2)]
    current.wait_stream(stream)
    graphs: list[torch.cuda.CUDAGraph] = []
    try:
        for part in program.parts:  # one memory pool: backward reads what forward left there
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
                part()
            if not graphs:
                _check_replay(graph, program.outputs, *expected)
            graphs.append(graph)
    except BaseException:
        torch.cuda.set_stream(current)  # a capture that fails would leave its own stream current
        raise
    return Program([graph.replay for graph in graphs], [], program.sets, queued=True)


def _first_output(program: Program) -> Tensor:
    program.parts[0]()
    return program.outputs[0].detach().clone()


def _check_replay(graph: torch.cuda.CUDAGraph, outputs: list[Tensor], first: Tensor, second: Tensor) -> None:
    """Fills the outputs with NaN, replays, and looks: every element must be written, with the values of the first call
    where two calls agree (without dropout)."""
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


def time_rows(
    rows: Rows,
    programs: Mapping[str, Program],
    device: torch.device,
    seconds: float,
    repeats: int,
    say: Callable[[str], None] = lambda what: None,
    graphs: bool = True,
) -> None:
    """Times all programs and writes their times into their rows: under "eager" and, on CUDA, also under "graph".

    A program whose graph cannot be captured gets "graph_error" instead. Without the frozen program nothing is timed.
    "gate" beside our times: the same with ratios to our layer without a gate.
    graphs: False leaves graphs out, for what waits for the device in between, as generating text does.
    """
    for variant in ("eager", "graph") if graphs and device.type == "cuda" else ("eager",):
        if variant == "graph":
            captured = {name: attempt(rows[name], "graph_error", partial(graphed, programs[name])) for name in programs}
            programs = {name: program for name, program in captured.items() if program is not None}
        if BASELINE not in programs:
            return
        if device.type == "cuda":
            _raise_clocks(device)
        for program in programs.values():
            time_once(program, device)
        say(f"timing, {variant}")
        times = interleave(programs, device, seconds, repeats)
        for name, series in times.items():
            rows[name][variant] = {"rounds": len(series), **summarise(series, times[BASELINE])}
        if GATED in times and UNGATED in times:
            rows[GATED][variant]["gate"] = summarise(times[GATED], times[UNGATED])


def _raise_clocks(device: torch.device, seconds: float = 0.05) -> None:
    """Keeps the device busy: its clocks fall while Python prepares the next case."""
    a = torch.randn(4096, 4096, generator=torch.Generator(device), device=device)  # a failed capture may break torch's
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        a @ a
        torch.cuda.synchronize(device)


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
        if program.queued:  # otherwise the first part's time would include the launch of its graph
            torch.cuda._sleep(WAIT_CYCLES)
        events[0].record()
        for part, event in zip(program.parts, events[1:], strict=True):
            part()
            event.record()
        torch.cuda.synchronize(device)
        times = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return tuple(each / program.sets for each in times)


def interleave(
    programs: Mapping[str, Program], device: torch.device, seconds: float, repeats: int
) -> dict[str, list[tuple[float, ...]]]:
    """Milliseconds of each part of each program, round by round, in a new random order each round.

    Rounds end after `seconds` for each program or after `repeats`, but not before the third unless `repeats` says so.
    """
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in programs}
    order, shuffle = list(programs), random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # what exists now stays, so that collecting between rounds takes no time
    deadline = time.perf_counter() + seconds * len(programs)
    try:
        for done in range(repeats):
            if done >= 3 and time.perf_counter() > deadline:
                break
            gc.collect()
            shuffle(order)
            for name in order:
                times[name].append(time_once(programs[name], device))
    finally:
        gc.unfreeze()
    return times


def summarise(times: list[tuple[float, ...]], baseline: list[tuple[float, ...]]) -> dict[str, dict[str, float]]:
    """The median in ms and the ratio to the baseline, for forward, backward and both (for forward alone where a program
    has one part).

    The ratio is taken within each round. Its median is reported, with its quartiles as low and high.
    """
    summary = {}
    for i, part in enumerate(PARTS if len(baseline[0]) > 1 else PARTS[:1]):
        mine, limit = ([sum(t) if i == 2 else t[i] for t in series] for series in (times, baseline))
        ratios = [a / b for a, b in zip(mine, limit, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        summary[part] = {"ms": statistics.median(mine), "ratio": statistics.median(ratios), "low": low, "high": high}
    return summary


def input_sets(size: int, device: torch.device) -> int:
    """How many input sets of `size` bytes three L2 caches of the GPU cannot hold, at most 96; on a CPU one."""
    if device.type == "cpu":
        return 1
    return min(math.ceil(3 * torch.cuda.get_device_properties(device).L2_cache_size / size), MAX_SETS)


def attempt(row: dict[str, Any], key: str, function: Callable[[], Result]) -> Result | None:
    """What the function returns. If it raises, None, with the reason in row[key]: one peer that does not run must not
    cost the others their times."""
    try:
        return function()
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        row[key] = f"{type(error).__name__}: {first}"[:400]
        return None


def tidy(device: torch.device) -> None:
    """Returns memory that earlier measurements held: their graphs keep it until they are collected."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
