"""The tables, the plot and the files of a benchmark run.

`python benchmarks/report.py RESULTS.json` prints the Markdown tables of a file that a benchmark wrote with --json;
`python benchmarks/report.py RESULTS.json PLOT.png` draws its plot as well, of all peers or of those in --peers.
`python benchmarks/report.py --update PAGE.md` writes the tables of a page anew, each after the name of its file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import arguments
import pandas as pd
from measure import BASELINE, PARTS
from tabulate import tabulate

Row = dict[str, Any]
MISSING = "–"
RESULTS = Path(__file__).parent / "results"


def case_table(title: object, rows: list[Row]) -> str:
    """The rows of one case for the terminal, one table for each way of timing.

    × is the ratio to the frozen layer; the last of them has its quartiles.
    """
    texts = []
    for variant in ("eager", "graph"):
        timed = [row for row in rows if variant in row]
        if timed:
            lines = pd.DataFrame([_case_line(row, variant) for row in timed]).fillna("")
            texts.append(f"\n{title}; {variant}, {timed[0][variant]['rounds']} rounds\n{terminal_table(lines)}")
    for key, what in (("error", "not timed"), ("graph_error", "no graph")):
        texts += [f"{row['peer']}: {what}: {row[key]}" for row in rows if key in row]
    return "\n".join(texts)


def _case_line(row: Row, variant: str) -> Row:
    line = {"": row["peer"]}
    parts = [part for part in PARTS if part in row[variant]]
    for part in parts:
        times = row[variant][part]
        line |= {f"{part} ms": f"{times['ms']:.3f}", f"{part} ×": _with_quartiles(times, part == parts[-1])}
    if "peak_bytes" in row:
        line |= {"peak MB": f"{row['peak_bytes'] / 1e6:.1f}", "saved MB": f"{row['saved_bytes'] / 1e6:.1f}"}
    if "gate" in row[variant]:
        line["gate"] = _gate_cost(row, variant)
    return line | {"error": f"{row['error_of_check']:.0e}"}


def _gate_cost(row: Row, variant: str = "graph") -> str:
    """What the gate adds to the time of our layer without one, with quartiles."""
    times = row[variant if variant in row else "eager"]["gate"]["both"]
    return "{:+.1%} ({:+.1%} to {:+.1%})".format(*(times[name] - 1.0 for name in ("ratio", "low", "high")))


def gate_markdown(rows: list[Row]) -> str:
    """What the gate costs; a row for each layer, with a figure for each dropout probability, or "" where no row has
    it."""
    lines: dict[str, Row] = {}
    for row in rows:
        if any("gate" in row.get(variant, ()) for variant in ("graph", "eager")):
            layer = f"{_shape(row)}, {row['batch'] * row['length']} rows, R = {row['rank']}"
            lines.setdefault(layer, {})[f"p = {row['dropout']:g}"] = _gate_cost(row)
    return _markdown(pd.DataFrame(lines).T.fillna(MISSING)) if lines else ""


def _with_quartiles(times: Row, quartiles: bool = True) -> str:
    ratio = f"{times['ratio']:.2f}" if times["ratio"] >= 0.1 else f"{times['ratio']:.3f}"
    return f"{ratio} ({times['low']:.2f}–{times['high']:.2f})" if quartiles else ratio


def terminal_table(frame: pd.DataFrame) -> str:
    align = ["left", *["right"] * (len(frame.columns) - 1)]
    return tabulate(frame, headers="keys", showindex=False, disable_numparse=True, colalign=align)


def calls_table(rows: list[Row]) -> str:
    """What one call costs, for the terminal."""
    title = "One call in one thread, µs (over the frozen layer's)"
    errors = "".join(f"\n{row['peer']}: not timed: {row['error']}" for row in rows if "error" in row)
    return f"\n{title}\n{terminal_table(_calls_frame(rows).reset_index(names=''))}{errors}"


def markdown(results: dict[str, Any]) -> str:
    """Markdown of one run: what a layer takes, what a call costs, whole training steps, generating text, many adapters.

    Raises ValueError for a dry run of the GPU report, and for a file that has none of these.
    """
    if results.get("dry_run"):
        raise ValueError("this is a dry run of gpu_report.py on a CPU: its figures mean nothing, publish none of them")
    makers: dict[str, Callable[[list[Row]], str]] = {
        "rows": layer_markdown,
        "calls": lambda rows: _markdown(_calls_frame(rows)),
        "steps": steps_markdown,
        "generation": generation_markdown,
        "adapters": lambda rows: _markdown(many_frame(rows)),
        "experts": lambda rows: _markdown(many_frame(rows)),
    }
    tables = [make(results[name]) for name, make in makers.items() if results.get(name)]
    if not tables:
        raise ValueError("no rows of a layer and no steps of a model: there is no table to make")
    return "\n\n".join(tables)


def layer_markdown(rows: list[Row]) -> str:
    """Forward plus backward (or forward alone, in inference) over the frozen layer's: a row for each peer, a column for
    each shape.

    A cell holds one figure for each dropout probability, in order: "wrong" where the check refused the peer, "failed"
    where it did not run, a dash where it has no such case. There is a table for each dtype, number of rows, R and E,
    with a title where there are several. On a GPU the times are those of graphs.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("dtype", "batch", "length", "rank", "experts")), []).append(row)
    tables = []
    for (dtype, batch, length, rank, experts), group in groups.items():
        title = f"{dtype}, {batch} × {length} rows, R = {rank}, E = {experts}:\n\n" if len(groups) > 1 else ""
        tables.append(title + _markdown(_layer_frame(group)))
    return "\n\n".join(tables)


