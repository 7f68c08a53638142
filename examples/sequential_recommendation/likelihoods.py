"""Computes how likely each candidate of an example is as the answer to its prompt.

All candidates follow one prompt in one row, and a mask lets each see only the prompt and itself, so the prompt is
computed once. Some language models cannot do this: recurrences and convolutions mix neighbouring tokens whatever the
mask says, some models take no position ids, and an attention window counts the candidates that lie between. The
model's settings show most of these cases. Besides, the first row and every row longer than those before are compared
with a candidate that is computed alone. If the model fails, each candidate gets a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .data import Example
from .prompts import NO_ITEM, Choice, Prompts
from .recommender import Recommender


class Candidates:
    """The answers of a batch of examples, laid out for rows [prompt, answer, answer, ...], one row for each example.

    Each answer sees only the prompt and itself, so the prompt is computed once for all answers.
    answers: for each example the answers of its candidates, equally many for every example.

    tokens: int64 [B, Q], the answers one after another, then padding. own: int64 [B, Q], the number (from 0) of the
    candidate that each token belongs to, -1 for padding. first: bool [B, Q], whether an answer begins at the token.
    positions: int64 [B, Q], how many tokens of the same answer come before the token.
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
        """[B, 1, P+Q, P+Q]: 0 where a token (row) sees another (column), the lowest number of the dtype elsewhere.

        prompt: int64 [B, P], the prompts' attention mask. A padding token sees itself, because the attention of a token
        that sees nothing would be NaN.
        """
        B, P = prompt.shape
        L = P + self.tokens.shape[1]
        owner = torch.cat([torch.where(prompt != 0, -2, -1), self.own], dim=1)  # -2: the prompt, -1: padding
        same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -2)
        same &= ((owner != -1)[:, :, None] & (owner != -1)[:, None, :]).tril()
        same |= torch.eye(L, dtype=torch.bool, device=prompt.device)
        return torch.zeros(B, 1, L, L, dtype=dtype, device=prompt.device).masked_fill(
            ~same[:, None], torch.finfo(dtype).min
        )

    def sums(self, logits: Tensor) -> Tensor:
        """float32 [B, C]: the log-likelihoods of whole answers. logits: [B, 1+Q, vocabulary], those of the prompt's
        last token and of all answers' tokens."""
        columns = torch.arange(self.tokens.shape[1], device=logits.device).expand_as(self.tokens)
        # Column 0 of the logits predicts the first token of every answer, column j any other token j.
        before = torch.where(self.first, 0, columns)
        normaliser = logits.float().logsumexp(-1).gather(1, before)
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        found = logits[rows, before, self.tokens].float() - normaliser
        sums = found.new_zeros(len(logits), self.count + 1)  # the last column collects the padding
        return sums.scatter_add(1, self.own % (self.count + 1), found)[:, : self.count]


def candidate_likelihoods(
    model: Recommender, prompts: Prompts, examples: Sequence[Example], choice: Choice, gate: Tensor | None = None
) -> Tensor:
    """float32 [B, C] on the CPU: the log-likelihood of each candidate's title and newline after the example's prompt.

    gate [B, E] or [blocks, B, E]: replaces the model's own. Raises ValueError in training mode.
    """
    if model.training:
        raise ValueError("candidate_likelihoods: model.eval() first, dropout would move the scores")
    batch = to(prompts.collate(examples, [choice] * len(examples), answers=False), model.device)
    answers = [[prompts.answer(item) for item in example.candidates] for example in examples]
    with torch.no_grad():
        gate = model.gate(batch) if gate is None else gate.to(model.device)
        found = _packed(model, prompts.pad, batch, answers, gate) if model.reach else None
        if found is not None:
            return found.cpu()
        rows = [_apart(model, prompts.pad, *_one(batch, gate, i), answer) for i, answer in enumerate(answers)]
        return torch.stack([_sums(*row) for row in rows]).cpu()


