"""Makes the models that the arms of a comparison share, once: the sequence models and the tiny language model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from . import sequence_models
from .data import Dataset, Split
from .experiments import PROMPTS, SMOLLM2, Experiment, unpacked
from .prompts import Prompts
from .sequence_models import SequenceModel
from .sequence_training import train_sequence_model
from .settings import TrainingSettings
from .tiny_model import pretrain, tiny_lm

MARK = "fingerprint.txt"  # the file in the tiny model's folder that holds the fingerprint of the data


def train_sequence(experiment: Experiment, dataset: Dataset, kind: str) -> SequenceModel:
    """The sequence model of an experiment. Trains it and saves it in the experiment's folder, or loads it from there.

    Raises OtherData or ValueError if it was trained on other data.
    """
    path, fingerprint = experiment.sequence_file(kind), experiment.fingerprint(dataset)
    if not path.exists():
        parts, val, _ = experiment.parts(dataset)
        model = sequence_models.build(kind, dataset.num_items, experiment.model_seed)
        train_sequence_model(model, parts.train, val, seed=experiment.model_seed)
        model.fingerprint = fingerprint
        sequence_models.save(model, path)
    model = sequence_models.load(path)
    if model.num_items != dataset.num_items:
        raise ValueError(
            f"{path}: it was trained on {model.num_items} items, {dataset.name} has {dataset.num_items}: "
            f"give another --out, or remove {experiment.folder}"
        )
    _check(experiment, path, model.fingerprint, fingerprint)
    return model


def check_model(experiment: Experiment, dataset: Dataset, parts: Split, settings: TrainingSettings) -> None:
    """Loads the language model once, before anything is trained. Raises OSError or ValueError if it is of no use."""
    if experiment.model == SMOLLM2:
        unpacked(experiment.smollm2_folder)
    try:
        lm, tokenizer = experiment.language_model(dataset)
        prompts = Prompts(tokenizer, dataset, PROMPTS[experiment.data])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--model {experiment.model}: expected a causal language model of transformers: {error}"
        ) from error
    check_room(lm, prompts, parts, settings.candidates, settings.curriculum is not None)


def check_room(lm: Any, prompts: Prompts, parts: Split, candidates: int, hybrid: bool = True) -> None:
    """Raises ValueError if a prompt of these windows may be longer than the language model's context window.

    hybrid: whether prompts have item embeddings.
    """
    room = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    histories = [window.history for part in parts for window in part]
    longest = prompts.longest(histories, candidates, hybrid)
    if room is not None and longest > room:
        raise ValueError(
            f"a prompt with {candidates} candidates may have {longest} tokens, and the language model has "
            f"room for {room}: give fewer --candidates or another --model"
        )


def tiny_model(experiment: Experiment, dataset: Dataset, steps: int) -> None:
    """Makes the tiny language model and trains it for `steps` steps at most, unless the experiment's folder has one.

    Raises OtherData if the folder has one that was made for other data.
    """
    folder, fingerprint = experiment.lm_folder, experiment.fingerprint(dataset)
    if folder.exists():
        mark = folder / MARK
        _check(experiment, folder, mark.read_text(encoding="utf-8") if mark.exists() else "", fingerprint)
        return
    start = time.perf_counter()
    tokenizer = experiment.tokenizer(dataset)
    lm = tiny_lm(tokenizer, seed=experiment.model_seed)
    prompts = Prompts(tokenizer, dataset, PROMPTS[experiment.data])
    check_room(lm, prompts, experiment.parts(dataset)[0], experiment.candidates)
    losses = pretrain(lm, prompts, steps, seed=experiment.model_seed, candidates=experiment.candidates)
    staged = folder.with_name(f".{folder.name}")
    lm.save_pretrained(staged)
    (staged / MARK).write_text(fingerprint, encoding="utf-8")
    staged.rename(folder)
    spent = f"{len(losses)} steps, {time.perf_counter() - start:.0f} s"
    print(f"tiny language model: loss {losses[0]:.2f} -> {losses[-1]:.2f}, {spent}", flush=True)


def _check(experiment: Experiment, path: Path, made_from: str, now: str) -> None:
    """Raises OtherData if the file was made from other data. Warns if it is an older file without a fingerprint."""
    if not made_from:
        print(f"{path}: does not say of which data it is; using it with the present data", file=sys.stderr, flush=True)
    experiment.check_data(path, made_from, now)
