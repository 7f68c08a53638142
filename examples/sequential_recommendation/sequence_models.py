"""SASRec, GRU4Rec and Caser compute z [64] from a history of items, and a score for every item from z.

All take history int64 [N, L]: item ids, with the padding id (the number of items) before or after the items of a row.
They read the last `max_length` items of each row. z does not depend on the padding nor, in eval mode, on the other
rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .data import MAX_HISTORY, Window
from .files import write_whole


def pad_histories(histories: Sequence[Sequence[int]], num_items: int, length: int = MAX_HISTORY) -> Tensor:
    """history int64 [N, length], padded at the end with num_items. Longer histories lose their beginning."""
    rows = [list(history[-length:]) for history in histories]
    return torch.tensor([row + [num_items] * (length - len(row)) for row in rows], dtype=torch.long).view(-1, length)


class SequenceModel(nn.Module):
    """The base of the three models: item embeddings [num_items + 1, dim], scores from them, and the order of padding.

    A subclass defines `encode(items, lengths) -> z [N, dim]`: row n of items [N, max_length] has lengths[n] items, then
    padding. fingerprint: that of the data it was trained on, from `Experiment.fingerprint`, or "" if unknown.
    """

    kind = ""
    fingerprint = ""

    def __init__(self, num_items: int, dim: int = 64, max_length: int = MAX_HISTORY, dropout: float = 0.2) -> None:
        super().__init__()
        if min(num_items, dim, max_length) < 1 or not 0.0 <= dropout < 1.0:
            raise ValueError(f"{num_items=}, {dim=}, {max_length=}, {dropout=}: expected sizes >= 1, 0 <= dropout < 1")
        self.config: dict[str, Any] = {
            "num_items": num_items,
            "dim": dim,
            "max_length": max_length,
            "dropout": dropout,
        }
        self.num_items, self.dim, self.max_length = num_items, dim, max_length
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=num_items)
        nn.init.normal_(self.items.weight, std=dim**-0.5)
        nn.init.zeros_(self.items.weight.data[num_items])
        self.dropout = nn.Dropout(dropout)

    def encode(self, items: Tensor, lengths: Tensor) -> Tensor:
        raise NotImplementedError

    def align(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """(items [N, max_length], lengths [N]): the last items of each row, followed by padding."""
        if history.ndim != 2 or history.dtype != torch.long:
            raise ValueError(f"history: expected int64 [N, L], got {history.dtype} {list(history.shape)}")
        padding = history == self.num_items
        items = history.gather(1, padding.int().argsort(dim=1, descending=True, stable=True))[:, -self.max_length :]
        items = F.pad(items, (self.max_length - items.shape[1], 0), value=self.num_items)
        lengths = (items != self.num_items).sum(1)
        if (lengths == 0).any():
            raise ValueError("history: a row holds no item")
        return items.gather(1, (items == self.num_items).int().argsort(dim=1, stable=True)), lengths

    def represent(self, history: Tensor) -> Tensor:
        """z [N, dim] of history int64 [N, L]. Raises ValueError for a row without items or another dtype or rank."""
        return self.encode(*self.align(history))

    def scores(self, z: Tensor) -> Tensor:
        """[N, num_items]: the inner product of z [N, dim] with every item's embedding."""
        return z @ self.items.weight[: self.num_items].T

    def forward(self, history: Tensor) -> Tensor:
        """The scores [N, num_items] of history int64 [N, L]."""
        return self.scores(self.represent(history))


def last(states: Tensor, lengths: Tensor) -> Tensor:
    """The last state [N, dim] of each row of states [N, L, dim]: the one at lengths - 1."""
    return states[torch.arange(len(states), device=states.device), lengths - 1]


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, both with a norm before them and a residual connection."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, dim] -> [N, L, dim]"""
        n, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(n, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(n, length, dim)))
        return x + self.dropout(self.feed(self.feed_norm(x)))


