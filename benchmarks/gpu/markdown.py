"""The report as Markdown, from its JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

from report import heading

from .table import rows_of

Rows = list[dict[str, Any]]
Key = Callable[[dict[str, Any]], Hashable]


def markdown(results: dict[str, Any]) -> str:
    """Every part that the results have, what failed first."""
    known = results["machine"]
    lines = [f"# GPU report: {known['device']}", "", heading(known)]
    lines += [f"Commit {known['git_commit']}{', changed since' if known['git_changed'] else ''}; {results['started']}."]
    if known.get("state"):
        lines.append(f"{known['state']}")
    if results["dry_run"]:
        lines += ["", "**A DRY RUN ON A CPU: every part was gone through, no figure means anything.**"]
    for name, section in SECTIONS.items():
        if (part := results["parts"].get(name)) is not None:
            lines += ["", f"## {name.capitalize()} ({part['seconds']:.0f} s)", ""]
            lines += [f"**The part failed: {part['error']}**", ""] if "error" in part else []
            lines += section(part, results) if set(part) - {"error", "seconds", "left_out"} else []
            lines += _remarks(part)
    return "\n".join(lines) + "\n"


def summary(results: dict[str, Any]) -> str:
    """What to read first: the verdict, the main layers, whatever failed or was left out."""
    lines, parts = [heading(results["machine"])], results["parts"]
    if "rows" in parts.get("correctness", {}):
        lines += _correctness(parts["correctness"], results)
    else:
        lines.append("correctness: NOT CHECKED in this report")
    if "rows" in parts.get("layer", {}):
        lines += _layer(parts["layer"], results, main=True)
    lines += _strategies(results)
    for name, part in parts.items():
        remarks = ([f"the part failed: {part['error']}"] if "error" in part else []) + _remarks(part)
        lines += [f"{name}: {each}" for each in remarks if each]
    return "\n".join(lines)


def _remarks(part: dict[str, Any]) -> list[str]:
    """What is not in the tables, and why."""
    failures: dict[str, Rows] = {}
    for row in part.get("rows", ()):
        for key in ("error", "graph_error"):
            if key in row:
                failures.setdefault(f"{row.get('peer', row.get('shape'))}: {row[key]}", []).append(row)
    lines = [f"- Left out: {what}" for what in part.get("left_out", ())]
    lines += [f"- Not there: {name}: {reason}" for name, reason in part.get("unavailable", {}).items()]
    lines += [f"- **Failed in {len(rows)} rows:** {what}" for what, rows in failures.items()]
    return ["", *lines] if lines else []


def grid(rows: Rows, down: Key, across: Key, cell: Callable[[Rows], str], corner: str = "") -> list[str]:
    """A table: one line for each value of `down`, one column for each of `across`, in the order they come."""
    heads = list(dict.fromkeys(map(across, rows)))
    lines = [f"| {corner} | {' | '.join(map(str, heads))} |", "|---" * (len(heads) + 1) + "|"]
    for name in dict.fromkeys(map(down, rows)):
        cells = ([row for row in rows if down(row) == name and across(row) == head] for head in heads)
        lines.append(f"| {name} | {' | '.join(cell(each) if each else '–' for each in cells)} |")
    return lines


def shape_of(row: dict[str, Any]) -> str:
    return f"{row['d_in']}→{row['d_out']}"


def _correctness(part: dict[str, Any], results: dict[str, Any]) -> list[str]:
    rows, failed = part["rows"], part["failed"]
    verdict = f"**WRONG: {failed} findings. No figure below counts.**" if failed else f"{len(rows)} checks passed."
    lines = [verdict, *([f"**Not run for want of time: {part['not_run']}**"] if part["not_run"] else []), ""]
    if rows:
        lines += grid(
            rows,
            lambda row: row["strategy"],
            lambda row: f"{row['dtype']}{' with fp32 A, B' if row['mixed'] else ''}",
            lambda each: f"{sum(row['problem'] is None for row in each)} of {len(each)}",
            "passed",
        )
    for row in rows:
        if row["problem"] is not None:
            about = f"{row['shape']} {row['fields']}, {row['strategy']}, {row['dtype']}, R={row['R']}, p={row['p']}"
            lines.append(f"- **{about}: {row['problem']}**")
    for each in part.get("sanitizer", ()):
        found = (
            "did not finish: not done"
            if not each["finished"]
            else f"exit {each['status']}, findings: {each['findings']}"
        )
        lines += ["", f"compute-sanitizer --tool {each['tool']}: {found}", "", "```", *each["last_lines"], "```"]
    return lines


def _ceilings(part: dict[str, Any], results: dict[str, Any]) -> list[str]:
    return [
        f"A copy moves {part['copy_bytes'] / 1e12:.2f} TB/s (read plus written); a large bfloat16 product of random "
        f"numbers runs at {part['flops'] / 1e12:.0f} TFLOP/s."
    ]


def _layer(part: dict[str, Any], results: dict[str, Any], main: bool = False) -> list[str]:
    """A table for each M, R, E and way of timing; the main case, or it alone, has forward and backward besides."""
    timed = [row for row in part["rows"] if "eager" in row and (row["level"] == 0 or not main)]
    dropouts = list(dict.fromkeys(row["dropout"] for row in timed))
    lines = ["Time over the frozen layer's (whose backward is dx alone), dropout "]
    lines[0] += " / ".join(f"{p:g}" for p in dropouts)
    lines[0] += "; medians over interleaved rounds on inputs that no cache holds; graph: CUDA-graph replays."
    for key in dict.fromkeys((row["M"], row["rank"], row["experts"]) for row in timed):
        own = [row for row in timed if (row["M"], row["rank"], row["experts"]) == key]
        first = any(row["level"] == 0 for row in own)
        for variant in ("graph", "eager"):
            having = [row for row in own if variant in row]
            for direction in ("both", "forward", "backward") if first else ("both",):
                if having:
                    lines += ["", f"M={key[0]}, R={key[1]}, E={key[2]}: {_named(direction)}, {variant}", ""]
                    lines += grid(having, _peer, shape_of, partial(_cell, dropouts, variant, direction))
        if first:
            lines += ["", f"M={key[0]}, R={key[1]}: peak / saved memory, MB", ""]
            lines += grid(own, _peer, shape_of, lambda each: " ; ".join(map(_memory, each)))
            lines += _achieved(own, results)
    return lines + ([] if main or results["parts"].get("tune", {}).get("rows") else _strategies(results))


def _named(direction: str) -> str:
    return "forward + backward" if direction == "both" else direction


def _peer(row: dict[str, Any]) -> str:
    return row["peer"]


def _cell(dropouts: list[float], variant: str, direction: str, each: Rows) -> str:
    """The ratios by dropout, with the last one's quartiles; of the frozen layer the milliseconds."""
    found = {row["dropout"]: row[variant][direction] for row in each}
    key, digits, unit = ("ms", 3, " ms") if each[0]["peer"] == "frozen" else ("ratio", 2, "")
    cell = " / ".join(f"{found[p][key]:.{digits}f}" if p in found else "–" for p in dropouts)
    last = found[each[-1]["dropout"]]
    return cell + unit if unit else f"{cell} ({last['low']:.2f}–{last['high']:.2f})"


