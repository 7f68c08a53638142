"""Reads the options of `compare.py` and makes the experiment, the settings and the arms that they ask for."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from .data import NUM_CANDIDATES, PROTOCOLS
from .experiments import MADE_UP, PROMPTS, SMOLLM2, TINY, Arm, Experiment
from .recommender import RecommenderConfig
from .sequence_models import KINDS
from .training import PRECISIONS, WITHOUT_EFFECT, TrainingSettings

STEPS, TESTS, BATCH, PRETRAINING = 900, 600, 32, 800  # defaults for made-up users and the tiny model
WIDE = RecommenderConfig.r + 1
MOST_SEED = 2**32 - 1  # numpy's limit; the Trainer seeds numpy too
ARMS = ("untuned", "lora", "lora-wide", "lora+z", "sequence", "shuffled", "random", "prompt")


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """An argparse type: an integer from `least` to `most`."""
    expected = f"a whole number of {least} or more" if most == math.inf else f"a whole number from {least} to {most}"

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return int(text)

    return read


def real(zero: bool) -> Callable[[str], float]:
    """An argparse type: a finite number above zero. zero: whether zero is allowed as well."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
            raise argparse.ArgumentTypeError(f"expected a number {'of 0 or more' if zero else 'above 0'}, got {text!r}")
        return number

    return read


def parse(argv: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    """The options. Ends the program with status 2 if any are wrong, contradict each other or would be ignored."""
    parser = made_parser(description)
    options = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("a launcher started several processes, which would do the same runs; start one, with --jobs")
    made_up = options.data == MADE_UP
    if (options.root is None) != made_up:
        parser.error("--root goes with --data, and --data of files needs it")
    idle = {"min_users": made_up, "plain": made_up, "users": not made_up, "pretrain_steps": options.model != TINY}
    for name, means_nothing in idle.items():
        if means_nothing and getattr(options, name) != parser.get_default(name):
            why = f"--model {options.model}" if name == "pretrain_steps" else f"--data {options.data}"
            parser.error(f"--{name.replace('_', '-')}: means nothing with {why}")
    for name in ("arms", "experts", "seed", "lr", "sequence_models"):
        values = getattr(options, name) or []
        if len(set(values)) < len(values):
            parser.error(f"--{name.replace('_', '-')}: given more than once: {' '.join(map(str, values))}")
    if uneven := [E for E in options.experts if RecommenderConfig.r % E]:
        parser.error(f"--experts {uneven[0]}: the rank is {RecommenderConfig.r}, which the experts must divide evenly")
    if options.tests is None:
        options.tests = tests_of(options.data)
    options.batch_size = options.batch_size or (BATCH if options.model == TINY else 8)
    options.effective_batch = options.effective_batch or (options.batch_size if options.model == TINY else 128)
    if options.effective_batch % options.batch_size:
        got = f"{options.effective_batch} and {options.batch_size}"
        parser.error(f"--effective-batch: expected a multiple of --batch-size, got {got}")
    if options.patience and not options.watch:
        parser.error("--patience: needs --watch, the steps between two rankings of validation examples")
    if options.batch_size < 2 and "shuffled" in options.arms:
        parser.error("--arms shuffled: expected a --batch-size of 2 or more, examples of a batch exchange their z")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the pictures need matplotlib: pip install 'ilora[bench]'")
    if options.model not in (TINY, SMOLLM2) and Path(options.model).is_dir():
        options.model = os.path.abspath(options.model)  # so that its runs can be used from any folder
    return options


def tests_of(data: str) -> int:
    """The default of --tests: 0 is all."""
    return TESTS if data == MADE_UP else 0


def made_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=tuple(PROMPTS), default=MADE_UP)
    add("--root", type=Path, help="folder of the raw files (readers.py says which)")
    add("--plain", action="store_true", help="drop the year from titles and put the article in front")
    add("--min-users", type=whole(1), default=1, help="drop items that fewer users met (try 20 for Steam)")
    add("--users", type=whole(1), default=Experiment.users, help="how many to make up (%(default)s)")
    protocols = "who is trained on and tested (data.py); default: leave-one-out for made-up users, else paper"
    add("--protocol", choices=PROTOCOLS, help=protocols)
    tests = f"number of validation and of test examples (default: {TESTS}; of files 600 at most, and all)"
    add("--tests", type=whole(0), help=tests)
    add("--model", default=TINY, help=f"{TINY}, {SMOLLM2}, or a folder or name for transformers")
    add("--pretrain-steps", type=whole(1), default=PRETRAINING, help="most steps of the tiny model (%(default)s)")
    add("--guide", choices=tuple(KINDS), default="sasrec", help="the sequence model whose z the gate sees")
    add("--sequence-models", nargs="*", choices=tuple(KINDS), default=list(KINDS), help="sequence models to compare")
    add("--arms", nargs="*", choices=ARMS, default=list(ARMS[:-1]), help="what each is: see the README; may be none")
    add("--candidates", type=whole(2), default=NUM_CANDIDATES, metavar="N", help="of each example (%(default)s)")
    add("--experts", type=whole(1), nargs="+", default=[4], help="of the sequence gate; other gates take the first")
    add("--seed", nargs="+", type=whole(0, MOST_SEED), default=[0, 1, 2, 3, 4])
    rates = "one learning rate for all arms, or several from which each arm chooses (see above)"
    add("--lr", nargs="+", type=real(zero=False), help=rates)
    long = parser.add_mutually_exclusive_group().add_argument
    long("--epochs", type=real(zero=False), help=f"default: 5; for made-up users {STEPS} steps")
    long("--steps", type=whole(1), help="instead of epochs")
    add("--batch-size", type=whole(1), help="examples computed at once")
    add("--effective-batch", type=whole(1), help="examples in a step, a multiple of --batch-size")
    hybrid = parser.add_mutually_exclusive_group().add_argument
    hybrid("--curriculum", type=real(zero=True), help="share of the steps over which item embeddings come in")
    hybrid("--text-only", action="store_true", help="no item embeddings in the prompts")
    add("--precision", choices=PRECISIONS, default="fp32")
    add("--jobs", type=whole(1), help="runs at a time, each a process (default: 2 with the tiny model, else 1)")
    add("--save-steps", type=whole(0), default=0, help="steps between checkpoints, from which a killed run resumes")
    watch = "steps between rankings of validation examples (default: three times in all for made-up users, else never)"
    add("--watch", type=whole(0), help=watch)
    patience = "end once so many rankings in a row are no better, and take the best weights (default: train to the end)"
    add("--patience", type=whole(1), help=patience)
    add("--texts", action="store_true", help="let the model also write its answers, and judge them")
    add("--out", type=Path, default=Path("recommender-comparison"))
    return parser


