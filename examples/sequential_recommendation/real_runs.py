"""One long run on real data: an arm trained on so many examples, tested on every user.

    python examples/sequential_recommendation/real_runs.py --data lastfm --root DIR --arm ilora --seed 0 --out FOLDER

Arms: lora; lora+z, which has the sequence model's z as one soft prompt token; ilora, four experts and z at the gate.
Item embeddings come into the prompts of all three over the training. Training takes the windows of the published
training users but the last two of each. So two tests are of windows that nothing was trained on: the last window of
the published test users, who are new to the model, and the last window of every user. The curve is of the published
validation users, and chooses nothing: every arm has the same examples, the paper's rate and its last weights.

The frozen language model is held in bfloat16, adapters in float32. A run that is killed goes on from its last
checkpoint, at most ten minutes before. The result is DATA/ARM-seedN.json in the folder, with every test user's rank.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __spec__ is None:  # run by path: start again as the package's module, so that its imports work
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module("sequential_recommendation.real_runs", run_name="__main__", alter_sys=True)
    sys.exit()

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import TrainerCallback

import ilora

from . import sequence_models
from .arguments import MOST_SEED, whole
from .data import Dataset, Example, Window, split, with_candidates
from .experiments import PROMPTS, SMOLLM2, Arm, Experiment, unpacked
from .files import write_whole
from .metrics import candidate_scores, popularity, ranks, text_ratios
from .prompts import Prompts
from .recommender import Recommender
from .scoring import STANDARD, gates, score, write
from .sequence_models import SequenceModel
from .sequence_training import candidate_ranks, train_sequence_model
from .settings import LEARNING_RATES, RecommenderConfig, TrainingSettings
from .tables import described_ranks
from .training import checkpoints, last_checkpoint, train

ARMS = {
    "lora": Arm("LoRA", "uniform"),
    "lora+z": Arm("LoRA, z as a soft prompt", "uniform", soft_prompt=True),
    "ilora": Arm("iLoRA, E=4, sequence gate", "sequence", 4),
}
EFFECTIVE_BATCH, SAVE_SECONDS, SCORED = 16, 600, 16  # examples of a step, between checkpoints, ranked at once


class Parts(NamedTuple):
    """train, sequence_val: the windows of the published training users but the last two, and the one before the last.
    val: of the published validation users. test: the last window of every user. published: the published test users."""

    train: list[Window]
    sequence_val: list[Example]
    val: list[Example]
    test: list[Example]
    published: frozenset[str]


def parts_of(dataset: Dataset) -> Parts:
    """Raises ValueError where the published tests are not among the last windows of all users."""
    paper, every = split(dataset, protocol="paper"), split(dataset, protocol="leave-one-out")
    known = {window.user for window in paper.train}
    if missing := set(paper.test) - set(every.test):
        raise ValueError(f"{dataset.name}: {len(missing)} published tests are not the last window of their user")
    return Parts(
        [window for window in every.train if window.user in known],
        with_candidates([window for window in every.val if window.user in known], dataset),
        with_candidates(paper.val, dataset),
        with_candidates(every.test, dataset),
        frozenset(window.user for window in paper.test),
    )


class Watch(TrainerCallback):
    """Ranks the validation users every so many steps, and makes checkpoints by the clock and after the last step."""

    def __init__(self, model: Recommender, prompts: Prompts, val: list[Example], every: int) -> None:
        self.model, self.prompts, self.val, self.every = model, prompts, val, every
        self.saved = self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.every == 0 or step == state.max_steps:
            _, rank = score(self.model, self.prompts, self.val, STANDARD, SCORED)
            point = {"step": step, "examples": step * EFFECTIVE_BATCH, **described_ranks(rank)}
            state.log_history.append({"watched": point})
            print(json.dumps(point), flush=True)
            control.should_save = True
        now = time.monotonic()
        if now - self.saved > SAVE_SECONDS or step == state.max_steps:
            control.should_save = True
        if control.should_save:
            self.saved = now

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        pace = (time.monotonic() - self.started) / 60
        print(f"step {state.global_step} of {state.max_steps}, {pace:.1f} minutes since the start: {logs}", flush=True)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for old in checkpoints(Path(args.output_dir))[:-2]:
            shutil.rmtree(old)


def tested(rank: Tensor, parts: Parts) -> dict[str, Any]:
    """The figures of the test, over all users and over the published test users."""
    own = torch.tensor([example.user in parts.published for example in parts.test])
    return {"all_users": described_ranks(rank), "published": described_ranks(rank[own])}


def sequence_model_of(path: Path, dataset: Dataset, parts: Parts, seed: int) -> SequenceModel:
    """SASRec, trained on the same windows and kept."""
    if not path.exists():
        model = sequence_models.build("sasrec", dataset.num_items, seed)
        train_sequence_model(model, parts.train, parts.sequence_val, seed=seed, log=lambda e: print(e, flush=True))
        sequence_models.save(model, path)
    return sequence_models.load(path)


def perform(options: argparse.Namespace) -> dict[str, Any]:
    """Trains and tests; what is done already is read."""
    arm, folder = ARMS[options.arm], options.out / options.data
    file = folder / f"{options.arm}-seed{options.seed}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(folder, data=options.data, root=options.root.resolve(), model=options.model, plain=True)
    dataset = experiment.dataset()
    parts = parts_of(dataset)
    print(f"{dataset}; {len(parts.train):,} windows to train on, {len(parts.test):,} users to test", flush=True)
    sequence_model = sequence_model_of(folder / f"sasrec-seed{options.seed}.safetensors", dataset, parts, options.seed)
    model, prompts = prepared(experiment, dataset, parts, sequence_model, arm, options.seed)
    steps = options.examples // EFFECTIVE_BATCH
    settings = TrainingSettings(
        steps=steps, lr=LEARNING_RATES[options.data], batch_size=options.batch_size, effective_batch=EFFECTIVE_BATCH,
        seed=options.seed, precision="bf16-frozen", progress=False,
    )  # fmt: skip
    work = file.with_suffix("")
    watch = Watch(model, prompts, parts.val, max(1, options.watch // EFFECTIVE_BATCH))
    log = train(model, prompts, parts.train, settings, work, last_checkpoint(work), [watch])
    model.save(work / "recommender")
    found: dict[str, Any] = {
        "data": str(dataset), "model": options.model, "arm": options.arm, "name": arm.name, "seed": options.seed,
        "examples": steps * EFFECTIVE_BATCH, "lr": settings.lr, "windows": len(parts.train),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "losses": [(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
        "curve": [entry["watched"] for entry in log if "watched" in entry],
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    found |= measured(model, prompts, dataset, parts, arm)
    write_whole(file, json.dumps(found) + "\n")
    for path in work.glob("checkpoint-*"):
        shutil.rmtree(path)
    return found


def prepared(
    experiment: Experiment, dataset: Dataset, parts: Parts, sequence_model: SequenceModel, arm: Arm, seed: int
) -> tuple[Recommender, Prompts]:
    """The untrained recommender of an arm, its frozen language model in bfloat16, and what writes its prompts."""
    if experiment.model == SMOLLM2:
        unpacked(experiment.smollm2_folder)
    lm, tokenizer = experiment.language_model(dataset)
    if lm.device.type == "cpu":
        lm.set_attn_implementation("eager")  # in bfloat16 its backward takes less than half of what torch's flash takes
    prompts = Prompts(tokenizer, dataset, PROMPTS[experiment.data], arm.soft_prompt)
    torch.manual_seed(seed)
    config = RecommenderConfig(gate=arm.gate or "uniform", num_experts=arm.num_experts, soft_prompt=arm.soft_prompt)
    model = Recommender(lm.to(torch.bfloat16), sequence_model.to(lm.device), config).eval()
    ilora.share_inputs(model.lm)
    model.encoder.standardise([window.history for window in parts.train])
    return model, prompts


def measured(model: Recommender, prompts: Prompts, dataset: Dataset, parts: Parts, arm: Arm) -> dict[str, Any]:
    """The figures of a trained model and of the two baselines, JSON-able, with every user's rank."""
    scores, rank = score(model, prompts, parts.test, STANDARD, SCORED)
    counts = popularity(parts.train, dataset.num_items).expand(len(parts.test), -1)
    popular = ranks(*candidate_scores(counts, parts.test))
    alone = candidate_ranks(model.encoder.model, parts.test)
    own = [example for example in parts.test if example.user in parts.published]
    valid, hits = text_ratios(write(model, prompts, own, STANDARD, SCORED), own, prompts.written())
    found: dict[str, Any] = {
        "test": tested(rank, parts),
        "texts_of_published": {"valid": valid.hits, "hits": hits.hits, "total": hits.total},
        "sasrec": tested(alone, parts),
        "popularity": tested(popular, parts),
        "users": [
            {"user": e.user, "published": e.user in parts.published, "target": e.target, "rank": r, "sasrec": s,
             "popularity": p, "scores": [round(value, 4) for value in row]}
            for e, r, s, p, row in zip(parts.test, rank.tolist(), alone.tolist(), popular.tolist(), scores.tolist(),
                                       strict=True)
        ],
    }  # fmt: skip
    if arm.gate == "sequence":
        stats = ilora.gate_stats(gates(model, prompts, parts.test, STANDARD))
        found["gate"] = {"entropy": stats.entropy, "usage": stats.usage}
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=("lastfm", "ml-100k"), required=True)
    add("--root", type=Path, required=True, help="folder of the raw files")
    add("--arm", choices=tuple(ARMS), required=True)
    add("--seed", type=whole(0, MOST_SEED), default=0)
    add("--model", default=SMOLLM2, help="or a folder or name for transformers")
    add("--examples", type=whole(EFFECTIVE_BATCH), default=20_000, help="to train on")
    add("--watch", type=whole(EFFECTIVE_BATCH), default=2_000, help="rank validation users after so many examples")
    add("--batch-size", type=int, choices=(1, 2, 4, 8, 16), default=4, help="examples at once")
    add("--out", type=Path, default=Path("real-runs"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the result, which is kept as JSON."""
    found = perform(parse(argv))
    shown = {name: found[name] for name in ("arm", "seed", "test", "sasrec", "popularity", "texts_of_published")}
    print(json.dumps(shown), flush=True)
    return found


if __name__ == "__main__":
    main()
