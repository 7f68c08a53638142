"""Times an adapted linear layer, ours and its peers', against the frozen layer: `python benchmarks/bench_moe_lora.py`.

Every peer is checked against the reference first, then all are timed in interleaved rounds on random data.
× is the median, over the rounds, of a peer's time over the frozen layer's in the same round. Peak memory is what one
forward and backward allocate at most at once, y and gradients included. Saved memory is what autograd keeps in between:
x where it is kept, but not parameters (they exist anyway) and not the gate (one gate serves all layers). On a GPU all
rotate over more input than three L2 caches hold, as eager calls and as CUDA-graph replays.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import plot
import torch
from checking import WrongPeer, check
from measure import Eager, Graphed, Program, bf16_cost, input_sets, interleave, summarise
from memory import peak_bytes, saved_bytes
from peers import PEERS, Settings, make_case, unavailable
from report import busy, heading, machine, table, write_json
from tqdm import tqdm

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT = {
    "cpu": {"shapes": "576x576,576x1536,1024x1024,2048x2048", "batch": 8, "length": 256, "seconds": 2.0},
    "cuda": {"shapes": "1024x1024,2048x2048,4096x4096,4096x1024", "batch": 8, "length": 512, "seconds": 0.5},
}
QUICK = {"shapes": "576x1536", "batch": 8, "length": 64, "seconds": 0.3, "dtypes": "float32"}
DEFAULT_DTYPES = {"cpu": "float32,bfloat16", "cuda": "bfloat16"}
SLOW_BF16 = 4.0  # times the float32 product: beyond it bfloat16 is not in the default sweep


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--shapes", help="d_in x d_out, as 576x576,576x1536")
    add("--batch", type=int, help="instances, each with its own gate (default 8)")
    add("--length", type=int, help="rows of each instance (default 256; cuda 512; quick 64)")
    add("--ranks", default="8", help="total ranks R (default 8)")
    add("--experts", default="4", help="numbers of experts E (default 4)")
    add("--dtypes", help=f"of {', '.join(DTYPES)} (default: float32 and bfloat16 on a CPU, bfloat16 on a GPU)")
    add("--dropout", default="0,0.1", help="dropout probabilities (default 0,0.1)")
    add("--peers", help=f"of {', '.join(PEERS)} (default: all that run here); frozen is always timed")
    add("--seconds", type=float, help="time for each row, spent in rounds, at least three (default 2; cuda 0.5)")
    add("--repeats", type=int, default=200, help="rounds at most (default 200)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--quick", action="store_true", help="one small shape, under a minute on two cores; other options still rule")
    add("--json", type=Path, help="write settings, machine and rows to this file, after every case")
    add("--plot", type=Path, help="write a bar plot to this PNG file (needs matplotlib)")
    options = parser.parse_args(argv)
    try:
        _complete(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _complete(options: argparse.Namespace) -> None:
    """Fills in the defaults and turns texts into values; ValueError for what cannot be run."""
    options.device = arguments.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for name, value in {**DEFAULT[options.device.type], **(QUICK if options.quick else {})}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.shapes = [_shape(text) for text in options.shapes.split(",")]
    options.ranks = arguments.whole_numbers("--ranks", options.ranks)
    options.experts = arguments.whole_numbers("--experts", options.experts)
    options.dropout = arguments.probabilities("--dropout", options.dropout)
    arguments.at_least_one(**{name: getattr(options, name) for name in ("batch", "length", "repeats", "threads")})
    if not options.seconds >= 0:  # so written that nan fails
        raise ValueError(f"--seconds {options.seconds}: expected 0 or more")
    arguments.divided("--ranks", options.ranks, options.experts)
    arguments.writable("--json", options.json)
    plot.check("--plot", options.plot)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.notes = []
    options.dtypes = _dtypes(options)
    options.peers = {dtype: _peers(options, dtype) for dtype in options.dtypes}


def _shape(text: str) -> tuple[int, int]:
    d_in, x, d_out = text.partition("x")
    if not (x and d_in.strip().isdigit() and d_out.strip().isdigit() and int(d_in) and int(d_out)):
        raise ValueError(f"--shapes {text}: expected d_in x d_out, as 576x1536")
    return int(d_in), int(d_out)


def _dtypes(options: argparse.Namespace) -> list[torch.dtype]:
    names = (options.dtypes or DEFAULT_DTYPES[options.device.type]).split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise ValueError(f"--dtypes {','.join(unknown)}: expected {', '.join(DTYPES)}")
    if options.device.type == "cpu" and "bfloat16" in names and (factor := bf16_cost()) > SLOW_BF16:
        slow = f"a bfloat16 product takes {factor:.0f} times the float32 one on this CPU"
        if options.dtypes:
            options.notes.append(f"{slow}: expect long rounds")
        else:
            options.notes.append(f"{slow}: bfloat16 is left out (--dtypes bfloat16 asks for it)")
            names.remove("bfloat16")
    return [DTYPES[name] for name in names]


def _peers(options: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    asked = options.peers.split(",") if isinstance(options.peers, str) else None
    if unknown := [name for name in asked or () if name not in PEERS]:
        raise ValueError(f"--peers {','.join(unknown)}: expected {', '.join(PEERS)}")
    names = []
    for name in PEERS:
        if name != "frozen" and asked is not None and name not in asked:
            continue
        reason = unavailable(name, options.device, dtype)
        if reason is None:
            names.append(name)
        elif asked is not None:
            raise ValueError(f"--peers {name}: {reason}")
        elif (note := f"{name} is left out: {reason}") not in options.notes:
            options.notes.append(note)
    return names


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options for the JSON file."""
    peers = {str(dtype)[6:]: names for dtype, names in options.peers.items()}
    values = {**vars(options), "device": str(options.device), "dtypes": list(peers), "peers": peers}
    return {name: value for name, value in values.items() if name not in ("json", "plot")}


