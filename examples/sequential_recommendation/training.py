"""Trains a recommender with transformers' Trainer, which does progress, logging, checkpoints, precision and processes.

The data loader returns indices of examples only. When a step begins, (seed, example, global step) decide the negatives,
the template, and whether the prompt has item embeddings. So resuming a run changes nothing.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .data import NUM_CANDIDATES, Example, Window, with_candidates
from .prompts import Choice, Prompts, choose, hybrid_share
from .recommender import Recommender

PRECISIONS = ("fp32", "bf16", "fp16", "bf16-frozen")
WITHOUT_EFFECT = ("save_steps",)  # settings that change no result


@dataclass(frozen=True)
class TrainingSettings:
    """How a recommender is trained; the defaults are the paper's.

    epochs, steps: how long; steps replaces epochs unless it is 0.
    batch_size, effective_batch: each process computes batch_size examples at once, and accumulates effective_batch of
        them for a step.
    lr, warmup: the learning rate rises from lr/100 to lr over the share `warmup` of all steps and then falls to lr/100
        as a cosine, or stays lr with patience. gate_lr: the gate's rate is gate_lr times that.
    patience: training ends once so many rankings of the validation examples in a row have had no better NDCG, and takes
        the weights that were best. 0: it ends after the last step and takes the last weights.
    weight_decay: for the projector and the gate.
    curriculum: the share of all steps over which the share of prompts with item embeddings rises from 0 to 1. 0: all
        prompts have them; None: no prompt has them.
    candidates: of each example.
    precision: fp32; bf16 or fp16, which cast the weights at every use; or bf16-frozen, which holds the frozen model in
        bfloat16. save_steps: steps between checkpoints, 0 for none.
    """

    epochs: float = 5
    steps: int = 0
    lr: float = 8e-4
    gate_lr: float = 0.3
    batch_size: int = 8
    effective_batch: int = 128
    warmup: float = 0.05
    weight_decay: float = 1e-5
    curriculum: float | None = 1.0
    seed: int = 0
    precision: str = "fp32"
    save_steps: int = 0
    patience: int = 0
    candidates: int = NUM_CANDIDATES

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.effective_batch % self.batch_size:
            raise ValueError(f"effective_batch={self.effective_batch}: expected a multiple of {self.batch_size=}")


def arguments(settings: TrainingSettings, out: Path) -> TrainingArguments:
    """The Trainer's arguments. out: the folder for checkpoints."""
    return TrainingArguments(
        output_dir=str(out),
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        learning_rate=settings.lr,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.effective_batch // settings.batch_size,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        seed=settings.seed,
        logging_steps=10,
        logging_nan_inf_filter=False,  # the filter would log the mean of earlier losses in place of nan
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=3,
        disable_tqdm=not sys.stderr.isatty() or "TQDM_DISABLE" in os.environ,
        remove_unused_columns=False,
        dataloader_drop_last=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )


def learning_rate_factor(step: int, total: int, warmup: float, falls: bool = True) -> float:
    """The learning rate at a step over the highest one: from 1/100 to 1 in warmup · total steps, then down to 1/100.

    It rises linearly and falls as a cosine, or stays 1 unless it `falls`.
    """
    rise, low = max(1, math.ceil(warmup * total)), 0.01
    if step < rise:
        return low + (1 - low) * step / rise
    if not falls:
        return 1.0
    part = min(1.0, (step - rise) / max(1, total - rise))
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * part))


def collate_indices(rows: list[int]) -> dict[str, Tensor]:
    """The data loader's collator: a batch is the indices of its examples."""
    return {"index": torch.tensor(rows)}


