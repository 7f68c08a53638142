"""The recommender: a causal language model with iLoRA, whose gate a frozen sequence model guides."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput

import ilora

from . import sequence_models
from .prompts import NO_ITEM, NO_LABEL, USER
from .sequence_models import SequenceEncoder, SequenceModel

TEMPERATURE = 0.1  # of the gate from z: at 0.1 users' gates differ from the first step on
GATES = ("sequence", "shuffled", "prompt", "random", "uniform")
_SETTINGS, _ADAPTER = "recommender.json", "adapter"
_SEQUENCE, _PROJECTOR = "sequence.safetensors", "projector.safetensors"
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "attention_chunk_size")


@dataclass(frozen=True)
class RecommenderConfig:
    """What the gate depends on, and how large the experts are.

    gate: "sequence", the sequence model's z of the user's history; "shuffled", the same, but in training each example
        of a batch gets the z of the next one; "prompt", the mean embedding of the prompt's words; "random", a random z
        that each user always gets; "uniform", nothing: every weight is 1/E, which is plain LoRA.
    soft_prompt: whether the prompt also has z, projected to one token after the history.
    The other fields are those of `ilora.ILoRAConfig`; r is the total rank.
    """

    gate: str = "sequence"
    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    num_experts: int = 4
    target_modules: str = "all-linear"
    soft_prompt: bool = False


def _network(config: RecommenderConfig, z_dim: int) -> ilora.GateNetwork:
    """A new gate network. Raises ValueError for a gate that is none of GATES."""
    if config.gate in ("sequence", "shuffled", "random"):
        return ilora.SequenceGate(z_dim, config.num_experts, temperature=TEMPERATURE)
    if config.gate == "prompt":
        return ilora.PromptGate(config.num_experts)
    if config.gate == "uniform":
        return ilora.UniformGate(config.num_experts)
    raise ValueError(f"unknown gate {config.gate!r}: expected one of {', '.join(GATES)}")


def _adapter(config: RecommenderConfig) -> ilora.ILoRAConfig:
    """The adapters' configuration, in float32 for any dtype of the language model.

    bfloat16 would round away the steps of the paper's learning rates.
    """
    names = ("r", "lora_alpha", "lora_dropout", "num_experts", "target_modules")
    return ilora.ILoRAConfig(**{name: getattr(config, name) for name in names}, adapter_dtype="float32")


class Recommender(nn.Module):
    """A causal language model that ranks candidates for a user.

    Args:
        lm: any transformers causal language model, without adapters; it is frozen and gets adapters in place.
        sequence_model: a trained model; it is frozen here, and runs without dropout in any mode of the recommender.
        config: see `RecommenderConfig`.
    Training changes the adapters, the gate network and the projector of item embeddings [z_dim] -> [H], which has two
    linear layers.
    With config.soft_prompt it also changes a projector of z, of the same form.
    """

    items: Tensor
    accepts_loss_kwargs = True  # tells transformers' Trainer to pass num_items_in_batch to forward

    def __init__(self, lm: Any, sequence_model: SequenceModel, config: RecommenderConfig | None = None) -> None:
        super().__init__()
        self.settings = config or RecommenderConfig()
        gate = _network(self.settings, sequence_model.dim)
        embedding = lm.get_input_embeddings()
        self.lm = ilora.inject(lm, _adapter(self.settings), gate=gate)
        self.encoder = SequenceEncoder(sequence_model)
        self.projector = _projector(sequence_model.dim, embedding)
        self.user_projector = _projector(sequence_model.dim, embedding) if self.settings.soft_prompt else None
        lm.get_output_embeddings().register_forward_pre_hook(_contiguous)
        self.register_buffer("items", self._items(), persistent=False)
        accepted = inspect.signature(lm.forward).parameters
        self._keeps = "logits_to_keep" in accepted
        self._positions = "position_ids" in accepted
        # reach: the longest row that may hold several candidates. tried: the longest that was checked to be right.
        self.reach, self.tried = _reach(lm) if self._positions else 0, 0

    def _items(self) -> Tensor:
        """The item embeddings [num_items, z_dim], scaled to a mean square of 1."""
        items = self.encoder.item_embeddings()
        return items / items.square().mean().sqrt()

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, L, H]: the embedding of each token, of the item where item_ids has its number (projected), or of the
        user's z where item_ids is USER (projected).

        Raises ValueError unless each row has one USER with a soft prompt, and none without.
        """
        item_ids = batch["item_ids"]
        embeddings = self.lm.get_input_embeddings()(batch["input_ids"])
        chosen, user = item_ids >= 0, item_ids == USER
        # Runs even if no item is chosen, so that the projector's parameters always take part in the graph.
        vectors = self.projector(self.items[item_ids[chosen]])
        embeddings = embeddings.masked_scatter(chosen[..., None], vectors.to(embeddings.dtype))
        expected = int(self.user_projector is not None)
        if (user.sum(1) != expected).any():
            raise ValueError(
                f"soft_prompt={self.settings.soft_prompt}: expected {expected} place for z in each prompt, got "
                f"{user.sum(1).tolist()}: make Prompts with soft_prompt={self.settings.soft_prompt}"
            )
        if self.user_projector is None:
            return embeddings
        z = self.user_projector(self.encoder(batch["history"]))
        return embeddings.masked_scatter(user[..., None], z.to(embeddings.dtype))

    def gate(self, batch: dict[str, Tensor]) -> Tensor:
        """The gate [B, E] (or [blocks, B, E]) of a batch of prompts. The prompts may have answers or not.

        Raises ValueError for a batch of one example in training with the shuffled gate.
        """
        if self.settings.gate in ("sequence", "shuffled", "random"):
            z = self._random(batch["users"]) if self.settings.gate == "random" else self.encoder(batch["history"])
            if self.settings.gate == "shuffled" and self.training:
                if len(z) < 2:
                    raise ValueError("gate='shuffled': expected two examples at once or more in training, got 1")
                z = z.roll(1, 0)
            return ilora.gate_of(self.lm, ilora_z=z)
        if self.settings.gate == "uniform":
            return self.lm.ilora_gate(len(batch["input_ids"]), self.device)
        words = (batch["attention_mask"] != 0) & (batch["item_ids"] == NO_ITEM)
        if "labels" in batch:
            answer = batch["labels"].shape[1]
            words[:, -answer:] &= batch["labels"] == NO_LABEL
        return ilora.gate_of(self.lm, ilora_prompt_mask=words, input_ids=batch["input_ids"])

    def _random(self, users: Tensor) -> Tensor:
        rows = [torch.randn(self.encoder.dim, generator=torch.Generator().manual_seed(user)) for user in users.tolist()]
        return torch.stack(rows).to(users.device)

    def logits(self, batch: dict[str, Tensor], keep: int, **extra: Any) -> Tensor:
        """The logits [B, keep, vocabulary] of the last columns.

        extra: arguments for the language model that replace the ones computed here.
        """
        mask = batch["attention_mask"]
        inputs = {"attention_mask": mask, "use_cache": False, "ilora_gate": None, **extra}
        if inputs["ilora_gate"] is None:
            inputs["ilora_gate"] = self.gate(batch)
        if self._positions:
            inputs.setdefault("position_ids", (mask.cumsum(1) - 1).clamp(min=0))
        else:
            inputs.pop("position_ids", None)
        if self._keeps:
            inputs["logits_to_keep"] = keep  # logits of a whole prompt would take much memory
        return self.lm(inputs_embeds=self.embed(batch), **inputs).logits[:, -keep:]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        item_ids: Tensor,
        history: Tensor,
        users: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ModelOutput:
        """(loss, logits [B, K, vocabulary]) for the tensors that `Prompts.collate` returns.

        The loss is the mean over the answers' tokens, or their sum divided by num_items_in_batch if that is given.
        logits[:, k] predicts labels[:, k].
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "item_ids": item_ids}
        batch |= {"history": history, "users": users, "labels": labels}
        logits = self.logits(batch, labels.shape[1] + 1)[:, :-1]
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LABEL, reduction="sum")
        tokens = (labels != NO_LABEL).sum()
        loss = total / (tokens if num_items_in_batch is None else num_items_in_batch)
        return ModelOutput(loss=loss, logits=logits)

    def save(self, path: Path) -> Path:
        """Writes adapter, gate network, projector, sequence model and settings, but not the frozen language model.

        The directory appears complete, in place of one that is there already.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = path.parent / f".{path.name}-{uuid.uuid4().hex}"
        try:
            stage.mkdir()
            ilora.save_adapter(self.lm, stage / _ADAPTER)
            sequence_models.save(self.encoder.model, stage / _SEQUENCE)
            saved = {**self.projector.state_dict(), "z.mean": self.encoder.mean, "z.deviation": self.encoder.deviation}
            if self.user_projector is not None:
                saved |= self.user_projector.state_dict(prefix="user.")
            save_file({name: tensor.detach().contiguous() for name, tensor in saved.items()}, stage / _PROJECTOR)
            (stage / _SETTINGS).write_text(json.dumps(asdict(self.settings), indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(path, ignore_errors=True)
            stage.rename(path)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        return path

    def restore(self, path: Path) -> Recommender:
        """Loads what `save` wrote into this recommender. The parameters stay the same objects, as an optimizer needs.

        Raises what `load` raises, and ValueError if the saved settings are not this recommender's.
        """
        config, sequence_model, projector = _read(path)
        if config != self.settings:
            raise ValueError(f"{path / _SETTINGS}: it holds {config}, this recommender is {self.settings}")
        self.encoder.model.load_state_dict(sequence_model.state_dict())
        self.items.copy_(self._items())
        self._fill(path, projector)
        ilora.load_adapter(self.lm, path / _ADAPTER)
        return self

    def _fill(self, path: Path, tensors: dict[str, Tensor]) -> None:
        user = {name.removeprefix("user."): tensor for name, tensor in tensors.items() if name.startswith("user.")}
        projector = {name: tensor for name, tensor in tensors.items() if not name.startswith(("z.", "user."))}
        try:
            self.projector.load_state_dict(projector)
            if self.user_projector is not None:
                self.user_projector.load_state_dict(user)
            self.encoder.mean.copy_(tensors["z.mean"])
            self.encoder.deviation.copy_(tensors["z.deviation"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path / _PROJECTOR}: does not fit this language model: {error}") from error


def _projector(dim: int, embedding: Any) -> nn.Sequential:
    """[dim] -> [H], two linear layers in float32, on the embedding's device."""
    hidden = embedding.embedding_dim
    last = nn.Linear(hidden, hidden)
    with torch.no_grad():  # the scale of word embeddings, so that the model can read what is projected
        last.weight.normal_(std=float(embedding.weight.float().std()) / (0.65 * hidden**0.5))
        last.bias.zero_()
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), last).to(embedding.weight.device)


def _contiguous(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook of the output embeddings that makes their input contiguous.

    torch multiplies a slice of the last tokens row by row, and copies the weights of the whole vocabulary for each row.
    """
    return (args[0].contiguous(), *args[1:])


def _reach(lm: Any) -> int:
    """The length of the longest row in which mask and position ids alone decide which token sees which.

    The model's settings decide it: 0 with recurrences, convolutions or ALiBi, otherwise the smallest attention window.
    """
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(lm, "_is_stateful", False) or getattr(config, "alibi", False) or kinds - _ATTENTION:
        return 0
    windows = [getattr(config, name, None) for name in _WINDOWS]
    return min([window for window in windows if isinstance(window, int) and window > 0], default=sys.maxsize)


def load(path: Path, lm: Any) -> Recommender:
    """Loads a saved recommender, bit for bit, onto the language model it was trained with. Returns it in eval mode.

    Raises FileNotFoundError, or ValueError naming the file that is damaged or does not fit.
    """
    config, sequence_model, projector = _read(path)
    model = Recommender(lm, sequence_model.to(next(lm.parameters()).device), config)
    model._fill(path, projector)
    ilora.load_adapter(model.lm, path / _ADAPTER)
    return model.eval()


def _read(path: Path) -> tuple[RecommenderConfig, SequenceModel, dict[str, Tensor]]:
    for name in (_SETTINGS, _PROJECTOR, _SEQUENCE, _ADAPTER):
        if not (path / name).exists():
            raise FileNotFoundError(f"{path / name}: is missing; expected a directory that Recommender.save wrote")
    try:
        config = RecommenderConfig(**json.loads((path / _SETTINGS).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / _SETTINGS}: expected the settings of a recommender: {error}") from error
    return config, sequence_models.load(path / _SEQUENCE), load_file(path / _PROJECTOR)
