"""Compares iLoRA with LoRA of the same size, and with what guides its gate; prints a Markdown table.

    python examples/sequential_recommendation/compare.py
    python examples/sequential_recommendation/compare.py --data ml-100k --root DIR --model smollm2 --epochs 5

Without --data the users are made up (their groups follow conflicting rules) and the model is a small Llama, made and
trained here: nothing is downloaded, and two CPU cores need some minutes. Everything is kept in the folder --out: an
interrupted comparison goes on where it was. With several --lr each arm is trained with each, and has the one that is
best on the validation users; its other seeds follow with that one.
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
import importlib.util
import json
import multiprocessing
import shlex
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import transformers

from .arms import one_thread, perform, with_rate
from .data import Dataset
from .experiments import (
    MADE_UP,
    PROMPTS,
    SMOLLM2,
    TINY,
    Arm,
    Experiment,
    Run,
    train_sequence,
    unpacked,
    write_whole,
)
from .metrics import Ratio, candidate_scores, popularity, ranks
from .pictures import draw
from .prompts import Prompts
from .sequence_models import KINDS
from .sequence_training import candidate_ranks
from .settings import LEARNING_RATES, RecommenderConfig, TrainingSettings
from .tables import described_ranks, table
from .tiny_model import pretrain, tiny_lm

STEPS, BATCH, PRETRAINING = 300, 32, 800  # of the tiny model
RATE = 3e-3  # of the tiny model; the better of 3e-3 and 1e-2 by the validation users (--lr tries several)
ARMS = ("untuned", "lora", "sequence", "random", "prompt")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=tuple(PROMPTS), default="synthetic")
    add("--root", type=Path, help="folder of the raw files (readers.py says which)")
    add("--plain", action="store_true", help="titles without year and with the article in front")
    add("--min-users", type=int, default=1, help="drop items that fewer users met (try 20 for Steam)")
    add("--users", type=int, default=600, help="how many to make up")
    add("--protocol", choices=("paper", "leave-one-out"), help="default: leave-one-out for made-up users, else paper")
    add("--evaluate", choices=("last", "random"), default="last", help="which window of a validation or test user")
    add("--tests", type=int, default=0, help="validate and test on so many examples only (default: all)")
    add("--model", default=TINY, help=f"{TINY}, {SMOLLM2}, or a folder or name for transformers")
    add("--pretrain-steps", type=int, default=PRETRAINING, help="of the tiny model, at most")
    add("--guide", choices=tuple(KINDS), default="sasrec", help="the sequence model whose z the gate sees")
    add("--sequence-models", nargs="*", choices=tuple(KINDS), default=list(KINDS), help="rows of their own")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--experts", type=int, nargs="+", default=[4], help="of the sequence gate; the others' is the first")
    add("--seed", nargs="+", type=int, default=[0, 1, 2])
    add("--lr", nargs="+", type=float, help="one rate for all arms, or several for each to choose from (see above)")
    add("--gate-lr", type=float, default=0.3, help="the gate's, as a factor")
    add("--epochs", type=float, default=5)
    add("--steps", type=int, help="instead of epochs")
    add("--batch-size", type=int, help="examples at once")
    add("--effective-batch", type=int, help="examples of a step")
    add("--curriculum", type=float, help="part of the steps over which prompts with item embeddings come in")
    add("--text-only", action="store_true", help="no item embeddings in the prompts")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    add("--workers", type=int, default=0, help="of the data loader")
    add("--jobs", type=int, help="runs at a time, in processes of their own (default: 2 with the tiny model, else 1)")
    add("--save-steps", type=int, default=0, help="a checkpoint every so often, from which a killed run goes on")
    add("--watch", type=int, help="rank validation examples every so many steps (default: thrice, for made-up users)")
    add("--no-texts", action="store_true", help="do not generate answers")
    add("--out", type=Path, default=Path("recommender-comparison"))
    options = parser.parse_args(argv)
    if (options.root is None) != (options.data in MADE_UP):
        parser.error("--root goes with --data, and --data of files needs it")
    if uneven := [E for E in options.experts if E < 1 or RecommenderConfig.r % E]:
        parser.error(f"--experts {uneven[0]}: the rank is {RecommenderConfig.r}, which the experts must divide evenly")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the pictures need matplotlib: pip install 'ilora[bench]'")
    return options


def experiment_of(options: argparse.Namespace) -> Experiment:
    protocol: Any = options.protocol or ("leave-one-out" if options.data in MADE_UP else "paper")
    names = ("data", "root", "users", "min_users", "evaluate", "model", "tests", "plain", "guide")
    marks = {
        f"{options.users}-users": options.data in MADE_UP and options.users != Experiment.users,
        f"min-{options.min_users}": options.min_users != Experiment.min_users,
        "plain": options.plain,
        options.evaluate: options.evaluate != Experiment.evaluate,
        f"{options.tests}-tests": options.tests != Experiment.tests,
        f"{options.pretrain_steps}-pretrained": options.model == TINY and options.pretrain_steps != PRETRAINING,
    }
    name = [options.data, protocol, Path(options.model).name, *(mark for mark, differs in marks.items() if differs)]
    folder = options.out / "-".join(name)  # by all that decides the models that its runs share
    return Experiment(folder, protocol=protocol, **{name: getattr(options, name) for name in names})


def settings_of(options: argparse.Namespace) -> TrainingSettings:
    tiny = options.model == TINY
    batch = options.batch_size or (BATCH if tiny else 8)
    curriculum = 1.0 if options.curriculum is None else options.curriculum
    return TrainingSettings(
        epochs=options.epochs,
        steps=options.steps if options.steps is not None else STEPS if options.data in MADE_UP else 0,
        gate_lr=options.gate_lr,
        batch_size=batch,
        effective_batch=options.effective_batch or (batch if tiny else 128),
        curriculum=None if options.text_only or (tiny and options.curriculum is None) else curriculum,
        workers=options.workers,
        precision=options.precision,
        progress=False,
        logging_steps=10,
        save_steps=options.save_steps,
    )


def arms_of(options: argparse.Namespace) -> list[Arm]:
    first = options.experts[0]
    every = {
        "untuned": [Arm("LM untuned", None)],
        "lora": [Arm("LoRA", "uniform")],
        "sequence": [Arm(f"iLoRA, E={E}, sequence gate", "sequence", E) for E in options.experts],
        "random": [Arm(f"iLoRA, E={first}, random gate", "random", first)],
        "prompt": [Arm(f"iLoRA, E={first}, prompt gate", "prompt", first)],
    }
    return [arm for name in options.arms for arm in every[name]]


def prepare(experiment: Experiment, dataset: Dataset, kinds: Sequence[str], pretrain_steps: int) -> dict[str, Any]:
    """Trains what all arms share and is not there yet. Returns the figures of the baselines."""
    parts, _, test = experiment.parts(dataset)
    print(f"{dataset}; {len(parts.train):,} windows to train on, {len(test)} to test", flush=True)
    models = {}
    for kind in dict.fromkeys([*kinds, experiment.guide]):
        start = time.perf_counter()
        models[kind] = train_sequence(experiment, dataset, kind)
        print(f"{KINDS[kind].__name__}: {time.perf_counter() - start:.0f} s", flush=True)
    if experiment.model == TINY and not experiment.lm_folder.exists():
        start = time.perf_counter()
        tokenizer = experiment.tokenizer(dataset)
        lm = tiny_lm(tokenizer)
        losses = pretrain(lm, Prompts(tokenizer, dataset, PROMPTS[experiment.data]), pretrain_steps)
        staged = experiment.lm_folder.with_name(".tiny-lm")
        lm.save_pretrained(staged)
        staged.rename(experiment.lm_folder)
        spent = f"{len(losses)} steps, {time.perf_counter() - start:.0f} s"
        print(f"tiny language model: loss {losses[0]:.2f} -> {losses[-1]:.2f}, {spent}", flush=True)
    if experiment.model == SMOLLM2:
        unpacked(experiment.smollm2_folder)
    counts = popularity(parts.train, dataset.num_items).expand(len(test), -1)
    found = {"popularity": described_ranks(ranks(*candidate_scores(counts, test)))}
    return found | {
        KINDS[kind].__name__: described_ranks(candidate_ranks(model, test)) for kind, model in models.items()
    }


def performed(runs: Sequence[Run], jobs: int) -> Iterator[dict[str, Any]]:
    """The results in the order of the runs, so many of which go on at a time."""
    if jobs == 1:
        yield from map(shown, map(perform, runs))
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), one_thread) as pool:
        yield from map(shown, pool.map(perform, runs))


def shown(result: dict[str, Any]) -> dict[str, Any]:
    run = result["run"]
    print(
        f"  {run['arm']['name']}, lr {run['settings']['lr']:g}, seed {run['settings']['seed']}: "
        f"HitRatio@1 {Ratio(result['hits'], result['total'])}, {result['seconds']:.0f} s",
        flush=True,
    )
    return result


def choose_rates(runs: Sequence[Run], options: argparse.Namespace, jobs: int) -> list[float]:
    """Each run's learning rate: of several that were given, its arm's best by validation HitRatio@1 (then NDCG) with
    the first seed; else the one given, or the default."""
    rates, seed = options.lr or [], options.seed[0]
    if len(rates) < 2:
        default = RATE if options.model == TINY else LEARNING_RATES.get(options.data, 8e-4)
        return [rates[0] if rates else default] * len(runs)
    tried = iter(performed([with_rate(run, lr, seed) for run in runs for lr in rates], jobs))
    best = []
    for _ in runs:
        quality = {lr: tuple(next(tried)["validation"].values()) for lr in rates}
        best.append(max(rates, key=lambda lr: quality[lr]))
    return best


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Returns the results by arm, one for each seed; they are in results.json as well, the table in results.md."""
    options, start = parse(argv), time.perf_counter()
    experiment, settings = experiment_of(options), settings_of(options)
    jobs = options.jobs or (2 if options.model == TINY and not torch.cuda.is_available() else 1)
    if jobs > 1:
        one_thread()  # here too: two threads on a busy machine are slower than one
    try:
        dataset = experiment.dataset()
        baselines = prepare(experiment, dataset, options.sequence_models, options.pretrain_steps)
    except (OSError, ValueError) as error:
        sys.exit(f"--data {options.data}: {error}")
    watch = options.watch if options.watch is not None else settings.steps // 3 if options.data in MADE_UP else 0
    runs = [Run(experiment, arm, settings, not options.no_texts, watch) for arm in arms_of(options)]
    trained = [run for run in runs if run.arm.gate is not None]
    best = dict(zip([run.arm for run in trained], choose_rates(trained, options, jobs), strict=True))
    wanted = [
        with_rate(run, best.get(run.arm, 0.0), seed)
        for run in runs
        for seed in (options.seed if run.arm.gate else options.seed[:1])
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    for result in performed(wanted, jobs):
        found.setdefault(result["run"]["arm"]["name"], []).append(result)
    lines = table(f"{dataset.name}, {experiment.model}", baselines, found)
    command = shlex.join(["compare.py", *(sys.argv[1:] if argv is None else argv)])
    described = {"command": command, "torch": torch.__version__, "transformers": transformers.__version__}
    described |= {"data": str(dataset), "seconds": time.perf_counter() - start}
    write_whole(experiment.folder / "results.md", lines + "\n")
    write_whole(
        experiment.folder / "results.json", json.dumps(described | {"baselines": baselines, "arms": found}) + "\n"
    )
    parts, _, test = experiment.parts(dataset)
    groups = [dataset.groups[example.user] for example in test] if dataset.groups else None
    drawn = draw(found, experiment.folder, len(parts.train) / settings.effective_batch, groups)
    names = ", ".join(path.name for path in drawn)
    print(f"\n{lines}\n\n{time.perf_counter() - start:.0f} s; kept in {experiment.folder}, with {names}")
    return found


if __name__ == "__main__":
    main()
