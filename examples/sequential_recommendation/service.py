"""Answers a person's questions with a trained recommender that is loaded once, for the command and for the page."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import MAX_HISTORY, MIN_HISTORY, NUM_CANDIDATES, Dataset, Example
from .kept import KeptRun
from .likelihoods import candidate_likelihoods
from .prompts import Choice, Prompts
from .recommender import Recommender
from .scoring import asked, by_sequence, gates, shortlist
from .titles import Titles

SOURCES = {
    "sequence": "from the history, as {kind} reads it",
    "shuffled": "from the history, as {kind} reads it, though trained with other users' histories",
    "prompt": "from the words of the prompt",
    "random": "drawn once, the same for every history",
    "uniform": "one plain LoRA: nothing is weighed",
}


@dataclass(frozen=True)
class Recommendation:
    """A scored candidate.

    rank: from 1. probability: among the scored candidates. log_likelihood: of its title after the prompt.
    sequence_rank: its rank, from 1, by the sequence model alone among all items that are not in the history.
    """

    rank: int
    title: str
    probability: float
    log_likelihood: float
    sequence_rank: int


@dataclass(frozen=True)
class Answer:
    """The scored candidates, best first, and the gate behind them.

    history: the titles used, oldest first. gate: one weight for each expert. gate_source: what the weights depend on.
    notes: how the question differs from those of the training.
    """

    history: list[str]
    ranked: list[Recommendation]
    gate: list[float]
    gate_source: str
    notes: list[str]


class Service:
    """Answers questions with one recommender. Several threads may ask; they are answered one at a time.

    Args:
        model: in eval mode.
        prompts: those of its data set and tokenizer.
        hybrid: whether it was trained with item embeddings in the prompts.
        label: describes the model to people.
        titles: of the data set; by default they are made from it.
        candidates: of the examples that it was trained with.
    """

    def __init__(
        self,
        model: Recommender,
        prompts: Prompts,
        hybrid: bool,
        label: str = "",
        titles: Titles | None = None,
        candidates: int = NUM_CANDIDATES,
    ) -> None:
        self.model, self.prompts, self.label = model, prompts, label
        self.titles, self.candidates = titles or Titles(prompts.dataset), candidates
        self.choice = Choice(0, hybrid)
        self.sequence_kind = type(model.encoder.model).__name__
        self._lock = threading.Lock()

    @classmethod
    def of(cls, run: KeptRun, dataset: Dataset, titles: Titles | None = None) -> Service:
        """Loads the recommender of a trained run. Raises what `KeptRun.load` raises."""
        model, prompts = run.load(dataset)
        label = f"{run.arm.name}; {run.experiment.model}; {dataset.name}"
        return cls(model, prompts, run.hybrid, label, titles, run.experiment.candidates)

    @property
    def dataset(self) -> Dataset:
        return self.prompts.dataset

    def answer(self, history: Sequence[str], candidates: Sequence[str] = (), count: int | None = None) -> Answer:
        """Ranks the candidates for a person who liked the titles of the history, given oldest first.

        Without candidates it ranks the `count` items that the sequence model ranks highest; by default as many as in
        the training. Raises `UnknownTitles`, or ValueError if the history is empty, a title is repeated, a candidate is
        in the history, there are fewer than two candidates, or there are more than the language model has room for.
        """
        liked, chosen, notes = self._items_of(history, candidates)
        used = liked[-MAX_HISTORY:]
        with self._lock, torch.no_grad():
            order = by_sequence(self.model.encoder.model, used)
            sequence_ranks = {item: rank for rank, item in enumerate(order, 1)}
            chosen = chosen or shortlist(self.dataset, liked, order, self.candidates if count is None else count)
            if len(chosen) != self.candidates:
                notes.append(f"{len(chosen)} candidates: the model was trained with {self.candidates}")
            example = asked(used, chosen)
            self._check_room(example)
            scores = candidate_likelihoods(self.model, self.prompts, [example], self.choice)[0]
            gate = gates(self.model, self.prompts, [example], self.choice)[0]
        return Answer(
            [self.dataset.titles[item] for item in used],
            self._ranked(example, scores, sequence_ranks),
            gate.tolist(),
            SOURCES[self.model.settings.gate].format(kind=self.sequence_kind),
            notes,
        )

    def _items_of(self, history: Sequence[str], candidates: Sequence[str]) -> tuple[list[int], list[int], list[str]]:
        """(items of the history, items of the candidates, notes). Raises as `answer`."""
        if not history:
            raise ValueError("the history is empty: give one title or more")
        found = self.titles.find([*history, *candidates])
        liked, chosen = found[: len(history)], found[len(history) :]
        for items in (liked, chosen):
            twice = dict.fromkeys(self.dataset.titles[item] for item in items if items.count(item) > 1)
            if twice:
                raise ValueError(f"given more than once: {', '.join(twice)}")
        both = [self.dataset.titles[item] for item in chosen if item in liked]
        if both:
            raise ValueError(f"both in the history and among the candidates: {', '.join(both)}")
        if len(chosen) == 1:
            raise ValueError(f"one candidate cannot be ranked, give two or more: {self.dataset.titles[chosen[0]]}")
        notes = []
        if len(liked) > MAX_HISTORY:
            notes.append(f"{len(liked)} titles: the last {MAX_HISTORY} are used, as in the training")
        if len(liked) < MIN_HISTORY:
            notes.append(f"{len(liked)} of the {MIN_HISTORY} to {MAX_HISTORY} titles that the model was trained with")
        return liked, chosen, notes

    def _check_room(self, example: Example) -> None:
        """Raises ValueError if the prompt is longer than the language model's positions: its numbers would be wrong."""
        room = getattr(self.model.lm.config, "max_position_embeddings", None)
        longest = max(len(self.prompts.answer(item)) for item in example.candidates)
        length = len(self.prompts.prompt(example, self.choice)[0]) + longest
        if room is not None and length > room:
            raise ValueError(
                f"{len(example.candidates)} candidates make {length} tokens, the language model has room for {room}: "
                "ask for a shorter list"
            )

    def _ranked(self, example: Example, scores: Tensor, sequence_ranks: dict[int, int]) -> list[Recommendation]:
        """The candidates, best first. sequence_ranks: item -> its rank by the sequence model."""
        probabilities = scores.double().softmax(0).tolist()
        order = scores.argsort(descending=True, stable=True).tolist()
        found = [(example.candidates[i], probabilities[i], float(scores[i])) for i in order]
        return [
            Recommendation(rank, self.dataset.titles[item], probability, score, sequence_ranks[item])
            for rank, (item, probability, score) in enumerate(found, 1)
        ]

    def histories(self, count: int = 4, length: int = 5) -> list[list[str]]:
        """The latest titles of some users of the data set, as examples to try. They are spelt as in `Titles.known`."""
        names, item_of = self.dataset.names, self.titles.items
        users = (items for _, items in sorted(self.dataset.users.items()))
        found = (list(dict.fromkeys(item_of[names[item]] for item in items)) for items in users)
        long_enough = [items[-length:] for items in found if len(items) >= length]
        chosen = random.Random(0).sample(long_enough, min(count, len(long_enough)))
        return [[self.dataset.titles[item] for item in items] for items in chosen]
