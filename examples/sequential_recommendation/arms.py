"""One row of a comparison: an arm (which gate, how many experts) trained and tested with one seed.

Everything that a run needs is made again from an `Experiment`, so that runs can go to processes of their own.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

import ilora

from . import sequence_models
from .data import Dataset, Example, Split, frequent, split, with_candidates
from .metrics import hit_ratio, ndcg, text_ratios
from .prompts import Choice, Prompts
from .readers import READERS, plain_titles
from .recommender import Recommender, RecommenderConfig
from .scoring import gates, score, write
from .sequence_models import SequenceModel
from .synthetic import synthetic
from .tastes import tastes
from .tiny_model import tiny_tokenizer
from .training import TrainingSettings, train

PROMPTS = {"synthetic": "neutral", "tastes": "neutral", "ml-100k": "movies", "lastfm": "artists", "steam": "games"}
MADE_UP: dict[str, Callable[..., Dataset]] = {"synthetic": synthetic, "tastes": tastes}
TINY, SMOLLM2 = "tiny", "smollm2"
WATCHED = "validation_hit_ratio"


@dataclass(frozen=True)
class Arm:
    """A row of the table. gate: as in `RecommenderConfig`; None: the language model as it is, not trained."""

    name: str
    gate: str | None
    num_experts: int = 1


@dataclass(frozen=True)
class Experiment:
    """What all arms of a comparison share. folder holds the trained sequence model and the tiny language model.

    model: "tiny", "smollm2", or whatever transformers loads a causal language model from. users: how many are made up.
    tests: how many of the test examples, 0 for all. plain: titles as `readers.plain_titles` makes them.
    """

    folder: Path
    data: str = "synthetic"
    root: Path | None = None
    users: int = 600
    min_users: int = 1
    protocol: Literal["paper", "leave-one-out"] = "leave-one-out"
    evaluate: Literal["last", "random"] = "last"
    exclude: Literal["user", "window"] = "window"
    data_seed: int = 0
    model: str = TINY
    tests: int = 0
    plain: bool = False

    def dataset(self) -> Dataset:
        """Raises OSError or ValueError where the raw files are missing or damaged."""
        if self.data in MADE_UP:
            return MADE_UP[self.data](self.users, seed=self.data_seed)
        if self.root is None:
            raise ValueError(f"--data {self.data} needs --root, the folder of its files")
        dataset = READERS[self.data](self.root)
        dataset = plain_titles(dataset) if self.plain else dataset
        return dataset if self.min_users == 1 else frequent(dataset, items=self.min_users)

    def parts(self, dataset: Dataset) -> tuple[Split, list[Example], list[Example]]:
        """(split, validation examples, test examples)"""
        parts = split(dataset, self.data_seed, self.protocol, self.evaluate)
        val, test = (with_candidates(part, dataset, self.data_seed, self.exclude) for part in parts[1:])
        return parts, val[: self.tests or None], test[: self.tests or None]

    @property
    def sequence_file(self) -> Path:
        return self.folder / "sequence.safetensors"

    @property
    def lm_folder(self) -> Path:
        return self.folder / "tiny-lm"

    def language_model(self, dataset: Dataset) -> tuple[Any, Any]:
        """(model, tokenizer), fresh, on the GPU where there is one."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        if self.model == TINY:
            lm, tokenizer = AutoModelForCausalLM.from_pretrained(self.lm_folder), self.tokenizer(dataset)
        elif self.model == SMOLLM2:
            lm, tokenizer = importlib.import_module("smollm2_text").load(None)  # the example beside this package
        else:
            lm = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(self.model)
        return lm.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer

    def tokenizer(self, dataset: Dataset) -> Any:
        """The tiny model's."""
        return tiny_tokenizer(dataset, PROMPTS[self.data])


