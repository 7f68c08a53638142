"""A trained recommender as `compare.py` keeps it: which run it is of, its data set, and its models.

Nothing here needs transformers' Trainer, whose import alone takes seconds.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import uuid
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import Dataset, frequent
from .readers import READERS, plain_titles
from .synthetic import synthetic
from .tastes import tastes

if TYPE_CHECKING:  # the rest is read without torch, so that a wrong title is answered at once
    from .prompts import Prompts
    from .recommender import Recommender

KINDS = {"synthetic": "neutral", "tastes": "neutral", "ml-100k": "movies", "lastfm": "artists", "steam": "games"}
MADE_UP: dict[str, Callable[..., Dataset]] = {"synthetic": synthetic, "tastes": tastes}
TINY, SMOLLM2 = "tiny", "smollm2"
COMPARE = "python examples/sequential_recommendation/compare.py"
FOLDER = Path("recommender-comparison")  # where compare.py puts its runs


class NoRun(ValueError):
    """There is no trained run, or more than one that could be meant."""


@dataclass(frozen=True)
class KeptRun:
    """What a run's `run.json` says that is needed to use its recommender.

    folder: holds run.json and the recommender. comparison: what all runs of one comparison share. hybrid: whether
    item embeddings stand in the prompts. The others are as in `arms.Arm` and `arms.Experiment`.
    """

    folder: Path
    arm: str
    gate: str
    hybrid: bool
    data: str
    root: Path | None
    users: int
    min_users: int
    data_seed: int
    model: str
    plain: bool

    @property
    def comparison(self) -> Path:
        return self.folder.resolve().parents[2]  # <comparison>/runs/<arm>/<rate and seed>

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

    def dataset(self) -> Dataset:
        """The data set it was trained on. Raises OSError or ValueError where its files are missing or damaged."""
        if self.data in MADE_UP:
            return MADE_UP[self.data](self.users, seed=self.data_seed)
        if self.root is None or not self.root.is_dir():
            raise FileNotFoundError(f"{self.folder}: its data set {self.data} was in {self.root}: give --root DIR")
        dataset = READERS[self.data](self.root)
        dataset = plain_titles(dataset) if self.plain else dataset
        return dataset if self.min_users == 1 else frequent(dataset, items=self.min_users)

    def load(self, dataset: Dataset) -> tuple[Recommender, Prompts]:
        """The recommender in eval mode, on the GPU where there is one, and what writes its prompts.

        Raises FileNotFoundError or ValueError for a missing or damaged file, or one of another data set or model.
        """
        import torch
        from transformers.utils import logging

        from .prompts import Prompts
        from .recommender import load

        logging.disable_progress_bar()
        lm, tokenizer = self._language_model(dataset)
        model = load(self.recommender, lm.to("cuda" if torch.cuda.is_available() else "cpu").eval())
        if model.encoder.num_items != dataset.num_items:
            raise ValueError(
                f"{self.recommender}: it knows {model.encoder.num_items} items, {dataset.name} as read from "
                f"{self.root} has {dataset.num_items}: give --root with the files that it was trained on"
            )
        return model, Prompts(tokenizer, dataset, KINDS[self.data])

    def _language_model(self, dataset: Dataset) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self.model == TINY:
            from .tiny_model import tiny_tokenizer

            folder = self.comparison / "tiny-lm"
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: is missing, the language model that {self.folder} was trained on")
            return AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer(dataset, KINDS[self.data])
        name = str(unpacked(self.comparison.parent / "smollm2")) if self.model == SMOLLM2 else self.model
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto"), AutoTokenizer.from_pretrained(name)


def unpacked(folder: Path) -> Path:
    """The folder with SmolLM2 in float32 as safetensors; made the first time, since GGUF takes half a minute to read.
    It appears whole or not at all."""
    if folder.is_dir():
        return folder
    from transformers import AutoModelForCausalLM

    print(f"unpacking SmolLM2 to {folder}, this once: half a gigabyte, about a minute", file=sys.stderr, flush=True)
    packed, tokenizer = importlib.import_module("smollm2_text").load(None)  # the example beside this package
    config = deepcopy(packed.config)
    del config.quantization_config  # transformers refuses to write a model that was quantised once
    lm = AutoModelForCausalLM.from_config(config, dtype=packed.dtype)
    lm.load_state_dict(packed.state_dict())
    stage = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        lm.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        stage.rename(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return folder


def read_run(folder: Path) -> KeptRun:
    """What <folder>/run.json says. Raises FileNotFoundError, or ValueError naming the file and what it lacks."""
    path = folder / "run.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        arm, settings, experiment = described["arm"], described["settings"], described["experiment"]
        if experiment["data"] not in KINDS:
            raise ValueError(f"unknown data {experiment['data']!r}: expected one of {', '.join(KINDS)}")
        return KeptRun(
            folder,
            arm["name"],
            arm["gate"],
            settings["curriculum"] is not None,
            experiment["data"],
            None if experiment["root"] == "None" else Path(experiment["root"]),
            int(experiment["users"]),
            int(experiment["min_users"]),
            int(experiment["data_seed"]),
            experiment["model"],
            _truth(experiment["plain"]),
        )
    except KeyError as error:
        raise ValueError(f"{path}: expected the description of a run, it has no {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the description of a run: {error}") from error


def _truth(text: str) -> bool:
    """Of what str makes of a bool; bool("False") would be true."""
    if text not in ("True", "False"):
        raise ValueError(f"expected True or False, got {text!r}")
    return text == "True"


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
    several = sorted({str(run.comparison) for run in kept})
    if len(several) > 1:
        raise NoRun(f"{folder} holds runs of several comparisons, give one with --run:\n  " + "\n  ".join(several))
    best = max(kept, key=lambda run: (run.gate == "sequence", run.validation))
    return best if root is None else KeptRun(**{**vars(best), "root": root})
