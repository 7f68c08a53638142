"""Finds and loads the trained recommenders that `compare.py` has written."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from .data import Dataset
from .experiments import PROMPTS, Arm, Experiment, OtherData
from .prompts import Prompts
from .recommender import Recommender, load

COMPARE = "python examples/sequential_recommendation/compare.py"
FOLDER = Path("recommender-comparison")  # the default folder of compare.py


@dataclass(frozen=True)
class KeptRun:
    """A trained run: the part of its `run.json` that is needed to use its recommender.

    folder: holds run.json and the recommender. hybrid: whether the prompts hold item embeddings.
    fingerprint: of the data that it was trained on.
    """

    folder: Path
    arm: Arm
    hybrid: bool
    experiment: Experiment
    fingerprint: str

    @property
    def validation(self) -> float:
        """The hit ratio on the validation users, or -1 if the run has no file of results."""
        path = self.folder.with_name(self.folder.name + ".json")
        return float(json.loads(path.read_text(encoding="utf-8"))["validation"]["hit_ratio"]) if path.exists() else -1.0

    def load(self, dataset: Dataset) -> tuple[Recommender, Prompts]:
        """The recommender in eval mode, on the GPU if there is one, and the `Prompts` that write its prompts.

        Raises FileNotFoundError or ValueError if a file is missing, is damaged, or belongs to another data set or
        model.
        """
        if self.fingerprint != (now := self.experiment.fingerprint(dataset)):
            root = self.experiment.root
            source = dataset.name if root is None else f"{dataset.name} as read from {root}"
            raise OtherData(
                f"{self.folder}: it was trained on other data (fingerprint {self.fingerprint}) than {source} ({now}): "
                "give --root with the files that it was trained on"
            )
        lm, tokenizer = self.experiment.language_model(dataset)
        model = load(self.folder / "recommender", lm)
        return model, Prompts(tokenizer, dataset, PROMPTS[self.experiment.data], self.arm.soft_prompt)


def read_run(folder: Path) -> KeptRun:
    """Reads <folder>/run.json. Raises FileNotFoundError, or ValueError naming the file and what it lacks."""
    folder = folder.resolve()
    path, above = folder / "run.json", folder.parents
    if len(above) < 3:
        raise ValueError(f"{folder}: expected a run in its place, <comparison>/runs/<arm>/<run>")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        experiment = Experiment.read(described["experiment"], above[2])
        hybrid = described["settings"]["curriculum"] is not None
        return KeptRun(folder, Arm(**described["arm"]), hybrid, experiment, described["fingerprint"])
    except KeyError as error:
        raise ValueError(f"{path}: expected the description of a run, it has no {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the description of a run: {error}") from error


def find_run(folder: Path, root: Path | None = None) -> KeptRun:
    """The run in a folder, or the best run of the one comparison below it. root: replaces the run's own root.

    Runs with the sequence gate come first; among them, or else among all, the highest hit ratio on the validation
    users decides. Raises ValueError if no run is trained, or if the folder holds runs of several comparisons.
    """
    paths = sorted(path.parents[1] for path in folder.glob("**/recommender/recommender.json"))
    runs = [read_run(path) for path in paths if (path / "run.json").exists()]  # checkpoints have no run.json
    if not runs:
        command = COMPARE if folder == FOLDER else f"{COMPARE} --out {folder}"
        raise ValueError(
            f"no trained recommender in {folder}. This makes some, for made-up users, in about half an hour\n"
            f"(with --arms sequence --seed 0 in a few minutes):\n  {command}\n"
            "and its --help says how to train on MovieLens with SmolLM2."
        )
    several = sorted({str(run.experiment.folder) for run in runs})
    if len(several) > 1:
        raise ValueError(f"{folder} holds runs of several comparisons, give one with --run:\n  " + "\n  ".join(several))
    best = max(runs, key=lambda run: (run.arm.gate == "sequence", run.validation))
    return best if root is None else replace(best, experiment=replace(best.experiment, root=root))
