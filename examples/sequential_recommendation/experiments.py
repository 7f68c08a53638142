"""What a comparison consists of: its data and models, its arms, and where their files are.

A run makes everything that it needs from its `Experiment`, so that each run can have a process of its own.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .data import NUM_CANDIDATES, Dataset, Example, Split, frequent, split, with_candidates
from .files import read_once
from .prompts import Choice
from .readers import READERS, plain_titles
from .recommender import RecommenderConfig
from .tastes import tastes
from .tiny_model import tiny_tokenizer
from .training import WITHOUT_EFFECT, TrainingSettings

MADE_UP = "tastes"  # the data set that is made up
PROMPTS = dict.fromkeys((MADE_UP, *READERS), "neutral")  # the kind of prompt of each data set
PROMPTS |= {"ml-100k": "movies", "movielens": "movies", "lastfm": "artists", "steam": "games"}
TINY, SMOLLM2 = "tiny", "smollm2"
LATER = "whose target is later than the history"  # a kind of tests; of the others the file's order decides what is next
logging.disable_progress_bar()  # transformers' bars, for files that are read and written in a moment


class OtherData(ValueError):
    """A file of an earlier run was made from other data than the data set has now."""


@dataclass(frozen=True)
class Arm:
    """A row of the table. gate: as in `RecommenderConfig`, or None for the language model without training.
    rank: the total rank of the adapters. soft_prompt: as in `RecommenderConfig`."""

    name: str
    gate: str | None
    num_experts: int = 1
    soft_prompt: bool = False
    rank: int = RecommenderConfig.r


@dataclass(frozen=True)
class Experiment:
    """What all arms of a comparison share.

    folder: holds the trained sequence models, the tiny language model and the runs. root: the folder of the raw files.
    model: "tiny", "smollm2", or a name or folder from which transformers loads a causal language model.
    users: how many users to make up. tests: how many of the validation and of the test examples to use, 0 for all.
    plain: whether titles are shortened by `readers.plain_titles`.
    guide: the kind of the sequence model that gives the gate its z and the prompts their item embeddings.
    model_seed: of the sequence models and of the tiny language model. candidates: of each example.
    """

    folder: Path
    root: Path | None = None
    data: str = MADE_UP
    users: int = 2400
    min_users: int = 1
    protocol: str = "leave-one-out"
    data_seed: int = 0
    model: str = TINY
    tests: int = 0
    plain: bool = False
    guide: str = "sasrec"
    model_seed: int = 0
    candidates: int = NUM_CANDIDATES

    @classmethod
    def read(cls, described: dict[str, Any], folder: Path) -> Experiment:
        """The experiment that `Run.described` wrote down, in this folder.

        Raises ValueError for a value that a field cannot have, and for an unknown data set.
        """
        for field in fields(cls)[2:]:
            if type(value := described[field.name]) is not type(field.default):
                raise ValueError(f"{field.name}: expected a value such as {field.default!r}, got {value!r}")
        if described["data"] not in PROMPTS:
            raise ValueError(f"data: expected one of {', '.join(PROMPTS)}, got {described['data']!r}")
        root = None if described["root"] is None else Path(described["root"])
        return cls(**(described | {"folder": folder, "root": root}))

    def dataset(self) -> Dataset:
        """Raises OSError or ValueError where the raw files are missing or damaged."""
        if self.data == MADE_UP:
            return tastes(self.users, seed=self.data_seed)
        if self.root is None or not self.root.is_dir():
            raise FileNotFoundError(f"the files of {self.data} are to be in --root, a folder, which is {self.root}")
        dataset = read_once(self.data, self.root, self.folder / "dataset.json")
        dataset = plain_titles(dataset) if self.plain else dataset
        return dataset if self.min_users == 1 else frequent(dataset, items=self.min_users)

    def parts(self, dataset: Dataset) -> tuple[Split, list[Example], list[Example]]:
        """(split, validation examples, test examples). Raises ValueError if there are too few items or users."""
        parts = split(dataset, self.data_seed, self.protocol)
        longest, titles = max(len(window.history) for part in parts for window in part), len(set(dataset.names))
        if titles < longest + self.candidates:
            raise ValueError(
                f"{dataset.name}: too few titles, {titles}, for a history of {longest} and {self.candidates} candidates"
                + (f": give --candidates {titles - longest}" if titles - longest > 1 else "")
            )
        val, test = (with_candidates(part, dataset, self.data_seed, self.candidates) for part in parts[1:])
        return parts, val[: self.tests or None], test[: self.tests or None]

    def kinds_of_tests(self, dataset: Dataset, test: list[Example]) -> dict[str, list[bool]]:
        """Which tests are of each kind, by the kind's name. Kinds that hold for all tests or none are left out."""
        kinds = {}
        if self.protocol == "every-user":
            new = {window.user for window in split(dataset, self.data_seed, "paper").test}
            kinds["of the paper's test users, who are new"] = [example.user in new for example in test]
        if dataset.tied is not None:
            tied = set(dataset.tied)
            kinds[LATER] = [example.user not in tied for example in test]
        return {kind: those for kind, those in kinds.items() if 0 < sum(those) < len(those)}

    def fingerprint(self, dataset: Dataset) -> str:
        """Sixteen hexadecimal digits: a hash of the titles, the users and all that decides their split.

        Where the files lie does not matter.
        """
        split_by = [dataset.given, self.protocol, self.data_seed, self.tests, self.candidates]
        deciding = [dataset.titles, sorted(dataset.users.items()), split_by]
        return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]

    def check_data(self, path: Path, made_from: str, now: str) -> None:
        """Raises OtherData if the file at the path was made from other data: a model could be tested on training data.

        made_from: the fingerprint of the data that the file was made from. now: that of the present data.
        """
        if made_from != now:
            raise OtherData(
                f"{path}: it was made from other data (fingerprint {made_from}) than those of {self.data} now ({now}): "
                f"give another --out, or remove {self.folder}"
            )

    def sequence_file(self, kind: str) -> Path:
        return self.folder / f"{kind}-seed{self.model_seed}.safetensors"

    @property
    def lm_folder(self) -> Path:
        return self.folder / f"tiny-lm-seed{self.model_seed}"

    def language_model(self, dataset: Dataset) -> tuple[Any, Any]:
        """(model, tokenizer), newly loaded, on the GPU if there is one. Raises OSError if the model is missing."""
        if self.model == TINY:
            if not self.lm_folder.is_dir():
                raise FileNotFoundError(f"{self.lm_folder}: the tiny language model of this comparison is missing")
            lm = AutoModelForCausalLM.from_pretrained(self.lm_folder)
            tokenizer = tiny_tokenizer(dataset, PROMPTS[self.data])
        elif self.model == SMOLLM2:  # from a packed file, which takes half a minute to read
            lm, tokenizer = importlib.import_module("smollm2_text").load(None)  # examples/smollm2_text.py
        else:
            lm = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(self.model)
        return lm.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


