"""Trains a sequence model on windows and takes the epoch that is best on the validation users."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from .data import Example, Window
from .metrics import candidate_scores, catalogue_scores, ndcg, ranks
from .sequence_models import SequenceModel, pad_histories


class Epoch(NamedTuple):
    """loss: the mean cross-entropy of the epoch's windows. ndcg: of the validation candidates."""

    loss: float
    ndcg: float


@dataclass(frozen=True)
class Settings:
    """How a sequence model is trained.

    patience: training stops after so many epochs without a better validation NDCG. With few users the NDCG is noisy.
    """

    epochs: int = 20
    batch_size: int = 512
    lr: float = 2e-3
    weight_decay: float = 0.0
    patience: int = 8


@torch.no_grad()
def target_ranks(
    model: SequenceModel, examples: Sequence[Example], whole: bool = False, batch_size: int = 1024
) -> Tensor:
    """int64 [N]: the target's rank among the candidates of each example. The model must be in eval mode.

    whole: among all items that are not in the history, instead.
    """
    found, chosen = [], catalogue_scores if whole else candidate_scores
    device = model.items.weight.device
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        history = pad_histories([example.history for example in batch], model.num_items).to(device)
        found.append(ranks(*chosen(model(history), batch)).cpu())
    return torch.cat(found)


def train_sequence_model(
    model: SequenceModel,
    train: Sequence[Window],
    val: Sequence[Example],
    settings: Settings = Settings(),
    seed: int = 0,
) -> list[Epoch]:
    """Trains the model in place with Adam on the cross-entropy of the next item over all items. Returns every epoch.

    An epoch takes every window once. Afterwards the model has the weights of the epoch with the best NDCG over the
    validation candidates, is frozen, and is in eval mode. The seed decides the order of windows and the dropout; the
    global random state does not change. Raises ValueError if there is nothing to train or validate on, and
    FloatingPointError if the loss is not finite.
    """
    if not train or not val or settings.epochs < 1:
        raise ValueError(f"{len(train)} windows, {len(val)} examples, {settings.epochs} epochs: expected some of each")
    device = model.items.weight.device
    history = pad_histories([window.history for window in train], model.num_items).to(device)
    target = torch.tensor([window.target for window in train], device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    record: list[Epoch] = []
    best, best_weights = -1.0, model.state_dict()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        shown = f"{type(model).__name__}, epochs ({settings.epochs} at most)"
        for number in trange(1, settings.epochs + 1, desc=shown, leave=False, disable=None):
            loss = _epoch(model, optimizer, history, target, settings.batch_size)
            quality = ndcg(target_ranks(model.eval(), val), len(val[0].candidates))
            record.append(Epoch(loss, quality))
            if quality > best:
                best, best_weights, best_number = quality, copy.deepcopy(model.state_dict()), number
            elif number - best_number >= settings.patience:
                break
    model.load_state_dict(best_weights)
    model.requires_grad_(False).eval()
    return record


def _epoch(
    model: SequenceModel, optimizer: torch.optim.Optimizer, history: Tensor, target: Tensor, batch_size: int
) -> float:
    model.train()
    total = 0.0
    for rows in torch.randperm(len(target)).to(target.device).split(batch_size):
        loss = F.cross_entropy(model(history[rows]), target[rows])
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss.item()}: try a lower learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
    return total / len(target)