class RecommenderTrainer(Trainer):
    """transformers' Trainer for a recommender.

    model: on its device, in any mode. prompts: those of the data set. windows: the windows to train on. out: the folder
    for checkpoints.
    """

    def __init__(
        self,
        model: Recommender,
        prompts: Prompts,
        windows: Sequence[Window],
        settings: TrainingSettings,
        out: Path,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if not windows:
            raise ValueError("no window to train on")
        self.prompts, self.windows, self.settings = prompts, windows, settings
        super().__init__(
            model,
            arguments(settings, out),
            train_dataset=range(len(windows)),
            data_collator=collate_indices,
            callbacks=callbacks,
        )

    def examples_at(self, rows: Sequence[int], step: int, total: int) -> list[tuple[Example, Choice]]:
        """The examples of these windows at a global step of `total`, each with the choice of its prompt."""
        settings, prompts = self.settings, self.prompts
        share = 0.0 if settings.curriculum is None else hybrid_share(step, total, settings.curriculum)
        negatives = settings.seed * 1_000_003 + step
        windows = [self.windows[row] for row in rows]
        examples = with_candidates(windows, prompts.dataset, negatives, count=settings.candidates)
        choices = [choose(prompts.kind, example, settings.seed, step, share) for example in examples]
        return list(zip(examples, choices, strict=True))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """(the micro-batches of one step, the number of answer tokens in all of them)"""
        rows, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        sizes = [len(micro["index"]) for micro in rows]
        indices = [row for micro in rows for row in micro["index"].tolist()]
        chosen = self.examples_at(indices, self.state.global_step, self.state.max_steps)
        # Sorts by length, so that little is padded. The loss sums over the whole step, so any micro-batches will do.
        chosen.sort(key=lambda pair: len(self.prompts.prompt(*pair)[0]))
        remaining = iter(chosen)
        parts = [list(islice(remaining, size)) for size in sizes]
        batches = [self.prompts.collate([pair[0] for pair in part], [pair[1] for pair in part]) for part in parts]
        counted = [{"labels": batch["labels"], "shift_labels": batch["labels"]} for batch in batches]
        return batches, self._get_num_items_in_batch(counted, device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if getattr(self, "optimizer", None) is None:
            self.optimizer: Any = torch.optim.AdamW(parameter_groups(self.model, self.settings))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: learning_rate_factor(
                    step, num_training_steps, self.settings.warmup, falls=not self.settings.patience
                ),
            )
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        _check_finite(logs.get("loss", 0.0))
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # The Trainer's own _save would write the frozen language model too, and fail on its tied weights.
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.accelerator.unwrap_model(self.model).save(folder / "recommender")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.accelerator.unwrap_model(self.model).restore(Path(resume_from_checkpoint) / "recommender")


def _check_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the training loss is {loss}: try a lower learning rate")


def parameter_groups(model: Recommender, settings: TrainingSettings) -> list[dict[str, Any]]:
    """An optimizer's parameter groups: adapters, projectors and gate, each with its learning rate and weight decay."""
    gate = [] if model.lm.ilora_gate is None else [p for p in model.lm.ilora_gate.parameters() if p.requires_grad]
    own = {id(parameter) for parameter in gate}
    adapters = [p for p in model.lm.parameters() if p.requires_grad and id(p) not in own]
    projectors = [*model.projector.parameters()]
    if model.user_projector is not None:
        projectors += model.user_projector.parameters()
    groups = [
        {"params": adapters, "lr": settings.lr, "weight_decay": 0.0},
        {"params": projectors, "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": gate, "lr": settings.lr * settings.gate_lr, "weight_decay": settings.weight_decay},
    ]
    return [group for group in groups if group["params"]]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint in a folder. The Trainer writes trainer_state.json last."""
    complete = [path for path in checkpoints(folder) if (path / "trainer_state.json").exists()]
    return complete[-1] if complete else None


def train(
    model: Recommender,
    prompts: Prompts,
    windows: Sequence[Window],
    settings: TrainingSettings,
    out: Path,
    resume: Path | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> list[dict[str, float]]:
    """Trains the model in place and leaves it in eval mode. Returns the Trainer's log.

    out: the folder for checkpoints; it stays empty without settings.save_steps.
    resume: a checkpoint of a run with the same settings and windows. Training continues as if it had not stopped, even
    from the middle of an epoch.
    Raises ValueError without windows, FileNotFoundError for a checkpoint that is not there, and FloatingPointError if
    the loss is not finite.
    """
    if resume is not None and not (resume / "recommender").is_dir():
        raise FileNotFoundError(f"{resume}: expected a checkpoint of a recommender's training")
    trainer = RecommenderTrainer(model, prompts, windows, settings, out, callbacks)
    trainer.remove_callback(PrinterCallback)  # the Trainer adds it if the progress bar is disabled
    result = trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    _check_finite(result.training_loss)
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        raise FloatingPointError("a weight is not finite after the last step: try a lower learning rate")
    model.eval()
    return trainer.state.log_history
