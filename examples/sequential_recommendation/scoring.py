"""Predicts many examples with a recommender: the ranks of their candidates, and the titles that it writes by itself.

`shortlist` is what `recommend.py` shows to the language model, and `shortlist_ranks` measures that.
A prompt depends on its example alone, and the rows of a batch do not see each other. So neither the batch size nor the
number of workers changes a prediction.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from .data import Dataset, Example
from .likelihoods import candidate_likelihoods, to
from .metrics import ranks
from .prompts import Choice, Prompts
from .recommender import Recommender
from .sequence_models import SequenceModel, pad_histories
from .sequence_training import target_ranks

STANDARD = Choice(template=0, hybrid=True)  # the default prompts of an evaluation


def generate(
    model: Recommender, prompts: Prompts, examples: Sequence[Example], choice: Choice, **options: Any
) -> list[str]:
    """The text that the model writes after each prompt, up to a newline.

    It decodes greedily. options: further arguments for transformers' generate, such as num_beams.
    Raises ValueError in training mode.
    """
    if model.training:
        raise ValueError("generate: model.eval() first, dropout would change the text")
    batch = to(prompts.collate(examples, [choice] * len(examples), answers=False), model.device)
    ends = {prompts.newline[-1], prompts.tokenizer.eos_token_id} - {None}
    longest = max(map(len, prompts.titles)) + len(prompts.newline)  # of all titles: the same limit in every batch
    settings = {"do_sample": False, "max_new_tokens": longest, "pad_token_id": prompts.pad, **options}
    with torch.no_grad():
        written = model.lm.generate(
            inputs_embeds=model.embed(batch),
            attention_mask=batch["attention_mask"],
            ilora_gate=model.gate(batch),
            eos_token_id=sorted(ends),
            **settings,
        )
    return prompts.tokenizer.batch_decode(written, skip_special_tokens=True)


def batches(what: str, examples: Sequence[Example], prompts: Prompts, size: int) -> Iterator[list[int]]:
    """Yields batches of indices of examples, and shows on a terminal how far `what` has come.

    The examples of a batch have about the same length, so that little is padded. The longest come first, so that a lack
    of memory shows at once.
    """
    lengths = [sum(len(prompts.titles[item]) for item in (*e.history, *e.candidates)) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (-lengths[i], i))
    for start in trange(0, len(order), size, desc=what, leave=False, disable=None):
        yield order[start : start + size]


@contextmanager
def evaluating(model: Recommender) -> Iterator[None]:
    """Sets the model to eval mode and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def score(
    model: Recommender,
    prompts: Prompts,
    examples: Sequence[Example],
    choice: Choice = STANDARD,
    size: int = 16,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-likelihoods float32 [N, C], ranks of the targets int64 [N] as in `metrics.ranks`), for all examples.

    gate [N, E] or [blocks, N, E]: replaces the model's own.
    """
    found = torch.empty(len(examples), len(examples[0].candidates))
    with evaluating(model):
        for rows in batches("ranking", examples, prompts, size):
            given = None if gate is None else gate[..., rows, :]
            found[rows] = candidate_likelihoods(model, prompts, [examples[i] for i in rows], choice, given)
    return found, ranks(found, torch.tensor([example.target_index for example in examples]))


def write(
    model: Recommender, prompts: Prompts, examples: Sequence[Example], choice: Choice = STANDARD, size: int = 16
) -> list[str]:
    """The generated texts of all examples, in the order of the examples, for `metrics.text_ratios`."""
    found = [""] * len(examples)
    with evaluating(model):
        for rows in batches("writing", examples, prompts, size):
            for i, text in zip(rows, generate(model, prompts, [examples[i] for i in rows], choice), strict=True):
                found[i] = text
    return found


@torch.no_grad()
def gates(model: Recommender, prompts: Prompts, examples: Sequence[Example], choice: Choice, size: int = 256) -> Tensor:
    """float32 [N, E] on the CPU: the gate of each example, for `ilora.gate_stats` and `ilora.plot_gates`."""
    found = []
    with evaluating(model):
        for start in range(0, len(examples), size):
            some = examples[start : start + size]
            found.append(model.gate(to(prompts.collate(some, [choice] * len(some), answers=False), model.device)).cpu())
    return torch.cat(found, dim=-2)


@torch.no_grad()
def by_sequence(model: SequenceModel, history: Sequence[int]) -> list[int]:
    """All items that are not in the history, in the order of the sequence model's scores, highest first."""
    rows = pad_histories([history], model.num_items).to(model.items.weight.device)
    return [item for item in model(rows)[0].argsort(descending=True, stable=True).tolist() if item not in history]


def shortlist(dataset: Dataset, history: Sequence[int], order: Sequence[int], count: int) -> list[int]:
    """The first `count` items of the order whose titles differ from each other and from those of the history.

    Raises ValueError if there are fewer, or if count is less than 2.
    """
    if count < 2:
        raise ValueError(f"a shortlist of {count} cannot be ranked, give two or more")
    names = dataset.names
    seen, chosen = {names[item] for item in history}, []
    for item in order:
        if names[item] not in seen:
            seen.add(names[item])
            chosen.append(item)
    if len(chosen) < count:
        raise ValueError(f"a shortlist of {count}: only {len(chosen)} titles are not in the history")
    return chosen[:count]


def asked(
    history: Sequence[int], candidates: Sequence[int], target: int | None = None, user: str = "somebody"
) -> Example:
    """A question as an example like those of the training. target: one of the candidates, if it is known.

    The candidates are shuffled, so that none gains by its position; the same question always gets the same order.
    """
    shuffled = sorted(candidates)
    random.Random(f"{tuple(history)}/{shuffled}").shuffle(shuffled)
    return Example(user, tuple(history), shuffled[0] if target is None else target, tuple(shuffled))


def shortlist_ranks(
    model: Recommender, prompts: Prompts, examples: Sequence[Example], choice: Choice, size: int, count: int
) -> Tensor:
    """int64 [N]: the target's rank among all items that are not in the history, in the order of `recommend.py`.

    The language model ranks the sequence model's best `count`; the others follow in the sequence model's order.
    """
    sequence, dataset = model.encoder.model, prompts.dataset
    found = target_ranks(sequence, examples, whole=True).clamp(min=count + 1)
    shown = {i: shortlist(dataset, e.history, by_sequence(sequence, e.history), count) for i, e in enumerate(examples)}
    within = [i for i, items in shown.items() if examples[i].target in items]
    if within:
        # With the user's own name, from which the random gate draws z.
        questions = [asked(examples[i].history, shown[i], examples[i].target, examples[i].user) for i in within]
        found[within] = score(model, prompts, questions, choice, size)[1]
    return found
