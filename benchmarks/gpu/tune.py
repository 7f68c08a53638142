"""Which tile each GEMM of ours is best with: every one worth a try, beside "beta", timed at the main layers.

What wins is a row of the strategy table (table.py), which is in force for the parts that follow.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from report import write_json

from . import workers
from .arms import Arm, built_by, ours
from .layer import Warm, run_case, uncollected, warm
from .machine import Machine, backend_of
from .plan import Planned, left_out

# m, n, k, warps, stages, group. The last three leave room for two programs on a multiprocessor.
TILES = ((128, 256, 64, 8, 4, 8), (128, 256, 64, 8, 3, 8), (256, 128, 64, 8, 4, 8), (256, 128, 64, 8, 3, 8),
         (128, 128, 64, 8, 4, 8), (64, 256, 64, 4, 4, 8),
         (128, 128, 64, 8, 3, 8), (128, 128, 64, 4, 3, 8), (64, 128, 64, 4, 4, 8))  # fmt: skip
DRY_TILES = ((64, 128, 64, 8, 3, 8),)


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


def tables(here: Machine, planned: list[Planned], folder: Path) -> dict[tuple[str, tuple[int, ...]], str]:
    """A file for each (strategy, tile), which says so for all planned layers in both directions."""
    from ilora.kernels.launch import device_of

    files: dict[tuple[str, tuple[int, ...]], str] = {}
    name = device_of(torch.empty(1, device=here.device)).name
    for strategy in ("gemm", "whole"):
        for tile in DRY_TILES if here.dry else TILES:
            rows = [
                {
                    "device": name, "direction": direction, "dtype": s.as_json()["dtype"], "M": s.batch * s.length,
                    "d_in": s.d_in, "d_out": s.d_out, "R": s.rank, "strategy": strategy, "tile": list(tile),
                }
                for _, s in planned for direction in ("forward", "backward")
            ]  # fmt: skip
            file = folder / f"{strategy}-{'-'.join(map(str, tile))}.json"
            write_json({"version": 1, "rows": rows}, file)
            files[strategy, tile] = str(file)
    return files


def options(here: Machine, each: Planned, files: dict[tuple[str, tuple[int, ...]], str]) -> dict[str, dict[str, Any]]:
    """By name: {"arm", "strategy", "tile"} of "beta" and of every GEMM with a tile that fits this layer."""
    from ilora.kernels.config import SHARED, GemmTile
    from ilora.kernels.launch import device_of

    settings, build = each.settings, built_by(backend_of(here.device, each.settings.dtype))
    smem = device_of(torch.empty(1, device=here.device)).smem
    able = {arm.strategy for arm, reason in ours(settings) if reason is None}
    found: dict[str, dict[str, Any]] = {"beta": {"arm": Arm("beta", build, "beta"), "strategy": "beta", "tile": None}}
    for (strategy, tile), file in files.items():
        if strategy in able and SHARED[strategy](GemmTile(*tile), settings.rank) <= smem:
            name = f"{strategy} {'×'.join(map(str, tile[:3]))}, {tile[3]} warps, {tile[4]} stages"
            arm = Arm(name, build, "auto", table=file)
            found[name] = {"arm": arm, "strategy": strategy, "tile": list(tile)}
    return found


@uncollected()
def measure(
    here: Machine,
    planned: list[Planned],
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
        files = tables(here, planned, Path(folder))
        broken = _warm_up(here, planned, files, processes, left, part)
        longest = 0.0
        for index, each in enumerate(planned):
            if left() < longest:
                part["left_out"] = left_out(planned[index:])
                break
            start = time.monotonic()
            part["rows"] += _case(here, each, options(here, each, files), broken)
            longest = max(longest * 0.8, time.monotonic() - start)
            keep(part)
    return part


def _warm_up(
    here: Machine, planned: list[Planned], files: dict[tuple[str, tuple[int, ...]], str], processes: int,
    left: Callable[[], float], part: dict[str, Any],
) -> dict[tuple[int, float, str], str]:  # fmt: skip
    """Compiles side by side for at most a third of the time: shapes of one rank share kernels, with and without
    dropout. What could not run, by (rank, dropout, name), and why."""
    first = {(each.settings.rank, each.settings.dropout): each for each in reversed(planned)}
    named = [
        (key, name, Warm(each.settings, option["arm"]))
        for key, each in first.items()
        for name, option in options(here, each, files).items()
    ]
    jobs, start, until = [job for *_, job in named] if processes else [], time.monotonic(), left() / 3

    def remaining() -> float:
        return until - (time.monotonic() - start)

    came = dict(workers.done(warm, jobs, processes, remaining, lambda job: workers.DIED))
    part["warm_up"] = {"jobs": len(jobs), "run": len(came), "seconds": time.monotonic() - start}
    return {(*named[i][0], named[i][1]): reason for i, reason in came.items() if reason is not None}


def _case(
    here: Machine, each: Planned, known: dict[str, dict[str, Any]], broken: dict[tuple[int, float, str], str]
) -> list[dict[str, Any]]:
    """A row for each option; the broken ones have their reason."""
    level, settings = each
    reasons = {name: broken.get((settings.rank, settings.dropout, name)) for name in known}
    arms = [Arm("frozen", peers.PEERS["frozen"]), *(known[name]["arm"] for name in known if reasons[name] is None)]
    rows = run_case(here, level, settings, arms, eager=False)
    about = {"level": level, "M": settings.batch * settings.length, **settings.as_json()}
    rows += [about | {"peer": name, "error": reason} for name, reason in reasons.items() if reason is not None]
    for row in rows:
        row |= {key: known[row["peer"]][key] for key in ("strategy", "tile")} if row["peer"] in known else {}
    return rows
