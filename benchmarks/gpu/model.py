"""A whole training step by bench_model.py's code: as many layers of Llama-3-8B's shape as fit, and SmolLM2-135M's."""

from __future__ import annotations

import importlib.util
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import bench_model
import torch
from memory import peak_bytes

from .arms import using
from .machine import Machine, reason_of

KEPT = 0.90  # of the free memory is planned with: the rest is for what is not foreseen
RUNS = (  # shape, gradient checkpointing, dropouts, in order of importance
    ("llama3-8b", True, (0.1,)),
    ("llama3-8b", False, (0.1,)),
    ("smollm2", False, (0.0, 0.1)),
    ("llama3-8b", False, (0.0,)),
    ("llama3-8b", True, (0.0,)),
    ("smollm2", True, (0.1,)),
)


def measure(
    here: Machine, quick: bool, left: Callable[[], float], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The part: a row for each shape, checkpointing, dropout and kind of step."""
    part: dict[str, Any] = {"rows": [], "unavailable": {}, "left_out": []}
    kinds = list(bench_model.STEPS)
    for package, needed in (("transformers", kinds[:]), ("peft", ["peft"])):
        if importlib.util.find_spec(package) is None:
            part["unavailable"] |= dict.fromkeys(needed, f"{package} is not installed")
            kinds = [kind for kind in kinds if kind not in needed]
    longest = 0.0
    for shape, checkpointing, dropouts in RUNS[:2] if quick else RUNS:
        label = f"{shape}{', checkpointing' if checkpointing else ''}, p = {'/'.join(map(str, dropouts))}"
        if not kinds:
            break
        if left() < max(longest, 0.001):
            part["left_out"].append(f"no time for {label}")
            continue
        start = time.monotonic()
        try:
            part["rows"] += _run(here, shape, checkpointing, dropouts, kinds, 3 if quick else 7)
        except Exception as error:  # another shape may well run
            part["rows"].append({"shape": shape, "checkpointing": checkpointing, "error": reason_of(error)})
        longest = max(longest, time.monotonic() - start)
        keep(part)
    return part


def options_of(here: Machine, shape: str, checkpointing: bool, rounds: int) -> Namespace:
    """bench_model's own options."""
    if here.dry:
        shape = "tiny"
    batch, length = (2, 8) if here.dry else (8, 512)
    options = bench_model.parse([])
    options.model, options.device, options.dtype, options.checkpointing = shape, here.device, "bfloat16", checkpointing
    options.batch, options.length, options.rank, options.rounds = batch, length, 16, 1 if here.dry else rounds
    return options


def _run(
    here: Machine, shape: str, checkpointing: bool, dropouts: tuple[float, ...], kinds: list[str], rounds: int
) -> list[dict[str, Any]]:
    """Rows of one shape; a model that does not fit after all is tried again with fewer layers."""
    options = options_of(here, shape, checkpointing, rounds)
    whole = bench_model.SHAPES[options.model]["num_hidden_layers"]
    options.layers = fitting(here, options, dropouts[-1], kinds) if shape == "llama3-8b" else whole
    while True:
        here.tidy()
        try:
            rows = _steps(options, dropouts, kinds)
            break
        except torch.OutOfMemoryError:
            if options.layers < 2:
                raise
            options.layers = max(options.layers * 3 // 4, 1)
    about = {"shape": shape, "layers": options.layers, "of_layers": whole, "checkpointing": checkpointing}
    about |= {"batch": options.batch, "length": options.length, "rank": options.rank}
    return [about | row for row in rows]


def _steps(options: Namespace, dropouts: tuple[float, ...], kinds: list[str]) -> list[dict[str, Any]]:
    base = bench_model.make_model(options)
    with using("auto"):
        return [row for p in dropouts for row in bench_model.measure(options, p, kinds, base)]


def fitting(here: Machine, options: Namespace, dropout: float, kinds: list[str]) -> int:
    """Layers whose weights, kept once, and whose hungriest step fit the free memory: measured on one layer and on two.

    The hungriest is PEFT's, or ours without it.
    """
    kind = "peft" if "peft" in kinds else kinds[-1]
    whole = bench_model.SHAPES[options.model]["num_hidden_layers"]
    free = here.free_bytes()
    weights, peaks = [], []
    for layers in (1, 2):
        trial = Namespace(**{**vars(options), "layers": layers})
        weight, peak = _needs(here, trial, dropout, kind)
        weights.append(weight)
        peaks.append(peak)
    each = (weights[1] - weights[0]) + max(peaks[1] - peaks[0], 0)
    fixed = weights[0] + peaks[0] - each
    return int(min(max((free * KEPT - fixed) // each, 1), whole))


def _needs(here: Machine, options: Namespace, dropout: float, kind: str) -> tuple[int, int]:
    """Bytes of the weights, and the most that a step allocates on top of them."""
    here.tidy()
    base = bench_model.make_model(options)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (options.batch, options.length), device=options.device)
    with using("auto"):
        step, _ = bench_model.STEPS[kind](bench_model.twin(base, options), options, dropout, ids)
        bench_model.timed(step, options.device)
        peak = peak_bytes(partial(bench_model.timed, step, options.device), options.device)
    return sum(parameter.nbytes for parameter in base.parameters()), peak
