"""Compares iLoRA with LoRA of the same size and with sequence models alone; prints a Markdown table.

    python examples/sequential_recommendation/compare.py
    python examples/sequential_recommendation/compare.py --data ml-100k --root DIR --model smollm2 --epochs 5

Without --data the users are made up (their groups follow conflicting rules), and the model is a small Llama that is
made and trained here: nothing is downloaded. All files go to the folder --out.
If you start an interrupted comparison again, it resumes where it stopped. Each seed has its own sequence models and
its own tiny language model. If you give several --lr, each arm trains with each of them and the first seed, and takes
the one that is best on the validation users for its other seeds.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __spec__ is None:  # run by path: start again as the package's module, so that its imports work
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module("sequential_recommendation.compare", run_name="__main__", alter_sys=True)
    sys.exit()

import argparse
import json
import multiprocessing
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import transformers
from tqdm import tqdm

from .arms import attempt, one_thread, perform, with_rate
from .data import Dataset, Example, Split
from .experiments import TINY, Experiment, OtherData, Run
from .files import write_whole
from .metrics import Ratio, described_ranks
from .options import arms_of, experiment_of, parse, settings_of, table_name, watch_of
from .pictures import draw
from .sequence_models import KINDS, Popularity, SequenceModel
from .sequence_training import target_ranks
from .shared import check_model, tiny_model, train_sequence
from .tables import table

LEARNING_RATES = {"ml-100k": 8e-4, "lastfm": 7e-4, "steam": 5e-4}  # the paper's, by data set
RATE = 3e-3  # the tiny model's learning rate: on the validation users better than 1e-2 (--lr tries several)


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Returns the results by arm, one for each seed. Also writes them to results.json, and the table to results.md.

    They go to a folder of their own for each setting of the training, so that one comparison never replaces another.
    """
    options, start = parse(argv, __doc__), time.perf_counter()
    experiment, settings = experiment_of(options), settings_of(options)
    jobs = options.jobs or (2 if options.model == TINY and not torch.cuda.is_available() else 1)
    if jobs > 1:
        one_thread()  # in this process too: on a busy machine two threads are slower than one

    baselines: dict[str, list[dict[str, Any]]] = {}
    try:
        dataset = experiment.dataset()
        parts, _, test = experiment.parts(dataset)
        print(f"{dataset}; {len(parts.train):,} windows to train on, {len(test)} to test", flush=True)
        if options.arms and experiment.model != TINY:
            check_model(experiment, dataset, parts, settings.curriculum is not None)
        for seed in options.seed:
            for name, figures in prepare(replace(experiment, model_seed=seed), dataset, parts, test, options).items():
                baselines.setdefault(name, []).append(figures)
    except (OSError, ValueError) as error:  # what a person can mend: files, models and sizes
        sys.exit(str(error))

    watch, fingerprint = watch_of(options, settings, len(parts.train)), experiment.fingerprint(dataset)
    runs = [Run(experiment, arm, settings, options.texts, watch, fingerprint) for arm in arms_of(options)]
    try:
        found = results_of(runs, options, jobs)
    except (OtherData, FloatingPointError) as error:
        sys.exit(str(error))

    kinds = experiment.kinds_of_tests(dataset, test)
    lines = table(f"{dataset.name}, {experiment.model}", baselines, found, kinds)
    folder = experiment.folder / table_name(settings)
    command = shlex.join(["compare.py", *(sys.argv[1:] if argv is None else argv)])
    described = {"command": command, "torch": torch.__version__, "transformers": transformers.__version__}
    described |= {"data": str(dataset), "seconds": time.perf_counter() - start}
    write_whole(folder / "results.md", lines + "\n")
    write_whole(folder / "results.json", json.dumps(described | {"baselines": baselines, "arms": found}) + "\n")
    drawn = draw(found, folder, len(parts.train) / settings.effective_batch)
    pictures = f", with {', '.join(path.name for path in drawn)}" if drawn else ""
    print(f"\n{lines}\n\n{time.perf_counter() - start:.0f} s; written to {folder}{pictures}")
    return found


def prepare(
    experiment: Experiment, dataset: Dataset, parts: Split, test: list[Example], options: argparse.Namespace
) -> dict[str, Any]:
    """Trains the models that all arms of a seed share, unless their files exist. Returns the baselines' figures."""
    models: dict[str, SequenceModel] = {"popularity": Popularity(dataset.num_items, parts.train)}
    for kind in dict.fromkeys([*options.sequence_models, *([experiment.guide] if options.arms else [])]):
        start, name = time.perf_counter(), KINDS[kind].__name__
        models[name] = train_sequence(experiment, dataset, kind)
        print(f"{name}, seed {experiment.model_seed}: {time.perf_counter() - start:.0f} s", flush=True)
    if options.arms and experiment.model == TINY:
        tiny_model(experiment, dataset, options.pretrain_steps)
    return {
        name: described_ranks(target_ranks(model, test)) | {"catalogue_ranks": target_ranks(model, test, True).tolist()}
        for name, model in models.items()
    }


def results_of(runs: Sequence[Run], options: argparse.Namespace, jobs: int) -> dict[str, list[dict[str, Any]]]:
    """The results by arm, one for each seed. runs: one run for each arm."""
    trained = [run for run in runs if run.arm.gate is not None]
    best = dict(zip([run.arm for run in trained], choose_rates(trained, options, jobs), strict=True))
    wanted = [
        with_rate(run, best.get(run.arm, 0.0), seed)
        for seed in options.seed  # all arms of a seed before the next one, so that a part of the runs is of use
        for run in runs
        if run.arm.gate or options.model == TINY or seed == options.seed[0]
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    for result in perform_all(wanted, jobs):
        found.setdefault(result["run"]["arm"]["name"], []).append(result)
    return found


def choose_rates(runs: Sequence[Run], options: argparse.Namespace, jobs: int) -> list[float]:
    """The learning rate of each run. If several were given, trains with each of them and the first seed, and chooses
    the best by validation HitRatio@1, then NDCG. Otherwise returns the one that was given, or the default."""
    rates, seed = options.lr or [], options.seed[0]
    if len(rates) < 2:
        default = RATE if options.model == TINY else LEARNING_RATES.get(options.data, 8e-4)
        return [rates[0] if rates else default] * len(runs)
    tried = iter(perform_all([with_rate(run, lr, seed) for run in runs for lr in rates], jobs, attempt))
    best = []
    for _ in runs:
        quality = {lr: tuple(next(tried)["validation"].values()) for lr in rates}
        best.append(max(rates, key=lambda lr: quality[lr]))
    return best


def perform_all(
    runs: Sequence[Run], jobs: int, how: Callable[[Run], dict[str, Any]] = perform
) -> Iterator[dict[str, Any]]:
    """Performs `jobs` runs at a time, as `how` says. Prints and yields the results in the order of the runs."""
    shown = {"total": len(runs), "desc": "runs", "leave": False, "disable": None}
    if jobs == 1:
        yield from tqdm(map(print_result, map(how, runs)), **shown)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), one_thread) as pool:
        yield from tqdm(map(print_result, pool.map(how, runs)), **shown)


def print_result(result: dict[str, Any]) -> dict[str, Any]:
    """Prints a line about the result and returns the result."""
    run, said = result["run"], result.get("diverged")
    said = said or f"HitRatio@1 {Ratio(result['hits'], result['total'])}, {result['seconds']:.0f} s"
    name = f"{run['arm']['name']}, lr {run['settings']['lr']:g}, seed {run['settings']['seed']}"
    print(f"  {name}: {said}", flush=True)
    return result


if __name__ == "__main__":
    main()
