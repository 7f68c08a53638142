#!/usr/bin/env python3
"""Compiles every Triton kernel as it would be launched, for GPUs that are not here, and counts the bytes it moves.

    python benchmarks/kernel_report.py [--targets sm_80,sm_90,sm_100,gfx942] [--ranks 8,16,64,128,256] [--json FILE]

The launches are those of the backend's own plans (kernels/triton/plans.py and grouped_plans.py) on meta tensors, so the
report cannot drift from what runs. Exit status 1 if a kernel spills registers or needs more shared memory than its
target has, if it writes registers that a running wgmma uses (register_check.py), or if fused_layer does not load by
tensor descriptor and multiply on the tensor cores where the target has both. emulated_layers.py runs the kernels. For
another Triton, `pip install --target DIR triton==3.6.0`, and set PYTHONPATH=DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from launch_bytes import least, moved, size, tensors
from launch_cases import DTYPES, KIB, TARGETS, Case, cases, launches
from launch_compile import compile_all, job, title

KERNEL_NAMES = (
    "shrink", "gate_ranks", "expand", "grad_dy", "grad_weights", "sums", "fused_layer", "decode",
    "grouped_shrink", "grouped_expand", "grouped_grad_weights", "slot_sums",
)  # fmt: skip


def bytes_report(case: Case, target: str) -> dict[str, Any]:
    """Bytes if each launch reads each operand once from memory, bytes that programs read from L2, and the fewest."""
    row: dict[str, Any] = {"case": case._asdict(), "target": target}
    minima = least(case, *(dtype.itemsize for dtype in DTYPES[case.dtypes]))
    for part, plan, minimum in zip(("forward", "backward"), launches(case, target), minima, strict=True):
        unique = sum(size(t) for launch in plan for t in tensors(launch).values())
        row[part] = {"launches": len(plan), "asked": sum(map(moved, plan)), "unique": unique, "least": minimum}
    return row


def report(every: list[Case], targets: list[str], names: list[str], processes: int) -> dict[str, Any]:
    """Prints both tables. Returns what --json keeps."""
    plans = [(target, launch) for target in targets for case in every for part in launches(case, target)
             for launch in part]  # fmt: skip
    jobs = dict.fromkeys(job(launch, target) for target, launch in plans if launch.kernel.fn.__name__ in names)
    rows = []
    for each, usage in compile_all(list(jobs), processes):
        limit = TARGETS[each.target][2]
        bad = usage["spills"] > 0 or usage["shared"] > limit or bool(usage["missing"] or usage["early_writes"])
        row: dict[str, Any] = {"target": each.target, "kernel": title(each), "warps": each.warps, "stages": each.stages}
        rows.append(row | usage | {"limit": limit, "bad": bad, "constants": {k: str(v) for k, v in each.constants}})
    print(
        f"\n{'target':8}{'kernel':44}{'warps':>6}{'stages':>7}{'registers':>11}{'spills':>8}{'shared':>9}{'of KiB':>8}"
    )
    for r in rows:
        remarks = ["too much"] * (r["spills"] > 0 or r["shared"] > r["limit"]) + [f"no {name}" for name in r["missing"]]
        remarks += ["registers written while wgmma uses them:"] * bool(r["early_writes"])
        print(f"{r['target']:8}{r['kernel']:44}{r['warps']:6}{r['stages']:7}{r['registers']:11}{r['spills']:8}"
              f"{r['shared']:9}{r['limit'] // KIB:8}{'  <-- ' * r['bad']}{', '.join(remarks)}",
              *r["early_writes"], sep="\n    ")  # fmt: skip
    traffic = [bytes_report(case, target) for target in targets for case in every]
    heading = "MB moved, without cuBLAS's frozen product: the fewest"
    print(f"\n{heading}; × if launches read operands once; × as programs read them from L2")
    for t in traffic:
        usual = (("token", False), ("strategy", "beta"), ("slots", 0))
        case = " ".join(f"{k}={v}" for k, v in t["case"].items() if (k, v) not in usual)
        line = f"{t['target']:8}{case:62}"
        for part in (part for part in ("forward", "backward") if t[part]["launches"]):
            count, least_bytes, once, asked = (t[part][key] for key in ("launches", "least", "unique", "asked"))
            line += f"{part:>9} {count}: {least_bytes / 1e6:7.1f} {once / least_bytes:5.2f} {asked / least_bytes:5.2f}"
        print(line)
    worst = [r for r in rows if r["bad"]]
    print(
        f"\n{len(rows)} kernels, {len(worst)} with spills, too much shared memory, missing instructions or early writes"
    )
    return {"kernels": rows, "bytes": traffic, "bad": len(worst)}


def _list(text: str) -> list[str]:
    return text.split(",")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=_list, default=list(TARGETS), help=f"of {','.join(TARGETS)}")
    parser.add_argument("--ranks", type=lambda t: [int(r) for r in _list(t)], default=[8, 16, 64])
    parser.add_argument("--dtypes", type=_list, default=list(DTYPES), help=f"of {','.join(DTYPES)}")
    parser.add_argument("--kernels", type=_list, default=list(KERNEL_NAMES), help=f"of {','.join(KERNEL_NAMES)}")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--json", type=Path, help="keep the tables in this file")
    options = parser.parse_args()
    for name, known in (("targets", TARGETS), ("dtypes", DTYPES), ("kernels", KERNEL_NAMES)):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: {','.join(sorted(unknown))} is none of {','.join(known)}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: kernels for the interpreter cannot be compiled; unset it")
    every = cases(options.ranks, options.dtypes)
    results = report(every, options.targets, options.kernels, options.processes)
    if options.json:
        temporary = options.json.with_name(options.json.name + ".tmp")  # the file is complete or absent
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(options.json)
    return int(results["bad"] > 0)


if __name__ == "__main__":
    sys.exit(main())