def experiment_of(options: argparse.Namespace) -> Experiment:
    protocol = options.protocol or ("leave-one-out" if options.data == MADE_UP else "paper")
    names = ("data", "users", "min_users", "tests", "model", "plain", "guide", "candidates")
    marks = {
        f"{options.users}-users": options.users != Experiment.users,
        f"min-{options.min_users}": options.min_users != Experiment.min_users,
        "plain": options.plain,
        f"{options.tests}-tests": options.tests != tests_of(options.data),
        f"{options.candidates}-candidates": options.candidates != NUM_CANDIDATES,
        f"{options.pretrain_steps}-pretrained": options.pretrain_steps != PRETRAINING,
    }
    name = [options.data, protocol, Path(options.model).name, *(mark for mark, differs in marks.items() if differs)]
    folder = options.out / "-".join(name)  # named for all that decides the models that its runs share
    root = options.root and options.root.resolve()
    return Experiment(folder, root, protocol=protocol, **{name: getattr(options, name) for name in names})


def settings_of(options: argparse.Namespace) -> TrainingSettings:
    in_words = options.text_only or (options.model == TINY and options.curriculum is None)
    curriculum = 1.0 if options.curriculum is None else options.curriculum
    steps = STEPS if options.data == MADE_UP and options.epochs is None else 0
    return TrainingSettings(
        epochs=options.epochs or TrainingSettings.epochs,
        steps=options.steps or steps,
        batch_size=options.batch_size,
        effective_batch=options.effective_batch,
        curriculum=None if in_words else curriculum,
        precision=options.precision,
        save_steps=options.save_steps,
        patience=options.patience or 0,
        candidates=options.candidates,
    )


def table_name(settings: TrainingSettings) -> str:
    """The name of a folder: the length of the training, and a hash of the settings but for seed and learning rate."""
    deciding = {name: value for name, value in asdict(settings).items() if name not in ("seed", "lr", *WITHOUT_EFFECT)}
    key = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:6]
    return f"{settings.steps}-steps-{key}" if settings.steps else f"{settings.epochs:g}-epochs-{key}"


def watch_of(options: argparse.Namespace, settings: TrainingSettings, windows: int) -> int:
    """The steps between two rankings of validation examples, 0 for none. windows: the number of training windows."""
    if options.watch is not None or options.data != MADE_UP:
        return options.watch or 0
    total = settings.steps or math.ceil(settings.epochs * math.ceil(windows / settings.effective_batch))
    return total // 3


def arms_of(options: argparse.Namespace) -> list[Arm]:
    first = options.experts[0]
    every = {
        "untuned": [Arm("LM untuned", None)],
        "lora": [Arm("LoRA", "uniform")],
        # One rank has more parameters than a gate, so this is the lowest rank with no fewer parameters than iLoRA.
        "lora-wide": [Arm(f"LoRA, rank {WIDE}", "uniform", rank=WIDE)],
        "lora+z": [Arm("LoRA, z as a soft prompt", "uniform", soft_prompt=True)],
        "sequence": [Arm(f"iLoRA, E={E}, sequence gate", "sequence", E) for E in options.experts],
        "shuffled": [Arm(f"iLoRA, E={first}, z shuffled", "shuffled", first)],
        "random": [Arm(f"iLoRA, E={first}, random gate", "random", first)],
        "prompt": [Arm(f"iLoRA, E={first}, prompt gate", "prompt", first)],
    }
    return [arm for name in options.arms for arm in every[name]]
