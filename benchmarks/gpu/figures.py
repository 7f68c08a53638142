"""The report's plots, from its JSON: the main layers as bars, decoding as lines."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from plot import plot

from .markdown import shape_of


def draw(results: dict[str, Any], folder: Path) -> list[str]:
    """Names of the files written, each whole or not at all; none without matplotlib or rows."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    parts, names = results["parts"], []
    main = [row for row in parts.get("layer", {}).get("rows", ()) if row["level"] == 0 and "graph" in row]
    if main:
        plot({**results, "rows": [{**row, "eager": row["graph"]} for row in main]}, folder / "layer.png")
        names.append("layer.png")
    few = [row for row in parts.get("decode", {}).get("rows", ()) if "graph" in row]
    if few:
        _decode(few, results["machine"]["device"], folder / "decode.png")
        names.append("decode.png")
    return names


def _decode(rows: list[dict[str, Any]], device: str, file: Path) -> None:
    """One panel a shape: microseconds over the number of rows, a line an arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(map(shape_of, rows)))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.5), squeeze=False, layout="constrained")
    for axis, shape in zip(axes[0], shapes, strict=True):
        for name in dict.fromkeys(row["peer"] for row in rows):
            own = [row for row in rows if row["peer"] == name and shape_of(row) == shape]
            axis.plot([r["M"] for r in own], [1e3 * r["graph"]["forward"]["ms"] for r in own], marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_title(shape, fontsize=10)
        axis.set_xlabel("rows")
    axes[0, 0].set_ylabel("µs, CUDA graph")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"decoding · {device}", fontsize=11)
    temporary = file.with_name(file.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(file)
    plt.close(figure)
