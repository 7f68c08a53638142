"""How likely each candidate of an example is as the answer to its prompt.

All candidates stand behind one prompt in one row, each seeing the prompt and itself only, so the prompt is computed
once. Not every language model can be asked so: recurrences and convolutions mix whatever stands side by side, some
positions cannot be given, windows count what stands between. The model's settings tell most of it, and the first row
and every longer one is tried; if a model cannot, each candidate gets a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .data import Example
from .prompts import NO_ITEM, Choice, Prompts
from .recommender import Recommender


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

    gate [B, E] or [blocks, B, E]: instead of the model's own. Raises ValueError in training mode.
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
    """The log-likelihoods [B, C] from one row an example; None if this model cannot be asked so."""
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
        model.reach = 0  # some take no such mask, or cut the row before a layer that is adapted; what else is wrong
        return None  # is so with a row for each too, and raised there
    if model.tried < L:
        longest = int((mask.sum(1) + (candidates.own >= 0).sum(1)).argmax())
        last = answers[longest][-1]
        alone, _, _ = _apart(model, pad, *_one(batch, gate, longest), [last])
        places = (candidates.own[longest] == candidates.count - 1).nonzero()[:, 0] + 1
        if not _alike(logits[longest, places[:-1]], alone[0, 1 : len(last)]):
            model.reach = 0
            return None
        model.tried = L
    return candidates.sums(logits)


def _side_by_side(model: Recommender, batch: dict[str, Tensor], candidates: Candidates, gate: Tensor) -> Tensor:
    """Logits [B, 1+Q, vocabulary] of the rows [prompt, answer, answer, …]."""
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


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two logits [T, vocabulary] differ by no more than rounding does, over all of them: by 12 units of their
    dtype's precision, or 1e-3. (SmolLM2 has 2e-6 in float32 and 0.05, 7 units, in bfloat16.)"""
    found, limit = found.float(), max(12 * torch.finfo(found.dtype).eps, 1e-3)
    expected = expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return bool((found - expected).norm() <= limit * spread)


def _one(batch: dict[str, Tensor], gate: Tensor, row: int) -> tuple[dict[str, Tensor], Tensor]:
    """One example of a batch without its padding, and its gate."""
    words = batch["attention_mask"][row] != 0
    ids = {name: batch[name][row : row + 1, words] for name in ("input_ids", "attention_mask", "item_ids")}
    ids["history"] = batch["history"][row : row + 1]
    return ids, gate[..., row : row + 1, :]


def _apart(
    model: Recommender, pad: int, prompt: dict[str, Tensor], gate: Tensor, answers: list[list[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [C, K+1, vocabulary], tokens [C, K], mask [C, K]) of C answers to one prompt, each in a row of its own.

    logits[:, k] predict tokens[:, k]; K is the longest answer's length, padding stands behind.
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
    """float32 [C]: the log-likelihoods of whole answers, from what `_apart` returns."""
    found = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return (found * mask).sum(-1)


def to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