class Run(NamedTuple):
    """An arm with a seed and its settings, which hold the seed too. texts: whether answers are generated as well.
    watch: the validation examples are ranked every so many steps, 0: only after the last."""

    experiment: Experiment
    arm: Arm
    settings: TrainingSettings
    texts: bool = True
    watch: int = 0

    @property
    def file(self) -> Path:
        """Where its result is kept, by everything that decides it."""
        name = self.arm.name.lower().replace(",", "").replace(" ", "-")
        return self.experiment.folder / "runs" / name / f"lr{self.settings.lr:g}-seed{self.settings.seed}.json"

    @property
    def folder(self) -> Path:
        """Where its recommender is kept, and on the way its checkpoints."""
        return self.file.with_suffix("")

    @property
    def choice(self) -> Choice:
        """How examples are put in its evaluation."""
        return Choice(0, hybrid=self.arm.gate is not None and self.settings.curriculum is not None)

    def described(self) -> dict[str, Any]:
        """All that decides its result, JSON-able."""
        found = {"arm": asdict(self.arm), "settings": asdict(self.settings), "texts": self.texts, "watch": self.watch}
        return found | {"experiment": {key: str(value) for key, value in asdict(self.experiment).items()}}


def perform(run: Run) -> dict[str, Any]:
    """Trains and tests; the result is JSON-able, and kept in run.file, from which it is read the next time.

    A kept result of other settings is made again; a run that was killed goes on from its last checkpoint, if
    settings.save_steps made it write some. Raises whatever training and the files raise.
    """
    described = run.described()
    if run.file.exists():
        kept: dict[str, Any] = json.loads(run.file.read_text(encoding="utf-8"))
        if kept["run"] == described:
            return kept
    start = time.perf_counter()
    dataset = run.experiment.dataset()
    parts, val, test = run.experiment.parts(dataset)
    lm, tokenizer = run.experiment.language_model(dataset)
    prompts = Prompts(tokenizer, dataset, PROMPTS[run.experiment.data])
    sequence_model = sequence_models.load(run.experiment.sequence_file).to(lm.device)
    torch.manual_seed(run.settings.seed)
    gate = run.arm.gate or "uniform"
    model = Recommender(lm, sequence_model, RecommenderConfig(gate=gate, num_experts=run.arm.num_experts)).eval()
    log: list[dict[str, float]] = []
    if run.arm.gate is not None:
        curve = Curve(model, prompts, val, run)
        log = train(model, prompts, parts.train, run.settings, run.folder, checkpoint_of(run), [curve])
        model.save(run.folder / "recommender")
        for done in run.folder.glob("checkpoint-*"):
            shutil.rmtree(done)
    found = {"run": described, "training_seconds": time.perf_counter() - start}
    found |= measure(model, prompts, val, test, run)
    found["losses"] = [entry["loss"] for entry in log if "loss" in entry]
    found["curve"] = [(int(entry["step"]), entry[WATCHED]) for entry in log if WATCHED in entry]
    found["seconds"] = time.perf_counter() - start
    text = json.dumps(found, indent=1) + "\n"
    write_whole(run.file, text)
    return json.loads(text)  # as the next time


def checkpoint_of(run: Run) -> Path | None:
    """The last whole checkpoint of a run that was killed; those of other settings are removed."""
    described, written = json.dumps(run.described(), indent=1), run.folder / "run.json"
    if run.folder.exists() and not (written.exists() and written.read_text(encoding="utf-8") == described):
        shutil.rmtree(run.folder)
    write_whole(written, described)
    whole = [path.parent for path in run.folder.glob("checkpoint-*/trainer_state.json")]  # the Trainer's last file
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


class Curve(TrainerCallback):
    """Ranks the validation examples on the way; the figures stand in the Trainer's log, and so in its checkpoints."""

    def __init__(self, model: Recommender, prompts: Prompts, val: list[Example], run: Run) -> None:
        self.model, self.prompts, self.val, self.run = model, prompts, val, run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run.watch and state.global_step % self.run.watch == 0:
            _, rank = score(self.model, self.prompts, self.val, self.run.choice, 4 * self.run.settings.batch_size)
            state.log_history.append({"step": state.global_step, WATCHED: hit_ratio(rank).value})


