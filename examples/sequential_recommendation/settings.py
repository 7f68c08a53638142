"""What a recommender is and how it is trained, in figures: no import of torch, which alone takes seconds."""

from __future__ import annotations

from dataclasses import dataclass

LEARNING_RATES = {"ml-100k": 8e-4, "lastfm": 7e-4, "steam": 5e-4}  # of the paper, by data set

PRECISIONS = ("fp32", "bf16", "fp16", "bf16-frozen")


@dataclass(frozen=True)
class RecommenderConfig:
    """What guides the experts, and how large they are.

    gate: "sequence", the sequence model's z of the user's history; "prompt", the mean embedding of the prompt's words;
        "random", a random z for each user, always the same one; "uniform", nothing: 1/E, which is plain LoRA.
    soft_prompt: whether the prompt has z in it as well, projected to one token behind the history.
    gate_kind, temperature: as `ilora.SequenceGate`'s kind and temperature; at 0.1 users differ from the first step on.
    The others are `ilora.ILoRAConfig`'s; r is the total rank.
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

    epochs, or steps where it is not 0. batch_size examples at once, accumulated to effective_batch for a step (of one
    process). The learning rate rises from lr/100 over the first `warmup` of all steps and falls to lr/100 as a cosine;
    the gate's is gate_lr times that. weight_decay: of projector and gate. curriculum: over which part of all steps the
    share of hybrid prompts rises from 0 to 1 (0: hybrid from the start; None: never). precision: fp32;
    bf16 or fp16, which cast the weights at every use; or bf16-frozen: the frozen model itself is held in bfloat16.
    save_steps: a checkpoint every so often; 0: none.
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
    progress: bool = True

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.effective_batch % self.batch_size:
            raise ValueError(f"effective_batch={self.effective_batch}: expected a multiple of {self.batch_size=}")