def _packed(
    model: Recommender, pad: int, batch: dict[str, Tensor], answers: list[list[list[int]]], gate: Tensor
) -> Tensor | None:
    """The log-likelihoods [B, C] from one row for each example, or None if this model cannot compute them so."""
    candidates = Candidates(answers, pad, model.device)
    mask = batch["attention_mask"]
    L = mask.shape[1] + candidates.tokens.shape[1]
    if model.reach < L:
        return None
    try:
        logits = _side_by_side(model, batch, candidates, gate)
    except (ValueError, RuntimeError, TypeError, IndexError, AssertionError) as error:
        if model.tried or isinstance(error, torch.OutOfMemoryError):
            raise
        # Some models take no such mask, or shorten the row before an adapted layer. If the error has another cause, it
        # is raised again where each candidate has a row of its own.
        model.reach = 0
        return None
    if model.tried < L:
        longest = int((mask.sum(1) + (candidates.own >= 0).sum(1)).argmax())
        last = answers[longest][-1]
        alone, _, _ = _apart(model, pad, *_one(batch, gate, longest), [last])
        columns = (candidates.own[longest] == candidates.count - 1).nonzero()[:, 0] + 1
        if not _close(logits[longest, columns[:-1]], alone[0, 1 : len(last)]):
            model.reach = 0
            return None
        model.tried = L
    return candidates.sums(logits)


def _side_by_side(model: Recommender, batch: dict[str, Tensor], candidates: Candidates, gate: Tensor) -> Tensor:
    """Logits [B, 1+Q, vocabulary] of the rows [prompt, answer, answer, ...]."""
    mask, (B, Q) = batch["attention_mask"], candidates.tokens.shape
    L = mask.shape[1] + Q
    whole = dict(batch, input_ids=torch.cat([batch["input_ids"], candidates.tokens], 1))
    whole["item_ids"] = torch.cat([batch["item_ids"], torch.full_like(candidates.tokens, NO_ITEM)], 1)
    positions = torch.cat([(mask.cumsum(1) - 1).clamp(min=0), mask.sum(1, keepdim=True) + candidates.positions], 1)
    return model.logits(
        whole,
        keep=Q + 1,
        attention_mask=candidates.mask(mask, model.lm.get_input_embeddings().weight.dtype),
        position_ids=positions,
        ilora_gate=gate,
        ilora_segments=torch.arange(0, (B + 1) * L, L, dtype=torch.int32, device=model.device),
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two logits [T, vocabulary] differ by rounding at most.

    The norm of the difference over the norm of the centred logits may be 12 times the dtype's eps, or 1e-3 if that is
    more. (SmolLM2 has 2e-6 in float32 and 0.05, 7 times eps, in bfloat16.)
    """
    found, limit = found.float(), max(12 * torch.finfo(found.dtype).eps, 1e-3)
    expected = expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return bool((found - expected).norm() <= limit * spread)


def _one(batch: dict[str, Tensor], gate: Tensor, row: int) -> tuple[dict[str, Tensor], Tensor]:
    """(one example of a batch without its padding, its gate)"""
    words = batch["attention_mask"][row] != 0
    ids = {name: batch[name][row : row + 1, words] for name in ("input_ids", "attention_mask", "item_ids")}
    ids["history"] = batch["history"][row : row + 1]
    return ids, gate[..., row : row + 1, :]


def _apart(
    model: Recommender, pad: int, prompt: dict[str, Tensor], gate: Tensor, answers: list[list[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [C, K+1, vocabulary], tokens [C, K], mask [C, K]) of C answers to one prompt, each in a row of its own.

    logits[:, k] predict tokens[:, k]. K is the length of the longest answer; padding follows the shorter ones.
    """
    C, K = len(answers), max(map(len, answers))
    tokens = torch.tensor([answer + [pad] * (K - len(answer)) for answer in answers], device=model.device)
    mask = torch.tensor([[1] * len(answer) + [0] * (K - len(answer)) for answer in answers], device=model.device)
    behind = {"input_ids": tokens, "attention_mask": mask, "item_ids": torch.full_like(tokens, NO_ITEM)}
    rows = {name: torch.cat([prompt[name].expand(C, -1), behind[name]], 1) for name in behind}
    rows["history"] = prompt["history"].expand(C, -1)
    logits = model.logits(rows, keep=K + 1, ilora_gate=gate.expand(*gate.shape[:-2], C, gate.shape[-1]))
    return logits, tokens, mask


def _sums(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """float32 [C]: the log-likelihoods of whole answers. Takes what `_apart` returns."""
    found = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return (found * mask).sum(-1)


def to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
