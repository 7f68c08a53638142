"""Which strategy won, by shape and direction: rows of the file that ILORA_TABLE names (kernels/triton/table.py)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import write_json

WORTH = 0.99  # a GEMM of ours must take less than this of beta's time: what is within noise stays as it is

Way = tuple[str, tuple[int, ...] | None]  # a strategy, and its tile where that was chosen
NAMES = ("direction", "dtype", "M", "d_in", "d_out", "R", "dropout")


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each shape and direction, with or without dropout, that "beta" and a GEMM of ours were timed in, by the
    device's time alone.

    Forward and backward were timed whole. Several E of one shape count alike. Where tiles were tried their part
    decides, and the sweep over layers elsewhere.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in ("layer", "tune"):
        found |= _won_in(results["parts"].get(part, {}).get("rows", ()))
    about = {"device": results["machine"]["device"]}
    return [about | dict(zip(NAMES, key, strict=True)) | found[key] for key in sorted(found)]


def _won_in(rows: Any) -> dict[tuple[Any, ...], dict[str, Any]]:
    timed: dict[tuple[Any, ...], dict[Way, Any]] = {}
    for row, way in _ways(rows):
        key = tuple(row[name] for name in ("dtype", "M", "d_in", "d_out", "rank"))
        timed.setdefault((*key, row["dropout"] > 0, row["experts"]), {})[way] = row["graph"]
    logs: dict[tuple[Any, ...], dict[Way, list[float]]] = {}
    for (*shape, _), graphs in timed.items():
        beta = graphs.pop(("beta", None), None)
        for way, graph in graphs.items() if beta else ():
            for direction in ("forward", "backward"):
                log = math.log(graph[direction]["ms"] / beta[direction]["ms"])
                logs.setdefault((direction, *shape), {}).setdefault(way, []).append(log)
    return {key: _best({way: statistics.fmean(values) for way, values in of.items()}) for key, of in logs.items()}


def _ways(rows: Any) -> Iterator[tuple[dict[str, Any], Way]]:
    """Rows of ours with a graph's time, and what they are the time of."""
    for row in rows:
        if "graph" in row and row["dtype"] != "float32":
            if row["peer"].startswith("ilora["):
                yield row, (row["peer"][6:-1], None)
            elif "strategy" in row:
                yield row, (row["strategy"], row["tile"] and tuple(row["tile"]))


def _best(logs: dict[Way, float]) -> dict[str, Any]:
    """logs: of the times over beta's. What takes least, and, should that be "whole", what does without it."""
    beta: Way = ("beta", None)
    logs = {beta: math.log(WORTH), **logs}
    strategy, tile = min(logs, key=logs.__getitem__)
    won: dict[str, Any] = {"strategy": strategy} | ({"tile": list(tile)} if tile else {})
    if strategy == "whole":
        without = {way: log for way, log in logs.items() if way[0] != "whole"}
        won["otherwise"] = min(without, key=without.__getitem__)[0]
    return won


def write(results: dict[str, Any], file: Path) -> bool:
    """The table, whole or not at all; False where there is nothing to write."""
    rows = rows_of(results)
    if rows:
        write_json({"version": 1, "rows": rows}, file)
    return bool(rows)