def _layer_frame(rows: list[Row]) -> pd.DataFrame:
    lines = [
        {
            "peer": row["peer"],
            "shape": _shape(row),
            "dropout": row["dropout"],
            "ratio": _ratio(row),
            "saved": f"{row['saved_bytes'] / 1e6:.1f}" if "saved_bytes" in row and "error" not in row else MISSING,
        }
        for row in rows
    ]
    found = pd.DataFrame(lines).set_index(["peer", "shape", "dropout"])
    every = pd.MultiIndex.from_product([found.index.unique(name) for name in found.index.names])
    cells = found.reindex(every, fill_value=MISSING).groupby(level=["peer", "shape"], sort=False).agg(" / ".join)
    table = cells["ratio"].unstack(sort=False)
    if any("saved_bytes" in row for row in rows):
        table["saved for backward"] = cells["saved"].unstack(sort=False).iloc[:, -1] + " MB"  # of the last shape
    return table


def _ratio(row: Row) -> str:
    if "error" in row:
        if "NotImplementedError" in row["error"]:
            return MISSING
        return "wrong" if "WrongPeer" in row["error"] else "failed"
    return _with_quartiles(last_part(row), quartiles=False)


def _shape(row: Row) -> str:
    return f"{row['d_in']}→{row['d_out']}"


def last_part(row: Row, variant: str = "graph") -> Row:
    """Times of forward plus backward, or of forward where there is no backward."""
    times: Row = row[variant] if variant in row else row["eager"]
    last: Row = times["both" if "both" in times else "forward"]
    return last


def _calls_frame(rows: list[Row]) -> pd.DataFrame:
    """µs of a call and the ratio to the frozen layer's; a row for each layer."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        times = MISSING
        if "error" not in row:
            part = last_part(row, "eager")
            times = f"{1e3 * part['ms']:.1f} ({part['ratio']:.2f})"
        kind = "forward + backward" if "saved_bytes" in row else "inference"
        cells.setdefault(f"{row['length']} × {_shape(row)}, {kind}", {})[row["peer"]] = times
    return pd.DataFrame(cells).fillna(MISSING)


def steps_markdown(steps: list[Row]) -> str:
    """Whole training steps: a row for each model; a cell holds one figure for each dropout probability, in order."""
    lines = {}
    for name, own in _by_name(steps).items():
        lines[name] = {
            "step": _joined(own, lambda row: f"{row['seconds']:.{2 if row['seconds'] >= 1 else 4}f}") + " s",
            "over the frozen model": _joined(own, lambda row: f"{row['ratio']:.2f}"),
            "peak memory": _joined(own, lambda row: f"{row['peak_bytes'] / 1e6:.0f}") + " MB",
            "trained parameters": f"{own[0]['trained']:,}",
        }
        if "tokens_per_second" in own[0]:
            lines[name]["tokens a second"] = _joined(own, lambda row: f"{row['tokens_per_second']:,.0f}")
    return _markdown(pd.DataFrame(lines).T)


def generation_markdown(rows: list[Row]) -> str:
    """Generating text: a row for each model."""
    lines = {
        name: {
            "time per token": f"{1e3 * own[0]['seconds']:.1f} ms",
            "over the frozen model": _with_quartiles(own[0]),
        }
        for name, own in _by_name(rows).items()
    }
    return _markdown(pd.DataFrame(lines).T)


def many_frame(rows: list[Row]) -> pd.DataFrame:
    """Many adapters in one batch, or adapted experts: forward plus backward over the baseline's, whose milliseconds
    stand beside its 1.00; a row for each peer, a column for each case."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        both = row["both"]
        ms = f" ({both['ms']:.0f} ms)" if both["low"] == both["high"] == 1.0 else ""
        cells.setdefault(row["case"], {})[row["peer"]] = f"{both['ratio']:.2f}{ms}"
    return pd.DataFrame(cells).fillna(MISSING)


