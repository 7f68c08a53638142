"""Times whole models: `python benchmarks/bench_model.py`. Ours, PEFT's LoRA of equal rank, and the frozen model.

All adapt every linear layer but the head, with the same rank, alpha and dropout, and read the same tokens.

A training step is forward, backward and AdamW over what is trained. The frozen model computes the gradient of its input
embeddings and updates nothing; no adapted model can be faster. All must have the same loss in their first step. Peak
memory is the most that one step allocates at once, gradients included; parameters and optimizer state come on top.
Generating text is timed for one prompt, greedily; the time of a token includes its share of reading the prompt. Each ×
is the median over interleaved rounds of a time over the frozen model's in the same round. The default model has
SmolLM2-135M's shape and random weights; --model FOLDER takes a model of your own.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import arguments
import torch
from checking import TOLERANCE, WrongPeer
from machine import busy, heading, machine
from measure import BASELINE, Program, attempt, calls, tidy, time_rows
from memory import peak_bytes
from report import markdown, write_json
from torch import Tensor

import ilora

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "tie_word_embeddings", "rope_theta"),
)
SHAPES = {  # of LlamaConfig
    "smollm2": dict(zip(SIZES, (49152, 576, 1536, 30, 9, 3, True, 1e5), strict=True)),
    "llama3-8b": dict(zip(SIZES, (128256, 4096, 14336, 32, 32, 8, False, 5e5), strict=True)),
    "tiny": dict(zip(SIZES, (512, 72, 96, 2, 9, 3, True, 1e5), strict=True)),
}
Z_DIM = 64  # size of the representation that our gate network reads
Step = Callable[[], Tensor]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, arguments.count
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--model", default="smollm2", help=f"{', '.join(SHAPES)}, or a folder of a causal language model")
    add("--layers", type=count, help="use only so many layers of the shape")
    add("--device", type=arguments.device, default=default_device, help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--batch", type=count, default=8)
    add("--length", type=count, default=256)
    add("--rank", type=count, default=8)
    add("--experts", type=count, default=4)
    add("--dropout", type=arguments.probabilities, default="0,0.1", help="of the training steps (default 0,0.1)")
    add("--rounds", type=count, default=7, help="steps of each model, after two to warm up (default 7)")
    add("--checkpointing", action="store_true", help="gradient checkpointing for all models")
    add("--prompt", type=count, default=16, help="tokens of the prompt to generate from (default 16)")
    add("--tokens", type=count, default=32, help="tokens to generate (default 32)")
    add("--only", choices=("steps", "generation"), help="leave the other one out")
    add("--json", type=arguments.new_file, help="write machine, settings and rows to this file, after every part")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("transformers") is None:
        parser.error("transformers is not installed, and every model here is one of its own")
    if options.rank % options.experts:
        parser.error(f"--rank {options.rank} --experts {options.experts}: the experts must divide the rank evenly")
    if options.layers is not None and options.model not in SHAPES:
        parser.error(f"--layers {options.layers}: only with --model {', '.join(SHAPES)}, not {options.model}")
    return options


def make_model(options: argparse.Namespace) -> Any:
    """The same model every time, made on the device where it runs: making a large one takes minutes on a CPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    if options.model in SHAPES:
        config = LlamaConfig(**SHAPES[options.model], max_position_embeddings=8192)
        config.num_hidden_layers = options.layers or config.num_hidden_layers
        with options.device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device)


