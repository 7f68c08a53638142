"""Times an adapted linear layer, ours and its peers', against the frozen layer: `python benchmarks/bench_moe_lora.py`.

Each peer is checked against the reference before it is timed, on random data, forward and backward. The factor beside a
time (×) is the median over interleaved rounds of that time over the frozen layer's in the same round. Peak memory is
the most that one forward and backward allocate at once, y and gradients included. Saved memory is what autograd keeps
between the two: x where it is kept, but not parameters (they exist anyway) and not the gate (all layers share it).
A second table shows what one call of a small layer costs. Without options this takes about a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import torch
from checking import check, check_inference
from lora_peers import LORA_PEERS
from machine import busy, heading, machine
from measure import BASELINE, Program, attempt, calls, input_sets, tidy, time_rows, training
from memory import peak_bytes, saved_bytes
from peers import INFERENCE_PEERS, MODULES, PEERS, Case, Peer, Settings, make_case, unavailable
from report import calls_table, case_table, plot, write_json
from tqdm import tqdm

Build = Callable[[Case], Peer]
Say = Callable[[str], None]
TRAINING_PEERS: dict[str, Build] = PEERS | LORA_PEERS
ALL_PEERS = TRAINING_PEERS | INFERENCE_PEERS
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # without such instructions most peers take minutes
DEFAULTS = {  # by device, and whether --full was given: shapes, length, seconds, dtypes
    ("cpu", False): ("576x1536", "64", 0.3, "float32"),
    ("cpu", True): ("576x576,576x1536,1024x1024,2048x2048", "256", 2.0, "float32" + ",bfloat16" * HAS_BFLOAT16),
    ("cuda", False): ("1024x1024,4096x4096", "512", 0.2, "bfloat16"),
    ("cuda", True): ("1024x1024,2048x2048,4096x4096,4096x1024", "512", 0.5, "bfloat16"),
}
SMALL_CALLS = ((1, 64, 64), (16, 576, 576))  # rows, d_in, d_out of the layers whose calls are timed
LONGER = "A longer run over more shapes, five to nine minutes on two CPU cores: add --full. All options: --help."


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--full", action="store_true", help="more shapes, rows and time; other options still take precedence")
    add("--device", type=arguments.device, default=default_device, help="cpu or cuda (default: cuda if there is one)")
    add("--shapes", type=arguments.shapes, help="d_in x d_out, as 576x576,576x1536")
    add("--batch", type=arguments.counts, default="8", help="numbers of instances, each with its own gate (default 8)")
    add("--length", type=arguments.counts, help="rows of each instance (default 64; with --full 256; on cuda 512)")
    add("--ranks", type=arguments.counts, default="8", help="total ranks R (default 8)")
    add("--experts", type=arguments.counts, default="4", help="numbers of experts E (default 4)")
    add(
        "--dtypes",
        help=f"some of {', '.join(DTYPES)} (default float32, on cuda bfloat16)",
    )
    add("--dropout", type=arguments.probabilities, help="dropout probabilities (default 0,0.1)")
    add("--peers", help=f"some of {', '.join(ALL_PEERS)}, besides frozen (default: all that run here; "
        f"on a CPU without {', '.join(LORA_PEERS)})")  # fmt: skip
    add("--inference", action="store_true", help="time forward alone, without gradients and dropout")
    add("--seconds", type=arguments.number, help="how long to time each peer of a case (default 0.3; with --full 2)")
    add("--repeats", type=arguments.count, default=200, help="rounds at most (default 200)")
    add("--threads", type=arguments.count, help="CPU threads (default: torch's)")
    add("--no-calls", action="store_true", help="leave out the table of what one call costs")
    add("--json", type=arguments.new_file, help="write settings, machine and rows to this file, after every case")
    add("--plot", type=arguments.plot_file, help="draw bars into this PNG file (needs matplotlib)")
    options = parser.parse_args(argv)
    try:
        _complete(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _complete(options: argparse.Namespace) -> None:
    """Fills in the defaults; ValueError for what cannot run."""
    shapes, length, seconds, dtypes = DEFAULTS[options.device.type, options.full]
    options.shapes = options.shapes or arguments.shapes(shapes)
    options.length = options.length or arguments.counts(length)
    options.seconds = seconds if options.seconds is None else options.seconds
    if options.inference and options.dropout is not None:
        raise ValueError("--inference has no dropout: leave --dropout out")
    options.dropout = options.dropout or ([0.0] if options.inference else [0.0, 0.1])
    if not options.seconds >= 0:  # also true for NaN
        raise ValueError(f"--seconds {options.seconds}: expected 0 or more")
    for rank, experts in itertools.product(options.ranks, options.experts):
        if rank % experts:
            raise ValueError(f"--ranks {rank} --experts {experts}: the experts must divide the rank evenly")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.notes = []
    options.dtypes = _dtypes(options.dtypes or dtypes)
    options.peers = {dtype: _peers(options, dtype) for dtype in options.dtypes}


def _dtypes(text: str) -> list[torch.dtype]:
    names = text.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise ValueError(f"--dtypes {','.join(unknown)}: expected {', '.join(DTYPES)}")
    return [DTYPES[name] for name in names]


def _peers(options: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    known = PEERS | INFERENCE_PEERS if options.inference else TRAINING_PEERS
    asked = options.peers.split(",") if isinstance(options.peers, str) else None
    if unknown := [name for name in asked or () if name not in known]:
        raise ValueError(f"--peers {','.join(unknown)}: expected {', '.join(known)}")
    names, default = [], PEERS if options.device.type == "cpu" and not options.inference else known
    for name in known:
        if name not in (default if asked is None else (BASELINE, *asked)):
            continue
        trouble = unavailable(name, options.device, dtype, asked is not None)
        if trouble is None:
            names.append(name)
        elif asked is not None:
            raise ValueError(f"--peers {name}: {trouble}")
        elif (note := f"{name} is left out: {trouble}") not in options.notes:
            options.notes.append(note)
    return names


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options for the JSON file."""
    peers = {str(dtype)[6:]: names for dtype, names in options.peers.items()}
    values = {**vars(options), "device": str(options.device), "dtypes": list(peers), "peers": peers}
    return {name: value for name, value in values.items() if name not in ("json", "plot")}


