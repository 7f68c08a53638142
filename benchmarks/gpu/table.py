"""Which strategy won, by shape and direction: rows of the file that ILORA_TABLE names (kernels/triton/table.py)."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from report import write_json

WORTH = 0.99  # gemm must take less than this of beta's time: what is within noise stays as it is


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each shape and direction that both strategies were timed in, by the device's time alone.

    Forward and backward were timed whole; between the two strategies only y's and dx's kernels differ. Several
    E and p of one shape count alike.
    """
    pairs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in results["parts"].get("layer", {}).get("rows", ()):
        if row["peer"] in ("ilora[beta]", "ilora[gemm]") and "graph" in row and row["dtype"] != "float32":
            key = tuple(row[name] for name in ("dtype", "M", "d_in", "d_out", "rank"))
            pairs.setdefault((*key, row["experts"], row["dropout"]), {})[row["peer"]] = row["graph"]
    logs: dict[tuple[Any, ...], list[float]] = {}
    for (*shape, _, _), timed in pairs.items():
        if len(timed) == 2:
            for direction in ("forward", "backward"):
                beta, gemm = (timed[f"ilora[{name}]"][direction]["ms"] for name in ("beta", "gemm"))
                logs.setdefault((direction, *shape), []).append(math.log(gemm / beta))
    names = ("direction", "dtype", "M", "d_in", "d_out", "R")
    return [
        {
            "device": results["machine"]["device"],
            **dict(zip(names, key, strict=True)),
            "strategy": "gemm" if statistics.fmean(values) < math.log(WORTH) else "beta",
        }
        for key, values in sorted(logs.items())
    ]


def write(results: dict[str, Any], file: Path) -> bool:
    """The table, whole or not at all; False where there is nothing to write."""
    rows = rows_of(results)
    if rows:
        write_json({"version": 1, "rows": rows}, file)
    return bool(rows)