class SASRec(SequenceModel):
    """Self-attentive sequential recommendation (arXiv 1808.09781). Positions count from the last item backwards."""

    kind = "sasrec"

    def __init__(self, num_items: int, blocks: int = 2, heads: int = 2, **shared: Any) -> None:
        super().__init__(num_items, **shared)
        if blocks < 1 or heads < 1 or self.dim % heads:
            raise ValueError(f"{blocks=}, {heads=}: expected at least one of each, and heads that divide {self.dim}")
        self.config |= {"blocks": blocks, "heads": heads}
        self.positions = nn.Embedding(self.max_length, self.dim)
        nn.init.normal_(self.positions.weight, std=self.dim**-0.5)
        self.blocks = nn.ModuleList(Block(self.dim, heads, self.config["dropout"]) for _ in range(blocks))
        self.norm = nn.LayerNorm(self.dim)

    def states(self, items: Tensor, lengths: Tensor) -> Tensor:
        """[N, L, dim]: position t sees items 0 to t only, so no item sees the padding at the end."""
        positions = (lengths[:, None] - 1 - torch.arange(items.shape[1], device=items.device)).clamp(min=0)
        x = self.dropout(self.items(items) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def encode(self, items: Tensor, lengths: Tensor) -> Tensor:
        return last(self.states(items, lengths), lengths)


class GRU4Rec(SequenceModel):
    """A gated recurrent unit over the items (arXiv 1511.06939). A linear layer projects its last state to z."""

    kind = "gru4rec"

    def __init__(self, num_items: int, layers: int = 1, **shared: Any) -> None:
        super().__init__(num_items, **shared)
        self.config |= {"layers": layers}
        self.gru = nn.GRU(self.dim, self.dim, layers, batch_first=True)
        self.out = nn.Linear(self.dim, self.dim)

    def encode(self, items: Tensor, lengths: Tensor) -> Tensor:
        states, _ = self.gru(self.dropout(self.items(items)))
        return self.out(self.dropout(last(states, lengths)))


class Caser(SequenceModel):
    """Convolutions over the items' embeddings as an image [max_length, dim] (arXiv 1809.07426), without user embedding.

    Horizontal filters span 2, 3 and 4 items and are pooled over time. Vertical filters weigh the positions. The image
    ends with the last item, and zeros fill it before the first.
    """

    kind = "caser"

    def __init__(self, num_items: int, horizontal: int = 16, vertical: int = 4, **shared: Any) -> None:
        super().__init__(num_items, **shared)
        self.config |= {"horizontal": horizontal, "vertical": vertical}
        heights = [height for height in (2, 3, 4) if height <= self.max_length]
        self.horizontal = nn.ModuleList(nn.Conv1d(self.dim, horizontal, height) for height in heights)
        self.vertical = nn.Linear(self.max_length, vertical, bias=False)
        self.out = nn.Linear(vertical * self.dim + len(heights) * horizontal, self.dim)

    def encode(self, items: Tensor, lengths: Tensor) -> Tensor:
        # Rotates each row, so that its padding comes first.
        rotated = (torch.arange(self.max_length, device=items.device) + lengths[:, None]) % self.max_length
        image = self.items(items.gather(1, rotated)).transpose(1, 2).contiguous()
        wide = [torch.relu(convolution(image)).amax(2) for convolution in self.horizontal]
        # A 2-d product, since torch rounds a 3-d one differently once its weight is frozen.
        tall = self.vertical(image.flatten(0, 1)).view(len(image), -1)
        return self.out(self.dropout(torch.cat([tall, *wide], dim=1)))


class Popularity(SequenceModel):
    """Scores an item by the number of training windows whose target it is, whatever the history."""

    def __init__(self, num_items: int, train: Iterable[Window]) -> None:
        super().__init__(num_items, dim=1)
        counts = torch.tensor([window.target for window in train]).bincount(minlength=num_items + 1)
        self.items.weight.data[:, 0] = counts.float()

    def encode(self, items: Tensor, lengths: Tensor) -> Tensor:
        return torch.ones(len(items), 1, device=items.device)


KINDS: dict[str, type[SequenceModel]] = {model.kind: model for model in (SASRec, GRU4Rec, Caser)}


def build(kind: str, num_items: int, seed: int = 0, **settings: Any) -> SequenceModel:
    """A new model of a kind ("sasrec", "gru4rec", "caser"). The seed alone decides its weights.

    Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown sequence model {kind!r}: expected one of {', '.join(KINDS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[kind](num_items, **settings)


def save(model: SequenceModel, path: Path) -> None:
    """Writes one safetensors file with the settings as JSON in its header. It appears complete or not at all."""
    settings = {"kind": model.kind, **model.config} | ({"fingerprint": model.fingerprint} if model.fingerprint else {})
    header = {"ilora_sequence_model": json.dumps(settings)}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_whole(path, safetensors.torch.save(tensors, header))


def load(path: Path) -> SequenceModel:
    """Loads a saved model onto the CPU, bit for bit. Returns it frozen and in eval mode.

    Raises FileNotFoundError, or ValueError naming the file if it is not a complete sequence model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no sequence model at {path}")
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["ilora_sequence_model"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        fingerprint = settings.pop("fingerprint", "")
        model = build(settings.pop("kind"), settings.pop("num_items"), **settings)
        model.fingerprint = fingerprint
        model.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected a saved sequence model: {error}") from error
    return model.requires_grad_(False).eval()


class SequenceEncoder(nn.Module):
    """A trained model as a fixed part of another one: z [N, dim] of history int64 [N, L], without gradients or dropout.

    It stays in eval mode whatever mode its parent has, and no gradient reaches its parameters. After `standardise` z
    has mean 0 and deviation 1 over the histories given there, as after a batch norm with fixed statistics.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.dim, self.num_items = model.dim, model.num_items
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("deviation", torch.ones(self.dim))

    def train(self, mode: bool = True) -> SequenceEncoder:
        """Stays in eval mode: with dropout, the frozen model would return a different z each time."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, history: Tensor) -> Tensor:
        return (self.model.represent(history) - self.mean) / self.deviation

    @torch.no_grad()
    def standardise(self, histories: Sequence[Sequence[int]], batch_size: int = 1024) -> None:
        """Sets the mean and deviation by which `forward` standardises z, from the z of these histories.

        Then the gate depends on what tells users apart and not on what they share. Raises ValueError for fewer than two
        histories.
        """
        if len(histories) < 2:
            raise ValueError(f"standardise: expected two histories or more, got {len(histories)}")
        rows = pad_histories(histories, self.num_items).to(self.mean.device)
        z = torch.cat([self.model.represent(some) for some in rows.split(batch_size)])
        self.mean.copy_(z.mean(0))
        self.deviation.copy_(z.std(0).clamp(min=1e-6))

    def item_embeddings(self) -> Tensor:
        """The item embeddings [num_items, dim], which a projector turns into embeddings for the prompts."""
        return self.model.items.weight.detach()[: self.num_items]
