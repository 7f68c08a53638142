"""`python benchmarks/plot.py RESULTS.json PLOT.png`: forward plus backward over the frozen layer's, as bars."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import arguments
from report import load, whole


def check(option: str, file: Path | None) -> None:
    """Refuses, by ValueError, a file that `plot` could not write; None is none."""
    if file is None:
        return
    arguments.writable(option, file)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise ValueError(f"{option}: {error.name} is not installed") from error
    except Exception as error:  # whatever its import does
        raise ValueError(f"{option}: matplotlib does not import here: {type(error).__name__}: {error}") from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if _kind(file) not in kinds:
        raise ValueError(f"{option} {file}: expected a name that ends in .{', .'.join(sorted(kinds))}")


def _kind(file: Path) -> str:
    return file.suffix.lstrip(".").lower() or "png"


def plot(results: dict[str, Any], file: Path) -> None:
    """One panel for each dtype, rank, E and dropout; a group of bars for each shape, a bar for each peer.

    Raises ValueError if no row was timed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results.get("rows", ()):
        if "error" not in row:
            panels.setdefault((row["dtype"], row["rank"], row["experts"], row["dropout"]), []).append(row)
    if not panels:
        raise ValueError("no timed rows to plot")
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 3.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, ((dtype, rank, experts, dropout), rows) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(axis, rows)
        axis.set_title(f"{dtype}, R={rank}, E={experts}, p={dropout:g}", fontsize=10)
    figure.suptitle(f"forward + backward, time over the frozen layer's · {results['machine']['device']}", fontsize=11)
    try:
        with whole(file) as temporary:
            figure.savefig(temporary, format=_kind(file), dpi=150)
    finally:
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="what bench_moe_lora.py wrote with --json")
    parser.add_argument("plot", type=Path, metavar="PLOT.png", help="the file to write")
    asked = parser.parse_args(argv)
    try:
        check("PLOT", asked.plot)
        plot(load(asked.results), asked.plot)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
