"""The settings of a recommender and of its training. This file does not import torch, which takes seconds."""

from __future__ import annotations

from dataclasses import dataclass

from .data import NUM_CANDIDATES

LEARNING_RATES = {"ml-100k": 8e-4, "lastfm": 7e-4, "steam": 5e-4}  # the paper's, by data set

PRECISIONS = ("fp32", "bf16", "fp16", "bf16-frozen")
WITHOUT_EFFECT = ("workers", "logging_steps", "save_steps", "progress")  # settings that change no result


@dataclass(frozen=True)
class RecommenderConfig:
    """What the gate depends on, and how large the experts are.

    gate: "sequence", the sequence model's z of the user's history; "shuffled", the same, but in training each example
        of a batch gets the z of the next one; "prompt", the mean embedding of the prompt's words; "random", a random z
        that each user always gets; "uniform", nothing: every weight is 1/E, which is plain LoRA.
    soft_prompt: whether the prompt also has z, projected to one token after the history.
    gate_kind, temperature: kind and temperature of `ilora.SequenceGate`. At 0.1 users' gates differ from the first step
        on.
    The other fields are those of `ilora.ILoRAConfig`; r is the total rank.
    """

    gate: str = "sequence"
    gate_kind: str = "dense"
    temperature: float = 0.1
    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    num_experts: int = 4
    target_modules: str = "all-linear"
    soft_prompt: bool = False


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
    workers: int = 0
    precision: str = "fp32"
    logging_steps: int = 10
    save_steps: int = 0
    patience: int = 0
    candidates: int = NUM_CANDIDATES
    progress: bool = True

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.effective_batch % self.batch_size:
            raise ValueError(f"effective_batch={self.effective_batch}: expected a multiple of {self.batch_size=}")