def many_table(rows: list[Row]) -> str:
    """The same of one case, for the terminal, with quartiles."""
    lines = [
        {"": row["peer"], "ms": f"{row['both']['ms']:.1f}", "×": _with_quartiles(row["both"], True)} for row in rows
    ]
    return f"\n{rows[0]['case']}, {rows[0]['rounds']} rounds\n{terminal_table(pd.DataFrame(lines))}"


def _by_name(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "error" not in row:
            found.setdefault(row["step"], []).append(row)
    return found


def _joined(rows: list[Row], text: Callable[[Row], str]) -> str:
    return " / ".join(map(text, rows))


def _markdown(frame: pd.DataFrame) -> str:
    """A Markdown table whose first column is the frame's index."""
    return frame.rename_axis(None).rename_axis(None, axis=1).to_markdown(disable_numparse=True)


def updated(page: str) -> str:
    """The page with the table of each `<!-- NAME.json -->` made anew from that file of benchmarks/results."""

    def with_table(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{markdown(load(RESULTS / found[2]))}\n\n"

    return re.sub(r"(<!-- (\S+\.json) -->)\n\n(?:\|.*\n)*\n?", with_table, page)


def plot(results: dict[str, Any], file: Path, peers: list[str] | None = None) -> None:
    """Ratios to the frozen layer as bars: a panel for each dtype, rank, E and dropout, a group of bars for each shape,
    a bar for each peer, or each of `peers`. Raises ValueError if no row was timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results.get("rows", ()) if "error" not in row and row["peer"] != BASELINE]
    rows = [row for row in rows if peers is None or row["peer"] in peers]
    if not rows:
        raise ValueError("no timed rows to plot")
    frame = pd.DataFrame([{**row, "shape": _shape(row), "ratio": last_part(row)["ratio"]} for row in rows])
    panels = list(frame.groupby(["dtype", "batch", "length", "rank", "experts", "dropout"], sort=False))
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 3.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, ((dtype, batch, length, rank, experts, dropout), panel) in zip(axes[:, 0], panels, strict=True):
        bars = panel.pivot(index="shape", columns="peer", values="ratio")
        bars = bars.reindex(index=panel["shape"].unique(), columns=panel["peer"].unique())
        title = f"{dtype}, {batch} × {length} rows, R={rank}, E={experts}, p={dropout:g}"
        bars.plot.bar(ax=axis, rot=0, width=0.8, xlabel="", ylabel="ratio", title=title)
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.legend(fontsize=7, ncols=4)
    figure.suptitle(f"forward + backward, time over the frozen layer's · {results['machine']['device']}", fontsize=11)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def write_json(results: dict[str, Any], file: Path) -> None:
    write_text(json.dumps(results, indent=1) + "\n", file)


def write_text(text: str, file: Path) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file to write to. It replaces the file in the end, or is removed if anything fails."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        yield temporary
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(file: Path) -> dict[str, Any]:
    """What a benchmark wrote; ValueError for any other file."""
    try:
        results = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(results, dict) or "machine" not in results:
        raise ValueError(f"{file} is no file that a benchmark wrote with --json")
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, nargs="?", metavar="RESULTS.json", help="what a benchmark wrote with --json")
    add("plot", type=arguments.plot_file, nargs="?", metavar="PLOT.png", help="a plot to draw as well")
    add("--peers", help="the peers to draw, as peft,ilora[native] (default: all)")
    add("--update", type=Path, metavar="PAGE.md", help="write the tables of this page anew")
    options = parser.parse_args(argv)
    if (options.file is None) == (options.update is None):
        parser.error("give either RESULTS.json or --update PAGE.md")
    try:
        if options.update:
            write_text(updated(options.update.read_text()), options.update)
            return
        results = load(options.file)
        print(markdown(results))
        if options.plot:
            plot(results, options.plot, options.peers.split(",") if options.peers else None)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