def cases(options: argparse.Namespace) -> list[Settings]:
    o = options
    every = itertools.product(o.dtypes, o.shapes, o.batch, o.length, o.ranks, o.experts, o.dropout)
    return [
        Settings(d_in, d_out, batch, length, rank, experts, dropout, dtype, o.device)
        for dtype, (d_in, d_out), batch, length, rank, experts, dropout in every
    ]


def run_case(settings: Settings, options: argparse.Namespace, say: Say) -> list[dict[str, Any]]:
    """One row for each peer. A peer that is wrong or does not run has an "error" and no times.

    Where the frozen layer itself is among those, nobody has times.
    """
    torch.compiler.reset()  # each case compiles a graph of its own, and torch.compile keeps only a few
    tidy(settings.device)
    first = make_case(settings)
    size = sum(tensor.nbytes for tensor in (first.x, first.dy, first.weight, first.A, first.B))
    inputs = [first, *(make_case(settings, seed) for seed in range(1, input_sets(size, settings.device)))]
    builders = {name: ALL_PEERS[name] for name in options.peers[settings.dtype]}
    return _measure(builders, inputs, options.inference, options.seconds, options.repeats, say)


def _measure(
    builders: dict[str, Build], inputs: list[Case], inference: bool, seconds: float, repeats: int, say: Say
) -> list[dict[str, Any]]:
    prepare, settings = prepare_inference if inference else prepare_training, inputs[0].settings
    rows: dict[str, dict[str, Any]] = {}
    programs: dict[str, Program] = {}
    for name, build in builders.items():
        say(f"checking {name}")
        rows[name] = {**settings.as_json(), "peer": name}
        program = attempt(rows[name], "error", partial(prepare, build, inputs, rows[name]))
        if program is not None:
            programs[name] = program
    with torch.set_grad_enabled(not inference):
        time_rows(rows, programs, settings.device, seconds, repeats, say)
    return list(rows.values())


