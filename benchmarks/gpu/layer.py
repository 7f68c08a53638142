"""The sweep over layers: every arm in the same interleaved rounds, as eager calls and as CUDA-graph replays."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from checking import WrongPeer, check
from measure import Eager, Program, interleave, summarise, time_once
from memory import peak_bytes, saved_bytes
from peers import Settings, make_case

from . import workers
from .arms import STRATEGIES, Arm, Under, arms_of, case_for, using
from .machine import LostDevice, Machine, reason_of
from .plan import LEVELS, Planned, left_out

SECONDS = (0.12, 0.06)  # of rounds for each arm: with all peers, with few
ROUNDS = 200
WARM_LEVELS = 4  # further levels are compiled when they are come to


class Warm(NamedTuple):
    """An arm to run once in a process of its own: what it compiles is in the caches of this process then."""

    settings: Settings
    arm: Arm


def warm(job: Warm) -> str | None:
    """None, or why the arm cannot run: it is not timed then, lest it take this process's device with it."""
    try:
        arm = job.arm
        if arm.name == "compile":
            torch.compiler.reset()  # its limit of graphs is a process's
        case = case_for(arm, make_case(job.settings))
        with using(*arm.under):
            program = Eager([arm.build(case)], [case])
            for _ in range(2):
                program.both()
        if job.settings.device.type == "cuda":
            torch.cuda.synchronize()
            del program, case
            torch.cuda.empty_cache()
    except Exception as error:
        try:
            return reason_of(error)
        except LostDevice as lost:
            workers.leave(f"{job.settings}, {job.arm.name}: {lost}")
            return str(lost)
    return None


def warm_jobs(planned: Iterable[Planned]) -> list[Warm]:
    """What compiles: ours by each strategy, and torch.compile, which takes longest."""
    jobs = []
    for level, settings in planned:
        if level < WARM_LEVELS:
            arms = arms_of(settings, level == 0)[0]
            jobs += [Warm(settings, arm) for arm in arms if _compiles(arm)]
    return sorted(jobs, key=lambda job: job.arm.name != "compile")


def _compiles(arm: Arm) -> bool:
    """Whether it compiles what none of the others does: "auto" only where a table is in force."""
    auto = arm.strategy == "auto" and (bool(os.environ.get("ILORA_TABLE")) or arm.pdl is not None)
    return arm.strategy in STRATEGIES or auto or arm.name == "compile"


@contextmanager
def uncollected() -> Iterator[None]:
    """What is here stays; collecting between cases then takes no time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@uncollected()
def measure(
    here: Machine,
    planned: list[Planned],
    processes: int,
    left: Callable[[], float],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The part: rows in order of the plan, as many as there is time for, kept after every case."""
    part: dict[str, Any] = {"levels": LEVELS, "rows": [], "unavailable": {}, "warm_up": {}, "left_out": []}
    broken = _warm_up(planned, processes, left, part)
    longest = {True: 0.0, False: 0.0}  # seconds of a case, by whether all peers are in it
    for index, (level, settings) in enumerate(planned):
        if left() < longest[level == 0]:
            part["left_out"] = left_out(planned[index:])
            break
        start = time.monotonic()
        arms, missing = arms_of(settings, level == 0)
        part["unavailable"] |= missing
        for arm in [arm for arm in arms if (settings, arm.name) in broken]:
            arms.remove(arm)
            part["rows"].append(_row(level, settings, arm) | {"error": broken[settings, arm.name]})
        rows = run_case(here, level, settings, arms)
        part["rows"] += rows
        print(f"  {settings}: {_line(rows)}", flush=True)
        longest[level == 0] = max(longest[level == 0] * 0.8, time.monotonic() - start)
        keep(part)
    return part


def _warm_up(
    planned: list[Planned], processes: int, left: Callable[[], float], part: dict[str, Any]
) -> dict[tuple[Settings, str], str]:
    """Compiles side by side for at most a third of the time; what could not run, and why."""
    start, until = time.monotonic(), left() / 3
    jobs = warm_jobs(planned) if processes else []

    def remaining() -> float:
        return until - (time.monotonic() - start)

    came = dict(workers.done(warm, jobs, processes, remaining, lambda job: workers.DIED))
    part["warm_up"] = {"jobs": len(jobs), "run": len(came), "seconds": time.monotonic() - start}
    return {(jobs[i].settings, jobs[i].arm.name): reason for i, reason in came.items() if reason is not None}


