"""Trains sequence models and prints how often they find the next item among 20 candidates.

    python examples/sequential_recommendation/train_sequence_models.py --model sasrec gru4rec caser
    python examples/sequential_recommendation/train_sequence_models.py --data ml-100k --root DIR --seed 0 1

Without --data the users are made up. One CPU core needs minutes at most; --threads sets how many to use.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __spec__ is None:  # run by path: start again as the package's module, so that its imports work
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module("sequential_recommendation.train_sequence_models", run_name="__main__", alter_sys=True)
    sys.exit()

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import MOST_SEED, device, real, refuse_idle, refuse_repeats, whole
from .data import Dataset, Example, Split, frequent, split, with_candidates
from .experiments import MADE_UP
from .metrics import Ratio, candidate_scores, hit_ratio, ndcg, over_seeds, popularity, ranks
from .readers import READERS
from .sequence_models import KINDS, build, save
from .sequence_training import Epoch, Settings, candidate_ranks, train_sequence_model


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=(*MADE_UP, *READERS), default="synthetic")
    add("--root", type=Path, help="folder of the raw files (readers.py says which)")
    add("--min-users", type=whole(1), help="drop items that fewer users met (try 20 for Steam; default: 1)")
    add("--protocol", choices=("paper", "leave-one-out"), default="paper", help="(default: %(default)s)")
    add("--evaluate", choices=("last", "random"), default="last", help="which window of a validation or test user")
    add("--exclude", choices=("window", "user"), default="window", help="items that cannot be negatives: see data.py")
    add("--data-seed", type=int, default=0, help="of the split and the candidates")
    add("--model", nargs="+", choices=tuple(KINDS), default=["sasrec"])
    add("--seed", nargs="+", type=whole(0, MOST_SEED), default=[0], help="of weights and training")
    add("--epochs", type=whole(1), default=Settings().epochs)
    add("--lr", type=real(zero=False), default=Settings().lr)
    add("--threads", type=whole(1), default=1)
    add("--device", type=device, default="cpu")
    add("--out", type=Path, default=Path("sequence-models"), help="folder for the trained models")
    options = parser.parse_args(argv)
    if (options.root is None) != (options.data in MADE_UP):
        parser.error("--root goes with --data, and --data of files needs it")
    if options.data in MADE_UP:
        refuse_idle(parser, options, ("min_users",), f"--data {options.data}")
    refuse_repeats(parser, options, ("model", "seed"))
    return options


def read(options: argparse.Namespace) -> Dataset:
    """The data set that the options name."""
    if options.data in MADE_UP:
        return MADE_UP[options.data](seed=options.data_seed)
    dataset = READERS[options.data](options.root)
    return dataset if options.min_users in (None, 1) else frequent(dataset, items=options.min_users)


def show_epoch(epoch: Epoch) -> None:
    print(
        f"  epoch {epoch.number:3}  loss {epoch.loss:.4f}  validation HitRatio@1 {epoch.hit_ratio:.4f}, "
        f"NDCG {epoch.ndcg:.4f}  {epoch.seconds:.1f} s",
        flush=True,
    )


def table_row(name: str, rank: Tensor) -> str:
    return f"| {name} | {hit_ratio(rank)} | {hit_ratio(rank, 5).value:.4f} | {ndcg(rank, 5):.4f} |"


def train_and_test(
    kind: str, seed: int, parts: Split, val: list[Example], test: list[Example], options: argparse.Namespace
) -> Tensor:
    """Trains and saves one model. Returns its ranks on the test examples."""
    start = time.perf_counter()
    model = build(kind, options.num_items, seed).to(options.device)
    print(f"{kind}, seed {seed}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train_sequence_model(model, parts.train, val, Settings(epochs=options.epochs, lr=options.lr), seed, show_epoch)
    path = options.out / f"{kind}-{options.data}-{options.protocol}-seed{seed}.safetensors"
    save(model, path)
    print(f"  {time.perf_counter() - start:.0f} s; saved {path}", flush=True)
    return candidate_ranks(model, test)


def main(argv: Sequence[str] | None = None) -> dict[str, list[Ratio]]:
    """Prints a Markdown table. Returns HitRatio@1 by model, one for each seed."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    try:
        dataset = read(options)
        parts = split(dataset, options.data_seed, options.protocol, options.evaluate)
        val, test = (with_candidates(part, dataset, options.data_seed, options.exclude) for part in parts[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"--data {options.data}: {error}")
    options.num_items = dataset.num_items
    print(f"{dataset}; {len(parts.train):,} windows train, {len(val)} validate, {len(test)} test", flush=True)
    found: dict[str, list[Ratio]] = {}
    scores = popularity(parts.train, dataset.num_items).expand(len(test), -1)
    rows = [table_row("popularity", ranks(*candidate_scores(scores, test)))]
    for kind in options.model:
        for seed in options.seed:
            rank = train_and_test(kind, seed, parts, val, test, options)
            found.setdefault(kind, []).append(hit_ratio(rank))
            rows.append(table_row(f"{kind}, seed {seed}", rank))
        if len(options.seed) > 1:
            rows.append(f"| {kind}, mean | {over_seeds([ratio.value for ratio in found[kind]])} | | |")
    print(f"\n| {dataset.name}, {len(test)} tests | HitRatio@1 [95%] | HitRatio@5 | NDCG@5 |\n|---|---|---|---|")
    print("\n".join(rows))
    return found


if __name__ == "__main__":
    main()