def prepare_training(build: Build, inputs: list[Case], row: dict[str, Any]) -> Program:
    """The peer's forward and backward over all inputs, checked; its memory goes into the row."""
    first, peers = inputs[0], _peers_of(build, inputs)
    row["error_of_check"] = check(peers[0], build, first)
    row["saved_bytes"] = saved_bytes(partial(peers[0].call, first.x), [*first.constants, *peers[0].parameters])
    row["peak_bytes"] = peak_bytes(training(peers[:1], inputs[:1]).run, first.settings.device)
    return training(peers, inputs)


def prepare_inference(build: Build, inputs: list[Case], row: dict[str, Any]) -> Program:
    """The peer's forward without gradients over all inputs, checked."""
    peers = _peers_of(build, inputs)
    row["error_of_check"] = check_inference(peers[0], inputs[0])
    return calls([partial(peer.call, case.x.detach()) for peer, case in zip(peers, inputs, strict=True)])


def _peers_of(build: Build, inputs: list[Case]) -> list[Peer]:
    """A peer for each input; the same one where an input comes again."""
    built = {id(case): build(case) for case in {id(case): case for case in inputs}.values()}
    return [built[id(case)] for case in inputs]


def call_costs(device: torch.device) -> list[dict[str, Any]]:
    """What one call of a small layer costs in one thread, as a module of a model, in float32. Rows as of run_case.

    So few rows take almost no arithmetic. Python, checks and autograd decide, as they do when a model generates text.
    """
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for count, d_in, d_out in SMALL_CALLS:
        case = make_case(Settings(d_in, d_out, 1, count, 8, 4, 0.0, torch.float32, device))
        builders = {name: build for name, build in MODULES.items() if not unavailable(name, device, torch.float32)}
        for inference in (True, False):
            rows += _measure(builders, [case] * 50, inference, 0.2, 60, lambda what: None)
    torch.set_num_threads(threads)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; 1 if a peer was wrong, or the frozen layer or ours did not run."""
    options = parse(argv)
    results: dict[str, Any] = {"machine": machine(options.device), "settings": settings_of(options), "rows": []}
    notes = [*options.notes, busy(results["machine"])]
    print(heading(results["machine"]), *(f"note: {note}" for note in notes if note), sep="\n")
    sweep = cases(options)
    with tqdm(total=len(sweep), unit="case", disable=None) as bar:
        for settings in sweep:
            rows = run_case(settings, options, lambda what: bar.set_postfix_str(what))
            results["rows"] += rows
            tqdm.write(case_table(settings, rows), file=sys.stdout)
            bar.update()
            _keep(results, options.json)
    if not (options.no_calls or options.inference):
        results["calls"] = call_costs(options.device)
        print(calls_table(results["calls"]))
        _keep(results, options.json)
    if options.plot:
        plot(results, options.plot)
    if not options.full:
        print(f"\n{LONGER}")
    return int(any(map(_counts_as_failure, results["rows"] + results.get("calls", []))))


def _counts_as_failure(row: dict[str, Any]) -> bool:
    """Another's layer may fail to run here; what computes something wrong, or is ours, may not."""
    problem = row.get("error", "") + row.get("graph_error", "")
    return bool(problem) and (row["peer"].startswith((BASELINE, "ilora")) or "WrongPeer" in problem)


def _keep(results: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        write_json(results, file)


if __name__ == "__main__":
    sys.exit(main())
