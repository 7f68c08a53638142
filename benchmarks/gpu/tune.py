"""Which tile each GEMM of ours is best with: every one worth a try, beside "beta", checked, then timed at the main
layers. What wins is in the strategy table (table.py), which is in force for the parts that follow.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from report import write_json

from . import workers
from .arms import STRATEGIES, Arm, built_by, ours
from .correctness import DTYPES, EVEN, Check, work
from .layer import Warm, run_case, uncollected, warm
from .machine import Machine, backend_of
from .plan import Planned, left_out

GROUP = 8
# m, n, k, warps, and stages: as many as fit. The last two leave room for two programs on a multiprocessor, mostly.
TILES = ((128, 256, 64, 8, (4, 3)), (128, 256, 128, 8, (2,)), (256, 128, 64, 8, (4, 3)), (64, 256, 64, 4, (4, 3)),
         (128, 128, 64, 8, (4, 3)), (128, 128, 64, 4, (3,)), (64, 128, 64, 4, (4, 3)))  # fmt: skip
DRY_TILES = ((64, 128, 64, 8, (3,)),)


class Option(NamedTuple):
    """A way to compute a layer; the arm goes by a table that says so."""

    arm: Arm
    strategy: str
    tile: list[int] | None


class Job(NamedTuple):
    """An option checked at a small size, then run once at a planned one, in a process of its own."""

    check: Check
    warm: Warm


def tried(job: Job) -> str | None:
    """None, or why the option is not to be timed."""
    return work(job.check)["problem"] or warm(job.warm)


def wanted(planned: list[Planned]) -> list[Planned]:
    """The main layers, and those of ranks that no choice for them holds for: beyond a factor of 2."""
    main = planned[0].settings

    def far(rank: int) -> bool:
        return max(rank, main.rank) > 2 * min(rank, main.rank)

    return [
        each
        for each in planned
        if each.settings.experts == main.experts and (each.level < 2 or (each.level == 2 and far(each.settings.rank)))
    ]


def options(here: Machine, each: Planned, quick: bool, folder: Path) -> Iterator[Option]:
    """ "beta" and every GEMM that takes this layer, with every tile; a table for each is written into the folder."""
    from ilora.kernels.config import GemmTile, gemm_fits
    from ilora.kernels.launch import device_of

    settings, build = each.settings, built_by(backend_of(here.device, each.settings.dtype))
    device = device_of(torch.empty(1, device=here.device))
    able = {arm.strategy for arm, reason in ours(settings) if reason is None}
    yield Option(Arm("beta", build, "beta"), "beta", None)
    for strategy in STRATEGIES[1:]:
        for *sizes, stages in DRY_TILES if here.dry else TILES[::2] if quick else TILES:
            tiles = ([*sizes, count, GROUP] for count in stages)
            tile = next((t for t in tiles if gemm_fits(device, GemmTile(*t), settings.rank, strategy)), None)
            if strategy in able and tile is not None:
                name = f"{strategy} {'×'.join(map(str, tile[:3]))}, {tile[3]} warps, {tile[4]} stages"
                file = (
                    folder
                    / f"{'-'.join(map(str, (strategy, *tile, settings.rank, settings.d_in, settings.d_out)))}.json"
                )
                say_so(device.name, settings, {"strategy": strategy, "tile": tile}, file)
                yield Option(Arm(name, build, "auto", table=str(file)), strategy, tile)


def say_so(device: str, settings: peers.Settings, choice: dict[str, Any], file: Path) -> None:
    """A table with this choice for the layer, and for the size that is checked."""
    layer = {"M": settings.batch * settings.length, "d_in": settings.d_in, "d_out": settings.d_out}
    about = {"device": device, "dtype": settings.as_json()["dtype"], "R": settings.rank}
    rows = [
        about | shape | choice | {"direction": direction}
        for shape in (layer, {name: EVEN[name] for name in layer})
        for direction in ("forward", "backward")
    ]
    write_json({"version": 1, "rows": rows}, file)


def job(each: Planned, option: Option) -> Job:
    settings, arm = each.settings, option.arm
    dtype = next(name for name, dtype in DTYPES.items() if dtype == settings.dtype)
    fields, device = tuple(EVEN.items()), str(settings.device)
    strategy = arm.strategy or "auto"
    check = Check("even", strategy, dtype, settings.rank, settings.dropout, fields, device, table=arm.table)
    return Job(check, Warm(settings, arm))


@uncollected()
def measure(
    here: Machine,
    planned: list[Planned],
    quick: bool,
    processes: int,
    left: Callable[[], float],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The part: rows in order of the plan, as many as there is time for, kept after every layer."""
    planned = wanted(planned)
    part: dict[str, Any] = {"rows": [], "left_out": []}
    if backend_of(here.device, planned[0].settings.dtype) != "triton":
        return part | {"unavailable": {"tiles": "they are Triton's, which does not run here"}}
    with tempfile.TemporaryDirectory() as folder:
        known = {each: list(options(here, each, quick, Path(folder))) for each in planned}
        broken = _try(known, processes, left, part)
        longest = 0.0
        for index, each in enumerate(planned):
            if left() < longest:
                part["left_out"] = left_out(planned[index:])
                break
            start = time.monotonic()
            part["rows"] += _case(here, each, known[each], broken)
            longest = max(longest * 0.8, time.monotonic() - start)
            keep(part)
    return part


def _try(
    known: dict[Planned, list[Option]], processes: int, left: Callable[[], float], part: dict[str, Any]
) -> dict[tuple[int, float, str], str]:
    """Tries GEMMs side by side, for at most a third of the time, at the first layer of each rank, with and without
    dropout: the others share its kernels. What is not to be timed, by (rank, dropout, name), and why."""
    first: dict[tuple[int, float], Planned] = {}
    for each in known:
        first.setdefault((each.settings.rank, each.settings.dropout), each)
    gemms = [(key, option, each) for key, each in first.items() for option in known[each] if option.tile]
    jobs, start, until = [job(each, option) for _, option, each in gemms], time.monotonic(), left() / 3

    def remaining() -> float:
        return until - (time.monotonic() - start)

    came = dict(workers.done(tried, jobs, processes, remaining, lambda job: workers.DIED))
    part["warm_up"] = {"jobs": len(jobs), "run": len(came), "seconds": time.monotonic() - start}
    reasons = {i: came.get(i, "there was no time to try it") for i in range(len(jobs))}
    return {(*gemms[i][0], gemms[i][1].arm.name): reason for i, reason in reasons.items() if reason is not None}


def _case(
    here: Machine, each: Planned, known: list[Option], broken: dict[tuple[int, float, str], str]
) -> list[dict[str, Any]]:
    """A row for the frozen layer and for each option; the broken ones have their reason."""
    settings = each.settings
    reasons = {option.arm.name: broken.get((settings.rank, settings.dropout, option.arm.name)) for option in known}
    arms = [option.arm for option in known if reasons[option.arm.name] is None]
    rows = run_case(here, max(each.level, 1), settings, [Arm("frozen", peers.PEERS["frozen"]), *arms], eager=False)
    about = {"M": settings.batch * settings.length, **settings.as_json()}
    rows += [about | {"peer": name, "error": reason} for name, reason in reasons.items() if reason is not None]
    ways = {option.arm.name: {"strategy": option.strategy, "tile": option.tile} for option in known}
    return [row | ways.get(row["peer"], {}) | {"level": each.level} for row in rows]
