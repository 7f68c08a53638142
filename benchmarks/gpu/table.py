"""Which strategy won, by shape and direction: rows of the file that ILORA_TABLE names (kernels/triton/table.py)."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from report import write_json

WORTH = 0.99  # a GEMM of ours must take less than this of beta's time: what is within noise stays as it is
GEMMS = ("gemm", "whole")


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each shape and direction, with or without dropout, that "beta" and a GEMM of ours were timed in, by the
    device's time alone.

    Forward and backward were timed whole. Several E of one shape count alike.
    """
    timed: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in results["parts"].get("layer", {}).get("rows", ()):
        if row["peer"].startswith("ilora[") and "graph" in row and row["dtype"] != "float32":
            key = tuple(row[name] for name in ("dtype", "M", "d_in", "d_out", "rank"))
            timed.setdefault((*key, row["dropout"] > 0, row["experts"]), {})[row["peer"][6:-1]] = row["graph"]
    logs: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for (*shape, _), graphs in timed.items():
        for direction in ("forward", "backward"):
            for name in GEMMS:
                if name in graphs and "beta" in graphs:
                    ratio = graphs[name][direction]["ms"] / graphs["beta"][direction]["ms"]
                    logs.setdefault((direction, *shape), {}).setdefault(name, []).append(math.log(ratio))
    names = ("direction", "dtype", "M", "d_in", "d_out", "R", "dropout")
    return [
        {"device": results["machine"]["device"], **dict(zip(names, key, strict=True)), **_won(of)}
        for key, of in sorted(logs.items())
    ]


def _won(logs: dict[str, list[float]]) -> dict[str, str]:
    """logs: of the times over beta's. What takes least, and, should that be "whole", what does without it."""
    means = {"beta": math.log(WORTH)} | {name: statistics.fmean(values) for name, values in logs.items()}
    best = min(means, key=lambda name: means[name])
    if best != "whole":
        return {"strategy": best}
    del means["whole"]
    return {"strategy": best, "otherwise": min(means, key=lambda name: means[name])}


def write(results: dict[str, Any], file: Path) -> bool:
    """The table, whole or not at all; False where there is nothing to write."""
    rows = rows_of(results)
    if rows:
        write_json({"version": 1, "rows": rows}, file)
    return bool(rows)
