"""A trained recommender as `compare.py` keeps it: which run it is of, its data set, and its models."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .data import Dataset
from .experiments import PROMPTS, Arm, Experiment, OtherData

if TYPE_CHECKING:  # a wrong title is answered before torch could be imported
    from .prompts import Prompts
    from .recommender import Recommender

COMPARE = "python examples/sequential_recommendation/compare.py"
FOLDER = Path("recommender-comparison")  # where compare.py puts its runs


class NoRun(ValueError):
    """There is no trained run, or more than one that could be meant."""


@dataclass(frozen=True)
class KeptRun:
    """What a run's `run.json` says that is needed to use its recommender.

    folder: holds run.json and the recommender. hybrid: whether item embeddings stand in the prompts. fingerprint: of
    the data it was trained on, "" where run.json has none.
    """

    folder: Path
    arm: Arm
    hybrid: bool
    experiment: Experiment
    fingerprint: str = ""

    @property
    def recommender(self) -> Path:
        return self.folder / "recommender"

    @property
    def validation(self) -> float:
        """The hit ratio on the validation users; -1 where none is kept."""
        try:
            kept = json.loads(self.folder.with_name(self.folder.name + ".json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return -1.0
        return float(kept["validation"]["hit_ratio"])

    def load(self, dataset: Dataset) -> tuple[Recommender, Prompts]:
        """The recommender in eval mode, on the GPU where there is one, and what writes its prompts.

        Raises FileNotFoundError or ValueError for a missing or damaged file, or one of another data set or model.
        """
        from .prompts import Prompts
        from .recommender import load

        root = self.experiment.root
        source = dataset.name if root is None else f"{dataset.name} as read from {root}"
        remedy = "give --root with the files that it was trained on"
        if self.fingerprint and self.fingerprint != (now := self.experiment.fingerprint(dataset)):
            raise OtherData(
                f"{self.folder}: it was trained on other data (fingerprint {self.fingerprint}) than {source} ({now}): "
                + remedy
            )
        lm, tokenizer = self.experiment.language_model(dataset)
        model = load(self.recommender, lm)
        if (known := model.encoder.num_items) != dataset.num_items:  # a run that says no fingerprint
            raise OtherData(f"{self.recommender}: it knows {known} items, {source} has {dataset.num_items}: {remedy}")
        return model, Prompts(tokenizer, dataset, PROMPTS[self.experiment.data], self.arm.soft_prompt)


def read_run(folder: Path) -> KeptRun:
    """What <folder>/run.json says. Raises FileNotFoundError, or ValueError naming the file and what it lacks."""
    folder = folder.resolve()
    path, above = folder / "run.json", folder.parents
    if len(above) < 3:
        raise ValueError(f"{folder.resolve()}: expected a run in its place, <comparison>/runs/<arm>/<run>")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        experiment = Experiment.read(described["experiment"], above[2])
        hybrid = described["settings"]["curriculum"] is not None
        return KeptRun(folder, Arm(**described["arm"]), hybrid, experiment, described.get("fingerprint", ""))
    except KeyError as error:
        raise ValueError(f"{path}: expected the description of a run, it has no {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the description of a run: {error}") from error


def find_run(folder: Path, root: Path | None = None) -> KeptRun:
    """The run in a folder, or the best of the runs of one comparison below it; root: instead of the run's own.

    The best has the sequence gate, if any has, and the highest hit ratio on the validation users.
    Raises NoRun where none is trained, or where runs of several comparisons are there.
    """
    paths = sorted(path.parents[1] for path in folder.glob("**/recommender/recommender.json"))
    kept = [read_run(path) for path in paths if (path / "run.json").exists()]  # checkpoints have none
    if not kept:
        command = COMPARE if folder == FOLDER else f"{COMPARE} --out {folder}"
        raise NoRun(
            f"no trained recommender in {folder}. This makes some, for made-up users, in minutes:\n  {command}\n"
            "and its --help says how to train on MovieLens with SmolLM2."
        )
    several = sorted({str(run.experiment.folder) for run in kept})
    if len(several) > 1:
        raise NoRun(f"{folder} holds runs of several comparisons, give one with --run:\n  " + "\n  ".join(several))
    best = max(kept, key=lambda run: (run.arm.gate == "sequence", run.validation))
    return best if root is None else replace(best, experiment=replace(best.experiment, root=root))
