"""Trains and tests one arm of a comparison (which gate, how many experts) with one seed."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

import ilora

from . import sequence_models
from .data import Example
from .experiments import PROMPTS, Run
from .files import write_whole
from .metrics import described_ranks, hit_ratio, ndcg, text_ratios
from .prompts import Choice, Prompts
from .recommender import Recommender
from .scoring import gates, score, shortlist_ranks, write
from .shared import check_room
from .training import checkpoints, last_checkpoint, train

CURVE_KEY, STOP_KEY = "validation_hit_ratio", "validation_ndcg"  # of the curve's values in the Trainer's log
CURVE_EXAMPLES = 200  # validation examples that are ranked for a point of the curve
VALIDATION = 600  # the most that are ranked after training: a large model would take as long for them as for the tests


def perform(run: Run) -> dict[str, Any]:
    """Trains and tests the arm. Returns the result, JSON-able, and writes it to run.file; the next call reads it there.

    A run that was killed resumes from its last checkpoint, if settings.save_steps made it write checkpoints.
    Raises OtherData if the files of the run were made from other data, FloatingPointError if training diverges, and
    whatever training and the files raise.
    """
    result = attempt(run)
    if "diverged" in result:
        raise FloatingPointError(f"{run.arm.name}, lr {run.settings.lr:g}: {result['diverged']}")
    return result


def attempt(run: Run) -> dict[str, Any]:
    """As `perform`, but the result of a training that diverges is worse than any other, and has the key "diverged"."""
    if run.file.exists():
        result = json.loads(run.file.read_text(encoding="utf-8"))
        run.experiment.check_data(run.file, result["run"]["fingerprint"], run.fingerprint)
        return result
    try:
        found = _trained_and_measured(run)
    except FloatingPointError as error:
        worst = {"hit_ratio": -1.0, "ndcg": -1.0}
        found = {"run": run.described(), "validation": worst, "diverged": str(error)}
    text = json.dumps(found, indent=1) + "\n"
    write_whole(run.file, text)
    return json.loads(text)  # exactly what the next call reads from the file


def _trained_and_measured(run: Run) -> dict[str, Any]:
    start = time.perf_counter()
    dataset = run.experiment.dataset()
    parts, val, test = run.experiment.parts(dataset)
    val = val[:VALIDATION]
    lm, tokenizer = run.experiment.language_model(dataset)
    if run.settings.precision == "bf16-frozen":
        lm = lm.to(torch.bfloat16)
        if lm.device.type == "cpu":
            lm.set_attn_implementation("eager")  # its backward takes less than half of what torch's flash takes there
    prompts = Prompts(tokenizer, dataset, PROMPTS[run.experiment.data], run.arm.soft_prompt)
    check_room(lm, prompts, parts, run.settings.candidates, run.settings.curriculum is not None)
    sequence_model = sequence_models.load(run.experiment.sequence_file(run.experiment.guide)).to(lm.device)
    torch.manual_seed(run.settings.seed)
    model = Recommender(lm, sequence_model, run.recommender).eval()
    if run.settings.precision == "bf16-frozen":
        ilora.share_inputs(model.lm)
    model.encoder.standardise([window.history for window in parts.train])
    log: list[dict[str, float]] = []
    if run.arm.gate is not None:
        curve = Curve(model, prompts, val, run)
        log = train(model, prompts, parts.train, run.settings, run.folder, checkpoint_of(run), [curve])
        if curve.best.is_dir():
            model.restore(curve.best)
            shutil.rmtree(curve.best)
        model.save(run.folder / "recommender")
        for done in checkpoints(run.folder):
            shutil.rmtree(done)
    found: dict[str, Any] = {"run": run.described(), "training_seconds": time.perf_counter() - start}
    found |= measure(model, prompts, val, test, run)
    found["losses"] = [entry["loss"] for entry in log if "loss" in entry]
    found["curve"] = [(int(entry["step"]), entry[CURVE_KEY]) for entry in log if CURVE_KEY in entry]
    found["seconds"] = time.perf_counter() - start
    return found


def checkpoint_of(run: Run) -> Path | None:
    """The last complete checkpoint of a run that was killed, or None. Raises OtherData if it is of other data."""
    described = run.folder / "run.json"
    if described.exists():
        made_from = json.loads(described.read_text(encoding="utf-8"))["fingerprint"]
        run.experiment.check_data(described, made_from, run.fingerprint)
    write_whole(described, json.dumps(run.described(), indent=1) + "\n")
    return last_checkpoint(run.folder)


class Curve(TrainerCallback):
    """Ranks validation examples during training and writes the hit ratio and the NDCG to the Trainer's log.

    The Trainer saves its log in every checkpoint, so a resumed run has the whole curve. With settings.patience it keeps
    the weights of the best NDCG in the folder `best`, and ends the training.
    """

    def __init__(self, model: Recommender, prompts: Prompts, val: list[Example], run: Run) -> None:
        patience = run.settings.patience
        self.model, self.prompts, self.val, self.run = model, prompts, val if patience else val[:CURVE_EXAMPLES], run
        self.best = run.folder / "best"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.run.watch or state.global_step % self.run.watch:
            return
        _, rank = score(self.model, self.prompts, self.val, self.run.choice, 4 * self.run.settings.batch_size)
        quality = {CURVE_KEY: hit_ratio(rank).value, STOP_KEY: ndcg(rank, 20)}
        state.log_history.append({"step": state.global_step, **quality})
        if patience := self.run.settings.patience:
            found = [entry[STOP_KEY] for entry in state.log_history if STOP_KEY in entry]
            if found.index(max(found)) == len(found) - 1:
                self.model.save(self.best)
            control.should_training_stop |= found.index(max(found)) < len(found) - patience


def measure(model: Recommender, prompts: Prompts, val: list[Example], test: list[Example], run: Run) -> dict[str, Any]:
    """The figures of a trained model, JSON-able."""
    size, choice = 4 * run.settings.batch_size, run.choice
    _, val_rank = score(model, prompts, val, choice, size)
    scores, rank = score(model, prompts, test, choice, size)
    write_predictions(run.folder / "predictions.tsv", prompts, test, rank, scores)
    trained = [*model.lm.parameters(), *(model.user_projector.parameters() if model.user_projector else ())]
    found: dict[str, Any] = {
        "validation": {"hit_ratio": hit_ratio(val_rank).value, "ndcg": ndcg(val_rank, 20)},
        **described_ranks(rank),
        "catalogue_ranks": shortlist_ranks(model, prompts, test, choice, size, run.settings.candidates).tolist(),
        "trainable": sum(p.numel() for p in trained if p.requires_grad),
    }
    if run.texts:
        valid, text_hits = text_ratios(write(model, prompts, test, choice, size), test, prompts.written())
        found["texts"] = {"valid": valid.hits, "hits": text_hits.hits, "total": valid.total}
    if run.arm.gate not in (None, "uniform"):
        gate = gates(model, prompts, test, choice)
        stats = ilora.gate_stats(gate)
        found["gate"] = {"entropy": stats.entropy, "usage": stats.usage, "weights": rounded(gate)}
        groups = [prompts.dataset.groups.get(example.user) for example in test]
        if None not in groups and len(set(groups)) > 1 and run.arm.gate == "sequence":
            found["gate"] |= exchange_gates(model, prompts, test, choice, gate, groups, size)
    return found


def write_predictions(path: Path, prompts: Prompts, test: list[Example], rank: Tensor, scores: Tensor) -> None:
    """A line for each test user: user, target, its rank, and the candidates' log-likelihoods as JSON, by title."""
    titles = prompts.dataset.titles
    lines = ["user\ttarget\trank\tscores"]
    for example, place, row in zip(test, rank.tolist(), scores.tolist(), strict=True):
        scored = json.dumps(
            {titles[c]: round(value, 4) for c, value in zip(example.candidates, row, strict=True)}, ensure_ascii=False
        )
        lines.append(f"{example.user}\t{titles[example.target]}\t{place}\t{scored}")
    write_whole(path, "\n".join(lines) + "\n")


