"""What a recommender predicts: the likelihood of each candidate, and the title that it writes by itself.

Prompts and choices depend on the example alone and rows do not see each other, so neither the size of a batch nor the
number of workers changes a prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .data import Example
from .metrics import ranks
from .prompts import Choice, Prompts
from .recommender import Recommender

STANDARD = Choice(template=0, hybrid=True)  # how every example is put in an evaluation


class Candidates:
    """The answers of a batch of examples behind their prompts, each seeing the prompt and itself only.

    prompts: what `Prompts.collate` made without answers, [B, P]; answers: for each example those of its candidates, as
    many for each. The prompt is computed once for all of them: one row [prompt, answer, answer, ...] an example.

    tokens, own: int64 [B, Q], the answers one after another, then padding, and the number (from 0) of the candidate
    that each belongs to, -1 for padding. first, positions: bool and int64 [B, Q]: where an answer begins, and how many
    of its tokens stand before each.
    """

    def __init__(self, answers: Sequence[Sequence[Sequence[int]]], pad: int, device: torch.device) -> None:
        self.count = len(answers[0])
        width = max(sum(map(len, row)) for row in answers)

        def table(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in values], device=device)

        self.tokens = table([[token for answer in row for token in answer] for row in answers], pad)
        self.own = table([[c for c, answer in enumerate(row) for _ in answer] for row in answers], -1)
        self.positions = table([[t for answer in row for t in range(len(answer))] for row in answers], 0)
        self.first = (self.positions == 0) & (self.own >= 0)

    def mask(self, prompt: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, 1, P+Q, P+Q]: 0 where a token (row) sees another (column), the lowest number elsewhere.

        prompt: int64 [B, P], its attention mask. Padding sees itself alone: a row that sees nothing would be NaN.
        """
        B, P = prompt.shape
        L = P + self.tokens.shape[1]
        owner = torch.cat([torch.where(prompt != 0, -2, -1), self.own], dim=1)  # -2: the prompt's, -1: padding
        same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -2)
        same &= ((owner != -1)[:, :, None] & (owner != -1)[:, None, :]).tril()
        same |= torch.eye(L, dtype=torch.bool, device=prompt.device)
        return torch.zeros(B, 1, L, L, dtype=dtype, device=prompt.device).masked_fill(
            ~same[:, None], torch.finfo(dtype).min
        )

    def sums(self, logits: Tensor) -> Tensor:
        """float32 [B, C]: the log-likelihoods of whole answers, from logits [B, 1+Q, vocabulary] of the prompt's last
        token and of all answers' tokens."""
        places = torch.arange(self.tokens.shape[1], device=logits.device).expand_as(self.tokens)
        before = torch.where(self.first, 0, places)  # column 0 is the prompt's end; column j stands before token j
        normaliser = logits.float().logsumexp(-1).gather(1, before)
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        found = logits[rows, before, self.tokens].float() - normaliser
        sums = found.new_zeros(len(logits), self.count + 1)  # the last column takes the padding
        return sums.scatter_add(1, self.own % (self.count + 1), found)[:, : self.count]


def candidate_likelihoods(
    model: Recommender, prompts: Prompts, examples: Sequence[Example], choice: Choice, gate: Tensor | None = None
) -> Tensor:
    """float32 [B, C]: log-likelihood of each candidate's title and newline, after the example's prompt. On the CPU.

    One forward for the batch. gate [B, E]: instead of the model's own. Raises ValueError in training mode.
    """
    if model.training:
        raise ValueError("candidate_likelihoods: model.eval() first, dropout would move the scores")
    batch = to(prompts.collate(examples, [choice] * len(examples), answers=False), model.device)
    answers = [[prompts.answer(item) for item in example.candidates] for example in examples]
    candidates = Candidates(answers, prompts.pad, model.device)
    mask, (B, Q) = batch["attention_mask"], candidates.tokens.shape
    whole = dict(batch, input_ids=torch.cat([batch["input_ids"], candidates.tokens], 1))
    whole["item_ids"] = torch.cat([batch["item_ids"], torch.full_like(candidates.tokens, -1)], 1)
    positions = torch.cat([(mask.cumsum(1) - 1).clamp(min=0), mask.sum(1, keepdim=True) + candidates.positions], 1)
    L = positions.shape[1]
    with torch.no_grad():
        logits = model.logits(
            whole,
            keep=Q + 1,
            attention_mask=candidates.mask(mask, model.lm.get_input_embeddings().weight.dtype),
            position_ids=positions,
            ilora_gate=model.gate(batch) if gate is None else gate.to(model.device),
            ilora_segments=torch.arange(0, (B + 1) * L, L, dtype=torch.int32, device=model.device),
        )
        return candidates.sums(logits).cpu()