class Run(NamedTuple):
    """An arm and the settings of its training, which include the seed.

    texts: whether the model also generates answers. watch: the validation examples are ranked every `watch` steps,
    or only after the last step if it is 0. fingerprint: of the data.
    """

    experiment: Experiment
    arm: Arm
    settings: TrainingSettings
    texts: bool = False
    watch: int = 0
    fingerprint: str = ""

    @property
    def file(self) -> Path:
        """The file of the result. Its name depends on all that decides the result, so that two runs never share it."""
        arm = self.arm.name.lower().replace(",", "").replace(" ", "-")
        name = f"lr{self.settings.lr:g}-seed{self.settings.seed}-{self.key}.json"
        return self.experiment.folder / "runs" / arm / name

    @property
    def key(self) -> str:
        """Eight hexadecimal digits: a hash of all that decides the result.

        It leaves out the folder of the result and settings that do not change it, such as logging. Of the data it
        takes the root folder only; `Experiment.check_data` checks whether their content is still the same.
        """
        deciding = self.described()
        del deciding["experiment"]["folder"], deciding["fingerprint"]
        if self.experiment.root is not None:
            deciding["experiment"]["root"] = str(self.experiment.root.resolve())
        for name in WITHOUT_EFFECT:
            del deciding["settings"][name]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def folder(self) -> Path:
        """The folder of the trained recommender and, during training, of the checkpoints."""
        return self.file.with_suffix("")

    @property
    def choice(self) -> Choice:
        """How the prompts of the evaluation are written."""
        return Choice(0, hybrid=self.arm.gate is not None and self.settings.curriculum is not None)

    @property
    def recommender(self) -> RecommenderConfig:
        return RecommenderConfig(
            gate=self.arm.gate or "uniform",
            num_experts=self.arm.num_experts,
            soft_prompt=self.arm.soft_prompt,
            r=self.arm.rank,
        )

    def described(self) -> dict[str, Any]:
        """All that decides the result, JSON-able."""
        found = {name: asdict(getattr(self, name)) for name in ("experiment", "arm", "recommender", "settings")}
        paths = {name: path and str(path) for name, path in found["experiment"].items() if name in ("folder", "root")}
        found["experiment"] |= paths
        return {**found, "texts": self.texts, "watch": self.watch, "fingerprint": self.fingerprint}