def measure(model: Recommender, prompts: Prompts, val: list[Example], test: list[Example], run: Run) -> dict[str, Any]:
    """The figures of a trained model, JSON-able."""
    size, choice = 4 * run.settings.batch_size, run.choice
    _, val_rank = score(model, prompts, val, choice, size)
    _, rank = score(model, prompts, test, choice, size)
    found: dict[str, Any] = {
        "validation": {"hit_ratio": hit_ratio(val_rank).value, "ndcg": ndcg(val_rank, 20)},
        "hits": hit_ratio(rank).hits,
        "total": len(test),
        "hit_ratio_5": hit_ratio(rank, 5).value,
        "ndcg_5": ndcg(rank, 5),
        "trainable": sum(p.numel() for p in model.lm.parameters() if p.requires_grad),
    }
    if run.texts:
        valid, text_hits = text_ratios(write(model, prompts, test, choice, size), test, prompts.dataset.titles)
        found["texts"] = {"valid": valid.hits, "hits": text_hits.hits}
    if run.arm.gate not in (None, "uniform"):
        gate = gates(model, prompts, test, choice)
        stats = ilora.gate_stats(gate)
        found["gate"] = {"entropy": stats.entropy, "usage": stats.usage, "weights": rounded(gate)}
        groups = [prompts.dataset.groups.get(example.user) for example in test]
        if None not in groups and run.arm.gate == "sequence":
            found["gate"] |= exchanged(model, prompts, test, choice, gate, groups, size)
    return found


def rounded(gate: Tensor) -> list[list[float]]:
    """[N, E] with four places."""
    return [[round(weight, 4) for weight in row] for row in gate.tolist()]


def exchanged(
    model: Recommender,
    prompts: Prompts,
    test: list[Example],
    choice: Choice,
    gate: Tensor,
    groups: Sequence[int | None],
    size: int,
) -> dict[str, Any]:
    """What the gate tells the model: the hit ratios when each user is given the gate of somebody else."""
    draw, N = random.Random(0), range(len(test))
    same = [draw.choice([j for j in N if groups[j] == groups[i]]) for i in N]
    other = [draw.choice([j for j in N if groups[j] != groups[i]]) for i in N]
    names = sorted({group for group in groups if group is not None})
    means = {k: gate[[i for i in N if groups[i] == k]].mean(0) for k in names}
    given = {
        "own_group": gate[same],
        "other_group": gate[other],
        "group_mean": torch.stack([means[group] for group in groups if group is not None]),
        "uniform": torch.full_like(gate, 1 / gate.shape[-1]),
    }
    ratios = {name: hit_ratio(score(model, prompts, test, choice, size, g)[1]).value for name, g in given.items()}
    return {"by_group": [means[k].tolist() for k in names], "with_gate_of": ratios}


def write_whole(path: Path, text: str) -> None:
    """The file appears with all of the text or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def train_sequence(experiment: Experiment, dataset: Dataset, seed: int = 0) -> SequenceModel:
    """The SASRec of an experiment: trained and kept in its folder, or read from there."""
    from .sequence_training import train_sequence_model

    if not experiment.sequence_file.exists():
        parts, val, _ = experiment.parts(dataset)
        model = sequence_models.build("sasrec", dataset.num_items, seed)
        train_sequence_model(model, parts.train, val, seed=seed)
        sequence_models.save(model, experiment.sequence_file)
    return sequence_models.load(experiment.sequence_file)


def one_thread() -> None:
    """A worker's first act: small models gain nothing from threads, and workers would fight for the cores."""
    torch.set_num_threads(1)
    sys.stdout.flush()


def with_rate(run: Run, lr: float, seed: int) -> Run:
    return run._replace(settings=replace(run.settings, lr=lr, seed=seed))