def _line(rows: list[dict[str, Any]]) -> str:
    """Forward + backward over the frozen layer's, of each arm."""
    timed = {row["peer"]: row.get("graph", row.get("eager")) for row in rows if row["peer"] != "frozen"}
    shown = {name: f"{each['both']['ratio']:.2f}" if each else "FAILED" for name, each in timed.items()}
    return ", ".join(f"{name} {ratio}" for name, ratio in shown.items())


def _row(level: int, settings: Settings, arm: Arm) -> dict[str, Any]:
    M = settings.batch * settings.length
    return {"level": level, "M": M, **settings.as_json(), "peer": arm.name}


def run_case(
    here: Machine, level: int, settings: Settings, arms: list[Arm], eager: bool = True
) -> list[dict[str, Any]]:
    """One row for each arm; the one that is wrong or does not run has an `error`, and no times beyond it.

    eager: whether calls are timed too, beside graphs.
    """
    if any(arm.name == "compile" for arm in arms):
        torch.compiler.reset()  # each case is a graph of its own; dynamo keeps only a few
    here.tidy()
    case = make_case(settings)
    size = sum(tensor.nbytes for tensor in (case.x, case.dy, case.weight, case.A, case.B))
    inputs = [case, *(make_case(settings, seed) for seed in range(1, here.sets(size)))]
    rows: dict[str, dict[str, Any]] = {}
    programs: dict[str, Program] = {}
    for arm in arms:
        rows[arm.name] = row = _row(level, settings, arm)
        program = attempt(row, "error", partial(_prepared, here, arm, [case_for(arm, each) for each in inputs], row))
        if program is not None:
            programs[arm.name] = Under(program, *arm.under)
    if "frozen" not in programs:
        raise WrongPeer(f"{settings}: the frozen layer itself failed: {rows['frozen']['error']}")
    time_both(here, rows, programs, SECONDS[level > 0], eager)
    return list(rows.values())


def attempt(row: dict[str, Any], key: str, function: Callable[[], Any]) -> Any:
    """What the function returns; if it raises, None and the reason in the row. A lost device ends the part."""
    try:
        return function()
    except WrongPeer as error:
        row[key] = f"wrong: {error}"
    except Exception as error:  # a peer that does not run is a finding, and the others go on
        row[key] = reason_of(error)
    return None


def _prepared(here: Machine, arm: Arm, inputs: list[Any], row: dict[str, Any]) -> Eager:
    """The arm's program over all inputs, checked, with its memory in the row."""
    first = inputs[0]
    with using(*arm.under):
        peers = [arm.build(case) for case in inputs]
        row["error_of_check"] = check(peers[0], arm.build, first)
        row["saved_bytes"] = saved_bytes(partial(peers[0].call, first.x), [*first.constants, *peers[0].parameters])
        row["peak_bytes"] = peak_bytes(Eager(peers[:1], inputs[:1]).both, here.device)
    return Eager(peers, inputs)


def time_both(
    here: Machine, rows: dict[str, dict[str, Any]], programs: dict[str, Program], seconds: float, eager: bool = True
) -> None:
    """As calls, and as graphs where they can be captured; whatever fails there leaves the calls' times."""
    if eager:
        time_all(here, rows, "eager", programs, seconds)
    graphs: dict[str, Program] = {}
    for name, program in programs.items():
        if (graph := attempt(rows[name], "graph_error", partial(here.graphed, program))) is not None:
            graphs[name] = graph
    if "frozen" in graphs:
        trouble: dict[str, Any] = {}
        attempt(trouble, "graph_error", partial(time_all, here, rows, "graph", graphs, seconds))
        for name in graphs:
            rows[name] |= trouble


def time_all(
    here: Machine, rows: dict[str, dict[str, Any]], variant: str, programs: dict[str, Program], seconds: float
) -> None:
    """Writes the times of the programs into their rows, under the variant's name."""
    here.warm_up()
    for program in programs.values():
        time_once(program, here.device)
    times = interleave(programs, here.device, 0.0 if here.dry else seconds, ROUNDS)
    for name, series in times.items():
        rows[name][variant] = {"rounds": len(series), **summarise(series, times["frozen"])}