def cases(options: argparse.Namespace) -> list[Settings]:
    return [
        Settings(d_in, d_out, options.batch, options.length, rank, experts, dropout, dtype, options.device)
        for dtype, (d_in, d_out), rank, experts, dropout in itertools.product(
            options.dtypes, options.shapes, options.ranks, options.experts, options.dropout
        )
    ]


def run_case(settings: Settings, options: argparse.Namespace, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row for each peer; the one that the check refuses has an `error` and no times."""
    torch.compiler.reset()  # each case is a graph of its own; dynamo keeps only a few
    device, first = settings.device, make_case(settings)
    inputs = [first, *(make_case(settings, seed) for seed in range(1, input_sets(first)))]
    rows: dict[str, dict[str, Any]] = {}
    programs: dict[str, Eager] = {}
    for name in options.peers[settings.dtype]:
        say(f"checking {name}")
        peers = [PEERS[name](case) for case in inputs]
        rows[name] = row = {**settings.as_json(), "peer": name}
        try:
            row["error_of_check"] = check(peers[0], PEERS[name], first)
        except WrongPeer as error:
            row["error"] = str(error)
            continue
        parameters = [*first.constants, *peers[0].parameters]
        row["saved_bytes"] = saved_bytes(partial(peers[0].call, first.x), parameters)
        row["peak_bytes"] = peak_bytes(Eager(peers[:1], inputs[:1]).both, device)
        programs[name] = Eager(peers, inputs)
    if "frozen" not in programs:
        raise WrongPeer(f"{settings}: the frozen layer itself is wrong: {rows['frozen']['error']}")
    _time(rows, "eager", programs, device, options, say)
    if device.type == "cuda":
        _time(rows, "graph", {n: Graphed(program) for n, program in programs.items()}, device, options, say)
    return list(rows.values())


def _time(
    rows: dict[str, dict[str, Any]],
    variant: str,
    programs: Mapping[str, Program],
    device: torch.device,
    options: argparse.Namespace,
    say: Callable[[str], None],
) -> None:
    """Writes the times of the programs into their rows, under the variant's name."""
    times = interleave(programs, device, options.seconds, options.repeats, lambda n: say(f"{variant}, round {n}"))
    for name, series in times.items():
        rows[name][variant] = {"rounds": len(series), **summarise(series, times["frozen"])}


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; 1 if a peer was wrong."""
    options = parse(argv)
    results: dict[str, Any] = {"machine": machine(options.device), "settings": settings_of(options), "rows": []}
    notes = [*options.notes, busy(results["machine"])]
    print(heading(results["machine"]), *(f"note: {note}" for note in notes if note), sep="\n")
    sweep = cases(options)
    with tqdm(total=len(sweep), unit="case", disable=None) as bar:
        for settings in sweep:
            rows = run_case(settings, options, partial(_say, bar, settings))
            results["rows"] += rows
            tqdm.write(table(settings, rows), file=sys.stdout)
            bar.update()
            if options.json:
                write_json(results, options.json)
    if options.plot:
        plot.plot(results, options.plot)
    return int(any("error" in row for row in results["rows"]))


def _say(bar: tqdm, settings: Settings, what: str) -> None:
    bar.set_postfix_str(f"{settings.d_in}→{settings.d_out} p={settings.dropout:g}: {what}")


if __name__ == "__main__":
    sys.exit(main())