def generate(
    model: Recommender, prompts: Prompts, examples: Sequence[Example], choice: Choice, **options: Any
) -> list[str]:
    """The text that the model writes after each prompt, up to a newline: greedy, unless the options of transformers'
    generate say otherwise (such as num_beams)."""
    if model.training:
        raise ValueError("generate: model.eval() first, dropout would change the text")
    batch = to(prompts.collate(examples, [choice] * len(examples), answers=False), model.device)
    ends = {prompts.newline[-1], prompts.tokenizer.eos_token_id} - {None}
    longest = max(map(len, prompts.titles)) + len(prompts.newline)  # of all, so that the batch does not matter
    settings = {"do_sample": False, "max_new_tokens": longest, "pad_token_id": prompts.pad, **options}
    with torch.no_grad():
        written = model.lm.generate(
            inputs_embeds=model.embed(batch["input_ids"], batch["item_ids"]),
            attention_mask=batch["attention_mask"],
            ilora_gate=model.gate(batch),
            eos_token_id=sorted(ends),
            **settings,
        )
    return prompts.tokenizer.batch_decode(written, skip_special_tokens=True)


def batches(examples: Sequence[Example], prompts: Prompts, size: int) -> Iterator[list[int]]:
    """The numbers of the examples in batches of about one length, so that little is padded."""
    lengths = [sum(len(prompts.titles[item]) for item in (*e.history, *e.candidates)) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def score(
    model: Recommender,
    prompts: Prompts,
    examples: Sequence[Example],
    choice: Choice = STANDARD,
    size: int = 16,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(likelihoods float32 [N, C], ranks of the targets int64 [N]), as `metrics.ranks`. Sets the model to eval mode and
    back. Every example counts, the last incomplete batch too. gate [N, E]: instead of the model's own."""
    found = torch.empty(len(examples), len(examples[0].candidates))
    training = model.training
    model.eval()
    try:
        for rows in batches(examples, prompts, size):
            given = None if gate is None else gate[..., rows, :]
            found[rows] = candidate_likelihoods(model, prompts, [examples[i] for i in rows], choice, given)
    finally:
        model.train(training)
    return found, ranks(found, torch.tensor([example.target_index for example in examples]))


def write(
    model: Recommender, prompts: Prompts, examples: Sequence[Example], choice: Choice = STANDARD, size: int = 16
) -> list[str]:
    """The generated texts of all examples, in their order, for `metrics.text_ratios`."""
    found = [""] * len(examples)
    training = model.training
    model.eval()
    try:
        for rows in batches(examples, prompts, size):
            for i, text in zip(rows, generate(model, prompts, [examples[i] for i in rows], choice), strict=True):
                found[i] = text
    finally:
        model.train(training)
    return found


@torch.no_grad()
def gates(model: Recommender, prompts: Prompts, examples: Sequence[Example], choice: Choice, size: int = 256) -> Tensor:
    """float32 [N, E] on the CPU, the gate of each example; for `ilora.gate_stats` and `ilora.plot_gates`."""
    training = model.training
    model.eval()
    try:
        found = []
        for start in range(0, len(examples), size):
            some = examples[start : start + size]
            found.append(model.gate(to(prompts.collate(some, [choice] * len(some), answers=False), model.device)).cpu())
    finally:
        model.train(training)
    return torch.cat(found, dim=-2)


def to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
