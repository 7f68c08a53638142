"""Times a training step of a whole model: `python benchmarks/bench_model.py`. Ours, PEFT's LoRA of equal rank, and the
frozen model, whose inputs alone want gradients: the limit.

All adapt every linear layer but the head, with the same rank, alpha and dropout, and read the same tokens. A step is
forward, backward and AdamW over what is trained; the frozen model has nothing to update. Steps are interleaved, in
changing order; × is the median, over the rounds, of a step's time over the frozen model's in the same round. Peak
memory is what one step allocates at most at once, gradients included, parameters and optimiser state not.
The default model has SmolLM2-135M's shape and random weights; --model FOLDER takes one of your own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import torch
from memory import peak_bytes
from peers import unavailable
from report import busy, heading, machine, markdown, write_json
from torch import Tensor
from tqdm import tqdm

import ilora

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
}
LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TINY = {**SMOLLM2, "vocab_size": 512, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPES = {"smollm2": SMOLLM2, "llama3-8b": LLAMA3_8B, "tiny": TINY}
Step = Callable[[], None]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help=f"{', '.join(SHAPES)}, or a folder of a causal language model")
    add("--layers", type=int, help="of the shape, only so many layers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: what is here)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--batch", type=int, default=8)
    add("--length", type=int, default=256)
    add("--rank", type=int, default=8)
    add("--experts", type=int, default=4)
    add("--dropout", default="0,0.1", help="dropout probabilities (default 0,0.1)")
    add("--rounds", type=int, default=7, help="steps of each, after one to warm up (default 7)")
    add("--checkpointing", action="store_true", help="gradient checkpointing for all")
    add("--json", type=Path, help="write machine, settings and rows to this file")
    options = parser.parse_args(argv)
    try:
        _complete(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _complete(options: argparse.Namespace) -> None:
    """Turns texts into values; ValueError for what cannot be run."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("transformers is not installed, and every model here is one of its own")
    options.device = arguments.device(options.device)
    options.dropout = arguments.probabilities("--dropout", options.dropout)
    numbers = ("layers", "batch", "length", "rank", "experts", "rounds")
    arguments.at_least_one(**{name: getattr(options, name) for name in numbers})
    arguments.divided("--rank", [options.rank], [options.experts])
    if options.layers is not None and options.model not in SHAPES:
        raise ValueError(f"--layers {options.layers}: only with --model {', '.join(SHAPES)}, not {options.model}")
    arguments.writable("--json", options.json)


def make_model(options: argparse.Namespace) -> Any:
    """The same model every time, made where it is to run: a large one takes minutes on a CPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    if options.model in SHAPES:
        config = LlamaConfig(**SHAPES[options.model])
        config.num_hidden_layers = options.layers or config.num_hidden_layers
        with options.device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device)


def twin(model: Any, options: argparse.Namespace) -> Any:
    """A model of its own over the very same weights, which nobody trains: memory for one is enough for all."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared).train()
    if options.checkpointing:
        copied.gradient_checkpointing_enable({"use_reentrant": False})
    return copied


def frozen_step(model: Any, options: argparse.Namespace, dropout: float, ids: Tensor) -> tuple[Step, int]:
    model.requires_grad_(False)

    def step() -> None:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()

    return step, 0


def trained_step(model: Any, ids: Tensor, **more: Any) -> tuple[Step, int]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False, **more).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in parameters)


def peft_step(model: Any, options: argparse.Namespace, dropout: float, ids: Tensor) -> tuple[Step, int]:
    import peft

    config = peft.LoraConfig(r=options.rank, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
    return trained_step(peft.get_peft_model(model, config, autocast_adapter_dtype=False), ids)


def ilora_step(model: Any, options: argparse.Namespace, dropout: float, ids: Tensor) -> tuple[Step, int]:
    config = ilora.ILoRAConfig(r=options.rank, lora_alpha=32, lora_dropout=dropout, num_experts=options.experts)
    model = ilora.inject(model, config, gate=ilora.SequenceGate(64, options.experts))
    return trained_step(model, ids, ilora_z=torch.randn(options.batch, 64, device=options.device))


STEPS = {"frozen": frozen_step, "peft": peft_step, "ilora": ilora_step}


def timed(step: Step, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    options: argparse.Namespace, dropout: float, kinds: Iterable[str] = tuple(STEPS), base: Any = None
) -> list[dict[str, Any]]:
    """A row for each kind of step, all in the same rounds, over the weights of `base` (None: made here)."""
    base = make_model(options) if base is None else base
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (options.batch, options.length), device=options.device)
    steps, trained = {}, {}
    for name in kinds:
        steps[name], trained[name] = STEPS[name](twin(base, options), options, dropout, ids)
        timed(steps[name], options.device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    shuffle, names = random.Random(0), list(steps)
    for _ in tqdm(range(options.rounds), desc=f"dropout {dropout}"):
        for name in shuffle.sample(names, len(names)):
            gc.collect()
            times[name].append(timed(steps[name], options.device))
    rows = []
    for name, seconds in times.items():
        ratios = sorted(mine / its for mine, its in zip(seconds, times["frozen"], strict=True))
        rows.append(
            {
                "step": name,
                "dropout": dropout,
                "seconds": statistics.median(seconds),
                "ratio": statistics.median(ratios),
                "low": ratios[0],
                "high": ratios[-1],
                "peak_bytes": peak_bytes(partial(timed, steps[name], options.device), options.device),
                "trained": trained[name],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    where = machine(options.device)
    peft = unavailable("peft", options.device, getattr(torch, options.dtype))
    notes = [peft and f"peft is left out: {peft}", busy(where)]
    print(heading(where), *(f"note: {note}" for note in notes if note), sep="\n")
    kinds = [name for name in STEPS if name != "peft" or peft is None]
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    settings["device"] = str(options.device)
    results: dict[str, Any] = {"machine": where, "settings": settings, "steps": []}
    for dropout in options.dropout:
        results["steps"] += measure(options, dropout, kinds)
        if options.json is not None:
            write_json(results, options.json)
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()