def _memory(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 1e6:.0f} / {row['saved_bytes'] / 1e6:.0f}"


def _achieved(own: Rows, results: dict[str, Any]) -> list[str]:
    """The frozen product's share of the measured ceiling: what its own kernel leaves on the table."""
    ceiling = results["parts"].get("ceilings", {}).get("flops")
    frozen = [row for row in own if row["peer"] == "frozen" and "graph" in row and row["dropout"] == 0.0]
    if not ceiling or not frozen:
        return []

    def share(each: Rows) -> str:
        row = each[0]
        rate = 4e3 * row["M"] * row["d_in"] * row["d_out"] / row["graph"]["both"]["ms"]
        return f"{rate / 1e12:.0f} TFLOP/s, {rate / ceiling:.0%}"

    return ["", "The frozen layer's rate, of the ceiling", "", *grid(frozen, _peer, shape_of, share)]


def _strategies(results: dict[str, Any]) -> list[str]:
    rows = rows_of(results)
    if not rows:
        return []
    lines = ["", "Which strategy won, and with which tile where several were tried (strategy-table.json)", ""]

    def label(row: dict[str, Any]) -> str:
        return f"{row['direction']}, M={row['M']}, R={row['R']}{', dropout' if row['dropout'] else ''}"

    def cell(each: Rows) -> str:
        tiles = [row.get("tile") for row in each]  # the second's is for where "whole" cannot be
        shown = [f" {'×'.join(map(str, tile[:3]))}/{tile[3]}/{tile[4]}" if tile else "" for tile in tiles]
        return ", else ".join(row["strategy"] + tile for row, tile in zip(each, shown, strict=True))

    return lines + grid(rows, label, shape_of, cell)