def rounded(gate: Tensor) -> list[list[float]]:
    """The gate [N, E] as lists, rounded to four decimals."""
    return [[round(weight, 4) for weight in row] for row in gate.tolist()]


def exchange_gates(
    model: Recommender,
    prompts: Prompts,
    test: list[Example],
    choice: Choice,
    gate: Tensor,
    groups: Sequence[int | None],
    size: int,
) -> dict[str, Any]:
    """Measures what the gate tells the model: the hit ratios when each user gets the gate of somebody else.

    groups: the group of each user; there are two groups or more.
    """
    draw, N = random.Random(0), range(len(test))
    same = [draw.choice([j for j in N if groups[j] == groups[i] and j != i] or [i]) for i in N]
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


def one_thread() -> None:
    """Every worker calls this first. Small models gain nothing from threads, and workers would fight for the cores."""
    os.environ["TQDM_DISABLE"] = "1"  # the bars of several workers would overwrite each other
    torch.set_num_threads(1)
    sys.stdout.flush()


def with_rate(run: Run, lr: float, seed: int) -> Run:
    """The run with this learning rate and seed, and with the sequence model and tiny language model of the seed."""
    experiment = replace(run.experiment, model_seed=seed)
    return run._replace(experiment=experiment, settings=replace(run.settings, lr=lr, seed=seed))
