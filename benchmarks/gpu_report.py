#!/usr/bin/env python3
"""Checks and times the GPU kernels, all of them, on the CUDA device that is here: `python benchmarks/gpu_report.py`.

Correctness first; where it fails nothing is timed without --force. Then, on random data that no cache holds, as eager
calls and as CUDA-graph replays: what the device can do, our GEMMs' tiles (what wins is in force from there on, unless
ILORA_TABLE names a table), adapted layers against the frozen layer and every peer, decoding, whole training steps, the
host's cost of a call. The JSON is whole after every part, so that a run which is ended keeps what it has; a run with
--only adds its parts to the report that is there. OUT/gpu-DEVICE/ gets report.json, report.md, strategy-table.json (for
ILORA_TABLE: which strategy won) and plots. --device cpu goes through every part on tiny tensors, to try the program
itself: its figures mean nothing. Exit status: 0; 1 if something was wrong; 2 without a GPU, or for arguments that
cannot be.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import torch
from gpu import ceilings, correctness, decode, host, layer, model, plan, tune
from gpu import results as files
from gpu.budget import PARTS, Budget
from gpu.machine import Machine, backend_of, facts, machine_of
from gpu.markdown import summary

MINUTES, QUICK_MINUTES = 8.0, 2.0
Keep = Callable[[dict[str, Any]], None]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", metavar="PART", choices=PARTS, default=list(PARTS), help=f"of {', '.join(PARTS)}")
    add("--out", type=Path, default=gpu.ROOT / "benchmarks" / "results", help="folder (default benchmarks/results)")
    add("--quick", action="store_true", help="fewer shapes, ranks and rounds")
    add("--minutes", type=float, help=f"what to fit in, by leaving out (default {MINUTES:g}; quick {QUICK_MINUTES:g})")
    add("--force", action="store_true", help="time even what is wrong")
    add("--peer-path", type=Path, action="append", default=[], metavar="DIR", help="holds unsloth or lorafusion")
    add("--processes", type=int, help="that check and compile side by side (default: cores less two, at most 12)")
    add("--device", type=torch.device, default=torch.device("cuda"), help="cuda (default), or cpu for a dry run")
    add("--commit", help="what was checked out, for the report, where there is no git to ask")
    add("--render", type=Path, metavar="JSON", help="only write Markdown, table and plots of this report again")
    options = parser.parse_args(argv)
    options.only = [part for part in PARTS if part in options.only]  # in the order they run
    options.minutes = (QUICK_MINUTES if options.quick else MINUTES) if options.minutes is None else options.minutes
    if options.minutes <= 0 or (options.processes or 0) < 0:
        parser.error("--minutes: expected more than 0, and --processes 0 or more")
    for folder in options.peer_path:
        if not folder.is_dir():
            parser.error(f"--peer-path {folder}: no such folder")
    if options.processes is None:
        options.processes = 0 if options.device.type == "cpu" else min(max((os.cpu_count() or 1) - 2, 1), 12)
    return options


def parts_of(here: Machine, options: argparse.Namespace) -> dict[str, Callable[[Callable[[], float], Keep], Any]]:
    """Each part as a function of (seconds left, what keeps it halfway)."""
    dtype = torch.bfloat16
    if here.dry:  # what the interpreter computes, or else the native kernels
        dtype = torch.float16 if backend_of(here.device, torch.float16) == "triton" else torch.float32
    sizes = plan.TINY if here.dry else plan.QUICK if options.quick else plan.FULL
    quick, processes = options.quick, options.processes
    return {
        "correctness": lambda left, keep: correctness.measure(here, quick, processes, left),
        "ceilings": lambda left, keep: ceilings.measure(here),
        "tune": lambda left, keep: tune.measure(
            here, plan.layers(sizes, dtype, here.device), quick, processes, left, keep
        ),
        "layer": lambda left, keep: layer.measure(here, plan.layers(sizes, dtype, here.device), processes, left, keep),
        "decode": lambda left, keep: decode.measure(here, dtype, quick, left, keep),
        "model": lambda left, keep: model.measure(here, quick, left, keep),
        "host": lambda left, keep: host.measure(here, dtype),
    }


def run(here: Machine, options: argparse.Namespace, results: dict[str, Any], folder: Path) -> bool:
    """Fills results["parts"], saved after each; whether all went well."""
    budget, functions = Budget(60.0 * options.minutes, options.only), parts_of(here, options)
    well, own_table = True, bool(os.environ.get("ILORA_TABLE"))
    for name in options.only:
        if not own_table:
            put_in_force(results, folder)
        start = budget.spent()

        def keep(part: dict[str, Any], name: str = name, start: float = start) -> None:
            results["parts"][name] = {**part, "seconds": budget.spent() - start}
            files.save(results, folder)

        def left(name: str = name) -> float:
            return budget.left(name)

        print(f"{budget.spent():6.1f} s: {name}", flush=True)
        checked = results["parts"].get("correctness", {})
        doubt = "correctness" in options.only and name != "correctness" and not _well("correctness", checked)
        if doubt and not options.force:
            rows, failed = len(checked.get("rows", ())), checked.get("failed", 0)
            found = checked.get("error") or f"{failed} findings in {rows} checks"
            keep({"left_out": [f"correctness failed ({found}); --force measures all the same"]})
            continue
        try:
            here.tidy()
            keep(functions[name](left, keep))
        except Exception as error:  # the other parts may well run; this one's reason is in the report and shown here
            traceback.print_exc()
            keep({**results["parts"].get(name, {}), "error": f"{type(error).__name__}: {error}"[:1000]})
        rendered = _rendered(results, folder, plots=False)
        well = well and rendered is not None and _well(name, results["parts"][name])
    return well


def put_in_force(results: dict[str, Any], folder: Path) -> None:
    """The table of the tiles that won, once they were tried and it was written."""
    file = folder / "strategy-table.json"
    if results["parts"].get("tune", {}).get("rows") and not results["dry_run"] and file.exists():
        os.environ["ILORA_TABLE"] = str(file.resolve())


def _rendered(results: dict[str, Any], folder: Path, plots: bool) -> list[str] | None:
    """Names of the files made of the JSON; None if that failed, which must not end the measuring: --render remains."""
    try:
        return files.render(results, folder, plots)
    except Exception:
        traceback.print_exc()
        return None


def _well(name: str, part: dict[str, Any]) -> bool:
    wrong = "error" in part or part.get("failed", 0) > 0
    if name == "correctness" and not part.get("rows"):
        wrong = True  # nothing was checked
    if name == "tune":
        return not wrong  # a tile that does not run is a finding
    return not wrong and not any("error" in row or "graph_error" in row for row in part.get("rows", ()))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        if options.render:
            results = files.load(options.render)
            print(*files.render(results, options.render.parent), sep="\n")
            return 0
        here = machine_of(options.device)
        sys.path[:0] = [str(folder.resolve()) for folder in options.peer_path]
        results = {"kind": "gpu_report", "dry_run": here.dry, "machine": facts(here), "settings": _settings(options)}
        if options.commit:
            results["machine"]["git_commit"] = options.commit
        results["started"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        folder = files.folder_of(options.out, results["machine"], here.dry)
        results["parts"] = {} if here.dry else files.earlier_parts(folder / "report.json", results)
        for part in options.only:
            results["parts"].pop(part, None)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"gpu_report.py: {error}", file=sys.stderr)
        return 2
    files.save(results, folder)
    well = run(here, options, results, folder)
    rendered = _rendered(results, folder, plots=True)
    written = ["report.json", *(rendered or ["nothing else: making the rest of it failed"])]
    print(summary(results), f"{folder}: {', '.join(written)}", sep="\n")
    if here.dry:
        print("A dry run: every part was gone through, no figure means anything.")
    return 0 if well and rendered is not None else 1


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("only", "quick", "minutes", "force", "processes")
    return {"device": str(options.device), **{name: getattr(options, name) for name in names}}


if __name__ == "__main__":
    sys.exit(main())
