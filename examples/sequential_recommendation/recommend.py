"""Recommends what comes next to a person who liked some titles, with a trained recommender.

    python examples/sequential_recommendation/recommend.py "Toy Story" "Alien" "Fargo"
    python examples/sequential_recommendation/recommend.py --run FOLDER "Toy Story" --candidates "Heat" "Big" --json
    python examples/sequential_recommendation/recommend.py --run FOLDER --list star

Give the titles oldest first. The sequence model chooses a shortlist, and the language model, whose experts the gate
weighs, ranks it. FOLDER is a folder that compare.py wrote: that of one run, or that of a whole comparison, of which
the best run is taken.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from pathlib import Path

if __spec__ is None:  # run by path: start again as the package's module, so that its imports work
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # so that only the answer and errors are printed
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    runpy.run_module("sequential_recommendation.recommend", run_name="__main__", alter_sys=True)
    sys.exit()

import argparse
import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from .data import Dataset
from .kept import FOLDER, KeptRun, find_run
from .options import whole
from .service import Answer, Service
from .titles import Titles

BAR = 30  # characters of the longest bar


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("titles", nargs="*", metavar="TITLE", help="what the person liked, oldest first; 3 to 10 are best")
    add("--list", action="store_true", help="print the titles that are known, or those that hold each TITLE's words")
    add("--candidates", nargs="+", default=[], metavar="TITLE", help="rank these instead of a shortlist")
    add("--shortlist", type=whole(2), metavar="N", help="how many to rank (default: as many as in the training)")
    add("--top", type=whole(1), default=10, metavar="K", help="how many to print (%(default)s)")
    add("--json", action="store_true", help="print JSON")
    run_options(made)
    return made


def run_options(made: argparse.ArgumentParser) -> None:
    """Adds the options that choose the recommender."""
    made.add_argument("--run", type=Path, default=FOLDER, metavar="FOLDER", help="of a trained run (%(default)s)")
    made.add_argument("--root", type=Path, metavar="DIR", help="folder of the data set's files, if they have moved")


def opened(folder: Path, root: Path | None) -> tuple[KeptRun, Dataset, Titles]:
    """(run, data set, titles), without loading models. Ends the program with status 1 if a file cannot be read."""
    try:
        run = find_run(folder, root)
        dataset = run.experiment.dataset()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    return run, dataset, Titles(dataset)


def loaded(run: KeptRun, dataset: Dataset, titles: Titles) -> Service:
    """Loads the models of the run. Ends the program with status 1 if a file cannot be read."""
    try:
        return Service.of(run, dataset, titles)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def answer_lines(answer: Answer, service: Service, top: int) -> Iterator[str]:
    """Yields the lines of text to print for the answer."""
    yield service.label
    yield f"after: {'; '.join(answer.history)}"
    yield from (f"note: {note}" for note in answer.notes)
    best = answer.ranked[:top]
    width = max(len("title"), *(len(found.title) for found in best))
    yield ""
    yield f"rank  {'title':{width}}  probability  {service.sequence_kind} rank"
    for found in best:
        yield (
            f"{found.rank:4}  {found.title:{width}}  {found.probability:11.1%}  "
            f"{found.sequence_rank:{len(service.sequence_kind) + 5}}"
        )
    rest = len(answer.ranked) - len(best)
    if rest:
        yield f"      {f'and {rest} more':{width}}  {sum(r.probability for r in answer.ranked[top:]):11.1%}"
    yield ""
    yield f"expert weights ({answer.gate_source})"
    yield from (
        f"{expert:4}  {weight:6.3f}  {'#' * round(BAR * weight)}" for expert, weight in enumerate(answer.gate, 1)
    )


def as_json(answer: Answer, service: Service, folder: Path, top: int) -> str:
    found = asdict(answer)
    scored = found.pop("ranked")
    gate = {"source": found.pop("gate_source"), "weights": found.pop("gate")}
    head = {"model": service.label, "run": str(folder), **found, "scored": len(scored)}
    return json.dumps({**head, "recommendations": scored[:top], "gate": gate}, indent=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the answer. Returns the exit status: 0, or 2 for wrong titles or options."""
    made = parser()
    options = made.parse_args(argv)
    if not options.titles and not options.list:
        made.error("give one TITLE or more, or --list")
    run, dataset, titles = opened(options.run, options.root)
    if options.list:
        print("\n".join(titles.holding(options.titles)))
        return 0
    try:
        titles.find([*options.titles, *options.candidates])  # reports unknown titles before the models are loaded
        service = loaded(run, dataset, titles)
        answer = service.answer(options.titles, options.candidates, options.shortlist)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(as_json(answer, service, run.folder, options.top))
    else:
        print("\n".join(answer_lines(answer, service, options.top)))
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends the program quietly, as with `--list | head`
    sys.exit(main())
