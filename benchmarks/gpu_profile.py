"""Where the time of one layer goes, kernel by kernel: `python benchmarks/gpu_profile.py --strategy beta`.

torch's profiler watches replays of the layer's CUDA graphs. Beside a kernel's time stand the bytes that it must move
and its share of the roof: the least time that these bytes, or the FLOPs of the frozen product, would take at the speed
of a large copy and of a large product on this device. `--device cpu` runs the same on tiny tensors in Triton's
interpreter; its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import arguments
import pandas as pd
import torch
from checking import check
from launch_bytes import size, tensors
from launch_cases import TARGETS, launches
from launch_cases import Case as LaunchCase
from machine import machine
from measure import Program, calls, graphed, input_sets, time_once, training
from peers import PEERS, Case, Peer, Settings, make_case, ours
from report import MISSING, terminal_table, write_json
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

STRATEGIES = ("auto", "beta", "fused")  # values of ILORA_STRATEGY
REPLAYS = 20
Roofs = dict[str, float]


def build(case: Case) -> Peer:
    return ours(case, "triton")


LAYERS: dict[str, Callable[[Case], Peer]] = {"frozen": PEERS["frozen"], "ours": build}


def as_graphs(program: Program, device: torch.device) -> Program:
    """On a CPU the program itself."""
    return graphed(program) if device.type == "cuda" else program


def measure_roofs(device: torch.device) -> Roofs:
    """Bytes that a copy reads and writes a second, and FLOP/s of a large bfloat16 product."""
    small = device.type == "cpu"
    source = torch.randint(256, (2**16 if small else 2**30,), dtype=torch.uint8, device=device)
    copying = _median_seconds([partial(torch.empty_like(source).copy_, source)] * 4, device)
    side = 64 if small else 8192
    pairs = [[torch.randn(side, side, device=device).bfloat16() for _ in range(2)] for _ in range(2)]
    multiplying = _median_seconds([partial(torch.mm, *pair) for pair in pairs], device)
    return {"copy_bytes": 2 * source.nbytes / copying, "flops": 2 * side**3 / multiplying}


def _median_seconds(functions: Sequence[Callable[[], Tensor]], device: torch.device) -> float:
    program = as_graphs(calls(functions), device)
    return statistics.median(time_once(program, device)[0] for _ in range(15)) / 1e3


def profile_layer(settings: Settings, strategy: str, roofs: Roofs) -> list[dict[str, Any]]:
    """A row for each direction of the frozen layer and of ours, with its kernels, longest first."""
    first = make_case(settings)
    count = input_sets(sum(t.nbytes for t in (first.x, first.dy, first.weight)), settings.device)
    inputs = [first, *(make_case(settings, seed) for seed in range(1, count))]
    rows = []
    for name, make in LAYERS.items():
        peers = [make(case) for case in inputs]
        check(peers[0], make, first)
        program = as_graphs(training(peers, inputs), settings.device)
        program.parts[0]()
        for index, direction in enumerate(("forward", "backward")):
            kernels = profile_part(program, index, settings.device)
            moved = bytes_of_launches(settings, strategy, direction) if name == "ours" else {}
            compare_to_roofs(kernels, moved, settings, direction, roofs)
            about = {"strategy": strategy, "layer": name, "direction": direction}
            rows.append({**settings.as_json(), **about, "kernels": kernels})
    return rows


def profile_part(program: Program, index: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each kernel, longest first: its launches and its µs in one pass over the layer."""
    cuda = device.type == "cuda"
    activity, replays = (ProfilerActivity.CUDA, REPLAYS) if cuda else (ProfilerActivity.CPU, 1)
    with profile(activities=[activity], acc_events=True) as recorded:
        for _ in range(replays):
            program.parts[index]()
        if cuda:
            torch.cuda.synchronize(device)
    passes, rows = replays * program.sets, []
    for event in recorded.key_averages():
        total = event.self_device_time_total if cuda else event.self_cpu_time_total
        if total > 0:
            rows.append({"kernel": event.key[:60], "launches": event.count / passes, "us": total / passes})
    if not rows:
        raise RuntimeError("torch's profiler saw no kernel: does it find CUPTI here?")
    return sorted(rows, key=lambda row: -row["us"])


