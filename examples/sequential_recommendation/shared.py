"""Makes the models that the arms of a comparison share, once: the sequence models and the tiny language model."""

from __future__ import annotations

import time
from typing import Any

from . import sequence_models
from .data import Dataset, Split
from .experiments import PROMPTS, Experiment
from .prompts import Prompts
from .sequence_models import SequenceModel
from .sequence_training import train_sequence_model
from .tiny_model import pretrain, tiny_lm, tiny_tokenizer

MARK = "fingerprint.txt"  # the file in the tiny model's folder that holds the fingerprint of the data


def train_sequence(experiment: Experiment, dataset: Dataset, kind: str) -> SequenceModel:
    """The sequence model of an experiment. Trains it and saves it in the experiment's folder, or loads it from there.

    Raises OtherData if it was trained on other data.
    """
    path, fingerprint = experiment.sequence_file(kind), experiment.fingerprint(dataset)
    if not path.exists():
        parts, val, _ = experiment.parts(dataset)
        model = sequence_models.build(kind, dataset.num_items, experiment.model_seed)
        train_sequence_model(model, parts.train, val, seed=experiment.model_seed)
        model.fingerprint = fingerprint
        sequence_models.save(model, path)
    model = sequence_models.load(path)
    experiment.check_data(path, model.fingerprint, fingerprint)
    return model


def check_model(experiment: Experiment, dataset: Dataset, parts: Split, hybrid: bool) -> None:
    """Loads the language model once, before anything is trained. Raises OSError or ValueError if it is of no use."""
    try:
        lm, tokenizer = experiment.language_model(dataset)
        prompts = Prompts(tokenizer, dataset, PROMPTS[experiment.data])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--model {experiment.model}: expected a causal language model of transformers: {error}"
        ) from error
    check_room(lm, prompts, parts, experiment.candidates, hybrid)


def check_room(lm: Any, prompts: Prompts, parts: Split, candidates: int, hybrid: bool) -> None:
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
        experiment.check_data(folder, (folder / MARK).read_text(encoding="utf-8"), fingerprint)
        return
    start = time.perf_counter()
    tokenizer = tiny_tokenizer(dataset, PROMPTS[experiment.data])
    lm = tiny_lm(tokenizer, seed=experiment.model_seed)
    prompts = Prompts(tokenizer, dataset, PROMPTS[experiment.data])
    check_room(lm, prompts, experiment.parts(dataset)[0], experiment.candidates, hybrid=True)
    losses = pretrain(lm, prompts, steps, seed=experiment.model_seed, candidates=experiment.candidates)
    staged = folder.with_name(f".{folder.name}")
    lm.save_pretrained(staged)
    (staged / MARK).write_text(fingerprint, encoding="utf-8")
    staged.rename(folder)
    spent = f"{len(losses)} steps, {time.perf_counter() - start:.0f} s"
    print(f"tiny language model: loss {losses[0]:.2f} -> {losses[-1]:.2f}, {spent}", flush=True)
