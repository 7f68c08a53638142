"""Which strategy won, by shape and direction: rows of the file that ILORA_TABLE names (kernels/triton/table.py)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import write_json

from .arms import STRATEGIES

WORTH = 0.99  # a GEMM of ours must take less than this of beta's time: what is within noise stays as it is

Way = tuple[str, tuple[int, ...] | None]  # a strategy, and its tile where that was chosen
BETA: Way = ("beta", None)
FORCED = {f"ilora[{strategy}]": strategy for strategy in STRATEGIES}  # the sweep's arms
NAMES = ("direction", "dtype", "M", "d_in", "d_out", "R", "dropout")


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What won, for each shape and direction, with or without dropout, that "beta" and a GEMM of ours were timed in, by
    the device's time alone; and behind "whole" what won without it, for where that cannot be.

    Forward and backward were timed whole. Several E of one shape count alike. Where tiles were tried their part
    decides, and near there, for their rows hold within a factor of 2; the sweep over layers elsewhere.
    """
    found = _won_in(results["parts"].get("tune", {}).get("rows", ()))
    swept = _won_in(results["parts"].get("layer", {}).get("rows", ()))
    found |= {key: rows for key, rows in swept.items() if not any(_near(key, tuned) for tuned in found)}
    about = {"device": results["machine"]["device"]}
    return [about | dict(zip(NAMES, key, strict=True)) | won for key in sorted(found) for won in found[key]]


def _won_in(rows: Any) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    timed: dict[tuple[Any, ...], list[dict[Way, Any]]] = {}
    groups: dict[tuple[Any, ...], dict[Way, Any]] = {}
    for row, way in _ways(rows):
        key = (*(row[name] for name in ("dtype", "M", "d_in", "d_out", "rank")), row["dropout"] > 0)
        if (key, row["experts"]) not in groups:
            timed.setdefault(key, []).append(groups.setdefault((key, row["experts"]), {}))
        groups[key, row["experts"]][way] = row["graph"]
    found = {}
    for shape, each in timed.items():
        common = set.intersection(*(set(graphs) for graphs in each))  # a way that failed with some E is none
        if len(common) > 1 and BETA in common:
            for direction in ("forward", "backward"):
                times = {way: [graphs[way][direction]["ms"] for graphs in each] for way in common}
                found[(direction, *shape)] = _best({way: statistics.geometric_mean(ms) for way, ms in times.items()})
    return found


def _near(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two shapes, as NAMES has them, are within a factor of 2 of each other, all else alike."""
    sizes = zip(one[2:-1], other[2:-1], strict=True)
    return (one[:2], one[-1]) == (other[:2], other[-1]) and all(a <= 2 * b and b <= 2 * a for a, b in sizes)


def _ways(rows: Any) -> Iterator[tuple[dict[str, Any], Way]]:
    """Rows of ours with a graph's time, and what they are the time of."""
    for row in rows:
        if "graph" in row and row["dtype"] != "float32":
            if row["peer"] in FORCED:
                yield row, (FORCED[row["peer"]], None)
            elif "strategy" in row:
                yield row, (row["strategy"], row["tile"] and tuple(row["tile"]))


def _best(times: dict[Way, float]) -> list[dict[str, Any]]:
    """What takes least, "beta" unless it is worth another; and, should that be "whole", what does of the others."""
    times = times | {BETA: WORTH * times[BETA]}
    rows = []
    for ways in (times, {way: ms for way, ms in times.items() if way[0] != "whole"}):
        strategy, tile = min(ways, key=ways.__getitem__)
        rows.append({"strategy": strategy} | ({"tile": list(tile)} if tile else {}))
        if strategy != "whole":
            break
    return rows


def write(results: dict[str, Any], file: Path) -> bool:
    """The table, whole or not at all; False where there is nothing to write."""
    rows = rows_of(results)
    if rows:
        write_json({"version": 1, "rows": rows}, file)
    return bool(rows)