def share_weights(model: Any, options: argparse.Namespace) -> Any:
    """A second model over the same frozen weights, so that the memory of one serves all."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared).train()
    if options.checkpointing:
        copied.gradient_checkpointing_enable({"use_reentrant": False})
    return copied


def frozen_model(model: Any, options: argparse.Namespace, dropout: float) -> Any:
    return model.requires_grad_(False)


def peft_model(model: Any, options: argparse.Namespace, dropout: float) -> Any:
    import peft

    config = peft.LoraConfig(r=options.rank, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def ilora_model(model: Any, options: argparse.Namespace, dropout: float) -> Any:
    config = ilora.ILoRAConfig(r=options.rank, lora_alpha=32, lora_dropout=dropout, num_experts=options.experts)
    return ilora.inject(model, config, gate=ilora.SequenceGate(Z_DIM, options.experts))


MODELS = {"frozen": frozen_model, "peft": peft_model, "ilora": ilora_model}


def gate_inputs(name: str, batch: int, device: torch.device) -> dict[str, Tensor]:
    return {"ilora_z": torch.randn(batch, Z_DIM, device=device)} if name == "ilora" else {}


def frozen_step(model: Any, ids: Tensor) -> Step:
    def step() -> Tensor:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss: Tensor = model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def training_step(model: Any, ids: Tensor, **more: Tensor) -> Step:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, capturable=ids.is_cuda)  # CUDA graphs hold it then

    def step() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False, **more).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure_steps(options: argparse.Namespace, base: Any, dropout: float) -> list[dict[str, Any]]:
    """A row for each model's training step, all in the same rounds over the weights of `base`."""
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (options.batch, options.length), device=options.device)
    losses: list[float] = []

    def prepare(name: str, row: dict[str, Any]) -> Program:
        model = MODELS[name](share_weights(base, options), options, dropout)
        row |= {"dropout": dropout, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        more = gate_inputs(name, options.batch, options.device)
        step = frozen_step(model, ids) if name == BASELINE else training_step(model, ids, **more)
        losses.append(float(step()))
        if not abs(losses[-1] - losses[0]) <= TOLERANCE[model.dtype] * losses[0]:  # a fresh adapter changes nothing
            raise WrongPeer(f"its first loss is {losses[-1]:.6g}, the frozen model's {losses[0]:.6g}")
        row["peak_bytes"] = peak_bytes(step, options.device)
        return calls([step])

    rows = _measure(prepare, options, graphs=True)
    for row in rows:
        if "seconds" in row:
            row["tokens_per_second"] = options.batch * options.length / row["seconds"]
    return rows


@torch.no_grad()
def measure_generation(options: argparse.Namespace, base: Any) -> list[dict[str, Any]]:
    """A row for each model that generates `options.tokens` tokens from one prompt; its seconds are of one token."""
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, options.prompt), device=options.device)
    length = {"min_new_tokens": options.tokens, "max_new_tokens": options.tokens, "do_sample": False}

    def prepare(name: str, row: dict[str, Any]) -> Program:
        model = MODELS[name](share_weights(base, options), options, 0.0).eval()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **gate_inputs(name, 1, options.device)}
        generate = partial(model.generate, **inputs, **length)
        if (made := generate().shape[1] - options.prompt) != options.tokens:
            raise ValueError(f"{name} generated {made} tokens, expected {options.tokens}")
        return calls([generate], per_call=options.tokens)

    return _measure(prepare, options, graphs=False)


def _measure(
    prepare: Callable[[str, dict[str, Any]], Program], options: argparse.Namespace, graphs: bool
) -> list[dict[str, Any]]:
    """A row for each model: seconds, ratio to the frozen model and its quartiles; those of graphs under "graph"."""
    rows: dict[str, dict[str, Any]] = {name: {"step": name} for name in MODELS}
    programs: dict[str, Program] = {}
    for name, row in rows.items():
        tidy(options.device)
        program = attempt(row, "error", partial(prepare, name, row))
        if program is not None:
            programs[name] = program
    time_rows(rows, programs, options.device, math.inf, options.rounds, graphs=graphs)
    for row in rows.values():
        row |= _in_seconds(row.pop("eager")) if "eager" in row else {}
        row |= {"graph": _in_seconds(row["graph"])} if "graph" in row else {}
    return list(rows.values())


def _in_seconds(variant: dict[str, Any]) -> dict[str, float]:
    forward = variant["forward"]
    return {"seconds": forward["ms"] / 1e3, **{key: forward[key] for key in ("ratio", "low", "high")}}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    where = machine(options.device)
    print(heading(where), *filter(None, [busy(where)]), sep="\n", flush=True)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    settings["device"] = str(options.device)
    results: dict[str, Any] = {"machine": where, "settings": settings, "steps": [], "generation": []}
    base = make_model(options)
    for dropout in options.dropout if options.only != "generation" else ():
        results["steps"] += measure_steps(options, base, dropout)
        if options.json is not None:
            write_json(results, options.json)
    if options.only != "steps":
        results["generation"] = measure_generation(options, base)
        if options.json is not None:
            write_json(results, options.json)
    print(markdown(results))
    for row in results["steps"] + results["generation"]:
        for problem in ("error", "graph_error"):
            if problem in row:
                print(f"{row['step']}: {problem.replace('_', ' ')}: {row[problem]}")
    return results


if __name__ == "__main__":
    found = main()
    sys.exit(int(any("error" in row for row in found["steps"] + found["generation"])))
