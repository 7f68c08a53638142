"""Writes prompts with a user's history and the candidates: their titles and, after each title, its item embedding.

At the position of an item embedding, `input_ids` has the pad token's id, so the vocabulary need not grow; `item_ids`
says which item's embedding replaces that token's. Nothing here is random: (seed, example, step) decide which template
a prompt has and whether it has item embeddings.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Dataset, Example
from .sequence_models import pad_histories

# (before the history, between history and candidates, after the candidates)
TEMPLATES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "movies": (
        ("Films this viewer saw, oldest first:", ".\nFilms on offer:", ".\nThe viewer will see next:"),
        ("A viewer went through these movies in order:", ".\nPick the next movie out of", ".\nNext movie:"),
        ("Watched so far:", ".\nOne of these comes next:", ".\nIt is"),
    ),
    "artists": (
        ("Artists this listener played, oldest first:", ".\nArtists on offer:", ".\nThe listener will play next:"),
        ("A listener went through these artists in order:", ".\nPick the next artist out of", ".\nNext artist:"),
        ("Listened to so far:", ".\nOne of these comes next:", ".\nIt is"),
    ),
    "games": (
        ("Games this player bought, oldest first:", ".\nGames on offer:", ".\nThe player will buy next:"),
        ("A player went through these games in order:", ".\nPick the next game out of", ".\nNext game:"),
        ("Played so far:", ".\nOne of these comes next:", ".\nIt is"),
    ),
    "neutral": (
        ("Items this user chose, oldest first:", ".\nItems on offer:", ".\nThe user will choose next:"),
        ("A user went through these items in order:", ".\nPick the next item out of", ".\nNext item:"),
        ("Chosen so far:", ".\nOne of these comes next:", ".\nIt is"),
    ),
}
NO_ITEM, USER, NO_LABEL = -1, -2, -100  # USER: the place of the user's z


class Choice(NamedTuple):
    """How the prompt of an example is written: its template's number, and whether item embeddings follow the titles."""

    template: int
    hybrid: bool


def choose(kind: str, example: Example, seed: int, step: int, hybrid_share: float) -> Choice:
    """The choice for an example at a global step: the same in every process, and in any order of the examples."""
    draw = random.Random(f"{seed}/{step}/{example.user}/{example.history}/{example.target}")
    return Choice(draw.randrange(len(TEMPLATES[kind])), draw.random() < hybrid_share)


def hybrid_share(step: int, total: int, curriculum: float) -> float:
    """The share of prompts with item embeddings at a global step of `total`.

    It rises from 0 to 1 over the share `curriculum` of all steps and then stays 1. With a curriculum of 0 it is always
    1.
    """
    return 1.0 if curriculum <= 0 else min(1.0, step / max(1.0, curriculum * total))


def user_number(user: str) -> int:
    """A number below 2^63 that a user's name decides, the same in every process and run."""
    return int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "big") >> 1