def _tune(part: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Forward and backward of every option over the frozen layer's."""
    lines: list[str] = []
    timed = [row for row in part["rows"] if "graph" in row]
    for key in dict.fromkeys((row["rank"], row["dropout"]) for row in timed):
        own = [row for row in timed if (row["rank"], row["dropout"]) == key]

        def cell(each: Rows) -> str:
            ways = (each[0]["graph"][direction] for direction in ("forward", "backward"))
            frozen = each[0]["peer"] == "frozen"
            return " ; ".join(f"{way['ms']:.3f} ms" if frozen else f"{way['ratio']:.3f}" for way in ways)

        lines += ["", f"R={key[0]}, dropout {key[1]:g}: forward ; backward, graph", ""]
        lines += grid(own, _peer, lambda row: f"{shape_of(row)}, M={row['M']}", cell)
    return lines + _strategies(results)


def _decode(part: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Microseconds, the ratio to the frozen layer, and W's bytes a second over the measured copy's."""
    ceiling = results["parts"].get("ceilings", {}).get("copy_bytes")
    lines: list[str] = []

    def cell(each: Rows, variant: str) -> str:
        timed = each[0][variant]["forward"]
        rate = each[0]["weight_bytes"] / timed["ms"] * 1e3
        share = f", {rate / ceiling:.0%}" if ceiling and variant == "graph" else ""
        return f"{1e3 * timed['ms']:.1f} µs, {timed['ratio']:.2f}{share}"

    for shape in dict.fromkeys(map(shape_of, part["rows"])):
        for variant in ("graph", "eager"):
            own = [row for row in part["rows"] if shape_of(row) == shape and variant in row]
            if own:
                lines += [
                    "",
                    f"{shape}, {variant}: time, over the frozen layer's, share of the copy's bandwidth",
                ]
                lines += ["", *grid(own, _peer, lambda row: f"M={row['M']}", lambda e, v=variant: cell(e, v))]  # type: ignore[misc]
    return lines


def _model(part: dict[str, Any], results: dict[str, Any]) -> list[str]:
    lines = ["| model | layers | checkpointing | p | | step | over the frozen | low–high | peak memory |"]
    lines.append("|---" * 9 + "|")
    for row in (row for row in part["rows"] if "seconds" in row):
        size, share = f"{row['batch']}×{row['length']}, R={row['rank']}", f"{row['layers']} of {row['of_layers']}"
        cells = [f"{row['shape']}, {size}", share, "on" if row["checkpointing"] else "off", f"{row['dropout']:g}"]
        cells += [row["step"], f"{1e3 * row['seconds']:.1f} ms", f"{row['ratio']:.3f}"]
        cells += [f"{row['low']:.3f}–{row['high']:.3f}", f"{row['peak_bytes'] / 1e9:.2f} GB"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _host(part: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Medians over batches of calls, and the fastest batch."""
    lines = [
        "Host's microseconds a call: inference; forward with gradients; forward + backward (fastest batch)",
        "",
    ]

    def cell(each: Rows) -> str:
        times: Iterable[dict[str, float]] = (each[0][name] for name in ("inference", "forward", "both"))
        return "; ".join(f"{time['us']:.0f} ({time['best_us']:.0f})" for time in times)

    return lines + grid([row for row in part["rows"] if "both" in row], _peer, lambda row: f"M={row['M']}", cell)


SECTIONS: dict[str, Callable[[dict[str, Any], dict[str, Any]], list[str]]] = {
    "correctness": _correctness,
    "ceilings": _ceilings,
    "tune": _tune,
    "layer": _layer,
    "decode": _decode,
    "model": _model,
    "host": _host,
}
