"""What a benchmark run shows and keeps: the machine it ran on, a table for each case, a JSON file.

`python benchmarks/report.py RESULTS.json` prints the Markdown tables of a file that a benchmark wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from measure import PARTS

import ilora

PACKAGES = ("torch", "triton", "peft", "transformers")
LOAD_BEFORE = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # at import: before this program's own work


def table(title: object, rows: list[dict[str, Any]]) -> str:
    """The rows of one case, one table for each way of timing; × is the ratio to the frozen layer."""
    head = "".join(f"{part + ' ms':>13}{'×':>7}" for part in PARTS) + f"{'peak MB':>10}{'saved MB':>10}{'check':>9}"
    lines = []
    for variant in ("eager", "graph"):
        timed = [row for row in rows if variant in row]
        if timed:
            rounds = f"{timed[0][variant]['rounds']} rounds"
            lines += ["", f"{title}; {variant}, {rounds}", f"{'':18}{head}"]
        for row in timed:
            times = "".join(f"{row[variant][part]['ms']:13.3f}{row[variant][part]['ratio']:7.2f}" for part in PARTS)
            memory = f"{row['peak_bytes'] / 1e6:10.1f}{row['saved_bytes'] / 1e6:10.1f}"
            lines.append(f"{row['peer']:18}{times}{memory}{row['error_of_check']:9.0e}")
    lines += [f"{row['peer']:18}WRONG, not timed: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """Markdown of one run: a table for each dtype, rank and E, headed by them if there are several.

    Forward + backward over the frozen layer's: a row a peer, a column a shape. A cell holds one figure for each dropout
    probability, in order, "wrong" where the check refused the peer; saved MB is that of the last shape. Of a GPU report
    these are the rows of its main case, by the device's time alone. Raises ValueError for a dry run, and for a file
    without rows.
    """
    if results.get("dry_run"):
        raise ValueError("this is a dry run of gpu_report.py on a CPU: its figures mean nothing, publish none of them")
    if "parts" in results:
        rows = results["parts"].get("layer", {}).get("rows", ())
        results = {"rows": [row for row in rows if row["level"] == 0 and "graph" in row]}
    if "steps" in results:
        return _steps_markdown(results["steps"])
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in results.get("rows", ()):
        groups.setdefault((row["dtype"], row["rank"], row["experts"]), []).append(row)
    if not groups:
        raise ValueError("no rows of a layer and no steps of a model: there is no table to make")
    if len(groups) == 1:
        return _rows_markdown(*groups.values())
    tables = (f"{dtype}, R = {R}, E = {E}:\n\n{_rows_markdown(rows)}" for (dtype, R, E), rows in groups.items())
    return "\n\n".join(tables)


def _rows_markdown(rows: list[dict[str, Any]]) -> str:
    """The table of rows of one dtype, rank and E."""
    found = {(r["peer"], (r["d_in"], r["d_out"]), r["dropout"]): r for r in rows}
    peers, shapes, dropouts = (list(dict.fromkeys(part)) for part in zip(*found, strict=True))
    head = " | ".join(f"{d_in}→{d_out}" for d_in, d_out in shapes)
    lines = [f"| | {head} | saved for backward |", "|---" * (len(shapes) + 2) + "|"]
    for peer in peers:
        cells = [peer]
        for shape in shapes:
            cells.append(" / ".join(_ratio(found.get((peer, shape, p))) for p in dropouts))
        kept = (found.get((peer, shapes[-1], p)) for p in dropouts)
        saved = " / ".join("–" if row is None or "error" in row else f"{row['saved_bytes'] / 1e6:.1f}" for row in kept)
        lines.append(f"| {' | '.join(cells)} | {saved} MB |")
    return "\n".join(lines)


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if "error" in row:
        return "wrong"
    ratio = (row["graph"] if "graph" in row else row["eager"])["both"]["ratio"]
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}"


def _steps_markdown(steps: list[dict[str, Any]]) -> str:
    """Of whole training steps: a row a kind of step; a cell holds one figure for each dropout probability, in order."""
    lines = ["| | step | over the frozen model | peak memory | trained parameters |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(step["step"] for step in steps):
        own = [step for step in steps if step["step"] == name]
        seconds = " / ".join(f"{step['seconds']:.2f}" for step in own)
        ratios = " / ".join(f"{step['ratio']:.2f}" for step in own)
        peaks = " / ".join(f"{step['peak_bytes'] / 1e6:.0f}" for step in own)
        lines.append(f"| {name} | {seconds} s | {ratios} | {peaks} MB | {own[0]['trained']:,} |")
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": LOAD_BEFORE,
        "python": platform.python_version(),
        "ilora": ilora.__version__,
        **{package: _version(package) for package in PACKAGES},
        "git_commit": _git("rev-parse", "--verify", "HEAD"),
        "git_changed": None if changes is None else bool(changes),
    }


def heading(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("ilora", *PACKAGES))
    return f"{machine['device']}, {machine['threads']} threads, {machine['cpu_capability']}; {versions}"


def busy(machine: dict[str, Any]) -> str | None:
    """A warning where other work would spoil the times, else None."""
    load, cores = machine["load_before"], machine["cores"]
    if load is None or load <= cores / 2:
        return None
    return f"the machine was busy before the start (load {load:.1f} on {cores} cores): do not trust these times"


def write_json(results: dict[str, Any], file: Path) -> None:
    write_text(json.dumps(results, indent=1) + "\n", file)


def write_text(text: str, file: Path) -> None:
    with whole(file) as temporary:
        temporary.write_text(text)


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A temporary file beside it, to write to; it takes the file's name in the end, or is removed if anything fails."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        yield temporary
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _cpu() -> str:
    """The processor's name as Linux gives it, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The answer of git, or None: no git, no checkout, no commit yet."""
    try:
        folder = Path(__file__).parent
        run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


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
    parser.add_argument("file", type=Path, metavar="RESULTS.json", help="what a benchmark wrote with --json")
    options = parser.parse_args(argv)
    try:
        text = markdown(load(options.file))
    except ValueError as error:
        parser.error(str(error))
    print(text)


if __name__ == "__main__":
    main()
