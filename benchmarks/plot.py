"""`python benchmarks/plot.py RESULTS.json PLOT.png`: forward plus backward over the frozen layer's, as bars."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def plot(results: dict[str, Any], file: Path) -> None:
    """One panel for each dtype, rank, E and dropout; a group of bars for each shape, a bar for each peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if "error" not in row:
            panels.setdefault((row["dtype"], row["rank"], row["experts"], row["dropout"]), []).append(row)
    if not panels:
        raise ValueError("no timed rows to plot")
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 3.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, ((dtype, rank, experts, dropout), rows) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(axis, rows)
        axis.set_title(f"{dtype}, R={rank}, E={experts}, p={dropout:g}", fontsize=10)
    figure.suptitle(f"forward + backward, time over the frozen layer's · {results['machine']['device']}", fontsize=11)
    temporary = file.with_name(file.name + ".tmp")
    figure.savefig(temporary, format=file.suffix.lstrip(".") or "png", dpi=150)
    temporary.replace(file)
    plt.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    shapes = list(dict.fromkeys(map(_shape, rows)))
    peers = [name for name in dict.fromkeys(row["peer"] for row in rows) if name != "frozen"]
    width = 0.8 / max(len(peers), 1)
    for i, name in enumerate(peers):
        mine = [row for row in rows if row["peer"] == name]
        times = [row.get("graph", row["eager"])["both"] for row in mine]
        left = [shapes.index(_shape(row)) + (i - (len(peers) - 1) / 2) * width for row in mine]
        quartiles = [[t["ratio"] - t["low"] for t in times], [t["high"] - t["ratio"] for t in times]]
        axis.bar(left, [t["ratio"] for t in times], width, yerr=quartiles, label=name, error_kw={"linewidth": 0.7})
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(shapes)), shapes)
    axis.set_ylabel("ratio")
    axis.legend(fontsize=7, ncols=4)


def _shape(row: dict[str, Any]) -> str:
    return f"{row['d_in']}→{row['d_out']}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/plot.py RESULTS.json PLOT.png")
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