class Prompts:
    """Writes the prompts of one data set for one tokenizer.

    Args:
        tokenizer: any transformers tokenizer. Template parts and titles are tokenised separately and then joined, so
            that a title has the same tokens everywhere.
        dataset: has the titles.
        kind: a key of TEMPLATES.
        soft_prompt: whether the prompt has a place for the user's z, after the history.
    Raises ValueError for another kind, for a tokenizer without a pad or end token, and for a title or newline that the
    tokenizer turns into no token.
    """

    def __init__(self, tokenizer: Any, dataset: Dataset, kind: str = "neutral", soft_prompt: bool = False) -> None:
        if kind not in TEMPLATES:
            raise ValueError(f"unknown prompts {kind!r}: expected one of {', '.join(TEMPLATES)}")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ValueError("the tokenizer has neither a pad nor an end token; set tokenizer.pad_token")
        self.kind, self.tokenizer, self.dataset, self.pad = kind, tokenizer, dataset, int(pad)
        self.soft_prompt = soft_prompt
        start = tokenizer.bos_token_id
        begins = start is not None and tokenizer("")["input_ids"][:1] == [start]
        self.start = [start] if begins else []
        self.words = [tuple(self._tokens(part) for part in template) for template in TEMPLATES[kind]]
        self.comma, self.newline = self._tokens(","), self._tokens("\n")
        titles = [" " + title for title in dataset.titles]
        self.titles: list[list[int]] = tokenizer(titles, add_special_tokens=False)["input_ids"]
        if not self.newline:
            raise ValueError("the tokenizer makes nothing of a newline, with which an answer ends")
        for title, ids in zip(dataset.titles, self.titles, strict=True):
            if not ids:
                raise ValueError(f"the tokenizer makes nothing of the title {title!r}")

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(self, item: int) -> list[int]:
        """The tokens that the model is to write: the item's title and a newline."""
        return self.titles[item] + self.newline

    def prompt(self, example: Example, choice: Choice) -> tuple[list[int], list[int]]:
        """(token ids, item ids), equally long. An item id is -1 except where an embedding goes: the item's number for
        an item embedding, USER (-2) for the user's z."""
        before, between, behind = self.words[choice.template]
        ids, items = [*self.start], [NO_ITEM] * len(self.start)

        def write(tokens: list[int]) -> None:
            ids.extend(tokens)
            items.extend([NO_ITEM] * len(tokens))

        for words, listed in ((before, example.history), (between, example.candidates)):
            write(words)
            for i, item in enumerate(listed):
                write((self.comma if i else []) + self.titles[item])
                if choice.hybrid:
                    ids.append(self.pad)
                    items.append(item)
            if self.soft_prompt and words is before:
                ids.append(self.pad)
                items.append(USER)
        write(behind)
        return ids, items

    def longest(self, histories: Sequence[Sequence[int]], candidates: int, hybrid: bool) -> int:
        """The most tokens that a prompt of these histories, with its answer, may have with any candidates."""
        each = sorted(map(len, self.titles))
        around = max(sum(map(len, words)) for words in self.words) + len(self.start) + self.soft_prompt
        listed = [[len(self.titles[item]) for item in history] for history in histories]
        history = max(sum(lengths) + (len(self.comma) + hybrid) * len(lengths) for lengths in listed)
        offered = sum(each[-candidates:]) + (len(self.comma) + hybrid) * candidates
        return around + history + offered + each[-1] + len(self.newline)

    def collate(
        self, examples: Sequence[Example], choices: Sequence[Choice], answers: bool = True
    ) -> dict[str, Tensor]:
        """One batch of B examples, padded on the left to L tokens. answers: whether each prompt's answer follows it.

        Returns, on the CPU: input_ids, attention_mask, item_ids int64 [B, L]; history int64 [B, 10], padded with the
        number of items; users int64 [B], from `user_number`. With answers also labels int64 [B, K], where K is the
        length of the longest answer: the tokens of the last K columns if they belong to the answer, -100 otherwise.
        Raises ValueError for no examples.
        """
        if not examples:
            raise ValueError("collate: expected one example or more")
        rows = [self.prompt(example, choice) for example, choice in zip(examples, choices, strict=True)]
        written = [self.answer(example.target) if answers else [] for example in examples]
        length = max(len(ids) + len(answer) for (ids, _), answer in zip(rows, written, strict=True))
        tensors: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "item_ids": []}
        for (ids, items), answer in zip(rows, written, strict=True):
            padding = length - len(ids) - len(answer)
            tensors["input_ids"].append([self.pad] * padding + ids + answer)
            tensors["attention_mask"].append([0] * padding + [1] * (length - padding))
            tensors["item_ids"].append([NO_ITEM] * padding + items + [NO_ITEM] * len(answer))
        if answers:
            longest = max(map(len, written))
            tensors["labels"] = [[NO_LABEL] * (longest - len(answer)) + answer for answer in written]
        batch = {name: torch.tensor(values) for name, values in tensors.items()}
        batch["history"] = pad_histories([example.history for example in examples], self.dataset.num_items)
        batch["users"] = torch.tensor([user_number(example.user) for example in examples])
        return batch

    def written(self) -> list[str]:
        """The titles as the model can write them: some tokenizers decode a title with extra spaces."""
        return [title.strip() for title in self.tokenizer.batch_decode(self.titles)]