def bytes_of_launches(s: Settings, strategy: str, direction: str) -> dict[str, int]:
    """Bytes of our kernels by name, each operand of a launch once; nothing where launch_cases.py does not know the GPU.

    The launches are those that launch_cases.py lists for a GPU of this architecture.
    """
    target = "sm_90"
    if s.device.type == "cuda":
        target = "sm_{}{}".format(*torch.cuda.get_device_capability(s.device))
    if target not in TARGETS:
        return {}
    case = LaunchCase("bf16", s.rank, s.dropout, s.batch * s.length, s.d_in, s.d_out, strategy=strategy)
    found: dict[str, int] = {}
    for launch in launches(case, target)[direction == "backward"]:
        name = launch.kernel.fn.__name__
        found[name] = found.get(name, 0) + sum(size(tensor) for tensor in tensors(launch).values())
    return found


def compare_to_roofs(
    kernels: list[dict[str, Any]], moved: dict[str, int], s: Settings, direction: str, roofs: Roofs
) -> None:
    """Adds bytes, GB/s and the share of the roof to the rows of kernels whose bytes are known.

    The longest kernel is taken for the frozen product, alone or fused with the update.
    """
    M = s.batch * s.length
    read, written = (s.d_in, s.d_out) if direction == "forward" else (s.d_out, s.d_in)
    passes = 2 if moved else 1  # beside an update cuBLAS reads what it adds to
    product = s.dtype.itemsize * (M * read + s.d_in * s.d_out + M * written * passes)
    for index, row in enumerate(kernels):
        own = moved.get(row["kernel"], product if index == 0 else None)
        if own is None:
            continue
        least = own / roofs["copy_bytes"]
        if index == 0:
            least = max(least, 2 * M * s.d_in * s.d_out / roofs["flops"])
        seconds = row["us"] / 1e6
        row |= {"bytes": own, "gb_per_s": own / seconds / 1e9, "share_of_roof": least / seconds}


def kernels_table(row: dict[str, Any]) -> str:
    """The kernels of one layer and direction, for the terminal."""
    total = sum(kernel["us"] for kernel in row["kernels"])
    title = f"{row['layer']}, {row['direction']}, {row['d_in']}→{row['d_out']}, M = {row['batch'] * row['length']}"
    title += f", R = {row['rank']}, p = {row['dropout']:g}, strategy {row['strategy']}: {total:.1f} µs"
    lines = []
    for kernel in row["kernels"]:
        line = {"": kernel["kernel"], "launches": f"{kernel['launches']:.3g}", "µs": f"{kernel['us']:.2f}"}
        if "bytes" in kernel:
            line |= {"MB": f"{kernel['bytes'] / 1e6:.2f}", "GB/s": f"{kernel['gb_per_s']:.0f}"}
            line["of the roof"] = f"{kernel['share_of_roof']:.0%}"
        lines.append(line)
    return f"\n{title}\n{terminal_table(pd.DataFrame(lines).fillna(MISSING))}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", type=arguments.device, default="cuda")
    add("--strategy", choices=STRATEGIES, default="auto")
    add("--widths", type=arguments.counts, default="1024,4096", help="d_in and d_out of layers (default 1024,4096)")
    add("--json", type=arguments.new_file, help="write machine and rows to this file")
    options = parser.parse_args(argv)
    os.environ["ILORA_STRATEGY"] = options.strategy
    dry = options.device.type == "cpu"
    dtype = torch.float16 if dry else torch.bfloat16  # the interpreter's bfloat16 arithmetic is wrong
    roofs = measure_roofs(options.device)
    print(f"a copy moves {roofs['copy_bytes'] / 1e9:.0f} GB/s, a product runs at {roofs['flops'] / 1e12:.3g} TFLOP/s")
    results: dict[str, Any] = {"machine": machine(options.device), "roofs": roofs, "rows": []}
    for width, p in itertools.product(options.widths, (0.0, 0.1)):
        settings = Settings(width, width, 8, 9 if dry else 512, 16, 4, p, dtype, options.device)
        rows = profile_layer(settings, options.strategy, roofs)
        results["rows"] += rows
        print(*map(kernels_table, rows), sep="\n", flush=True)
        if options.json:
            write_json(results, options.json)


if __name__ == "__main__":
    main()
