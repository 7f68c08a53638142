"""Trains instance-wise LoRA on several devices: `torchrun --nproc-per-node 2 examples/distributed/train.py`.

Started by torchrun or by `accelerate launch --config_file ...`, whose file says how: a copy of the model on each device
(DDP), the model spread over the devices (--shard, FSDP2), or its layers split as well (--tp). The gate is a PromptGate,
so that any causal language model and any text will do. The engines are torch's and transformers' own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import ilora

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
OF_TRAINED = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, env = parser.add_argument, os.environ.get
    add("--model", type=Path, help="folder of a causal language model (default: a tiny Llama of bytes, made here)")
    add("--text", type=Path, default=ROOT / "README.md", help="a text file (default: this project's README)")
    add(
        "--out", type=Path, default=Path("distributed-run"), help="for checkpoints and the adapter; all machines see it"
    )
    add("--steps", type=int, default=20)
    add("--batch", type=int, default=4, help="sequences a step, of each copy of the model")
    add("--length", type=int, default=64, help="tokens of a sequence; the first quarter is its prompt")
    add("--lr", type=float, default=1e-3)
    add("--save-steps", type=int, default=5)
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, on any number of processes")
    sharded = env("ACCELERATE_USE_FSDP", "false") == "true"
    add("--shard", action="store_true", default=sharded, help="FSDP2 (default: as accelerate's configuration says)")
    split = int(env("PARALLELISM_CONFIG_TP_SIZE", "1"))
    add("--tp", type=int, default=split, help="devices that share each layer (default: as accelerate's file says)")
    options = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun or accelerate launch: see examples/distributed/README.md")
    for name in ("steps", "batch", "save_steps", "tp"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(options, name)}")
    if int(os.environ["WORLD_SIZE"]) % options.tp:
        parser.error(f"--tp {options.tp}: expected a divisor of the {os.environ['WORLD_SIZE']} processes")
    return options


def tokens(options: argparse.Namespace) -> torch.Tensor:
    """int64 [sequences, length] of the text. Ends the program if it is too short for one sequence."""
    text = options.text.read_text(encoding="utf-8")
    if options.model is None:
        ids = list(text.encode())
    else:
        ids = AutoTokenizer.from_pretrained(options.model)(text, add_special_tokens=False)["input_ids"]
    if len(ids) < options.length:
        sys.exit(f"--text {options.text}: {len(ids)} tokens are too few for one sequence of {options.length}")
    return torch.tensor(ids[: len(ids) // options.length * options.length]).reshape(-1, options.length)


def base(options: argparse.Namespace, mesh: DeviceMesh) -> Any:
    """The frozen model, its layers split over the mesh's dimension "tp" if that has several devices."""
    folder = options.model or options.out / "base"
    if options.model is None and dist.get_rank() == 0 and not folder.exists():
        torch.manual_seed(0)
        sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
        LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(mesh.device_type)
    if options.tp == 1:
        return model
    plan = getattr(model.config, "base_model_tp_plan", None) or {}
    strange = {style for style in plan.values() if style not in SPLITS and not style.startswith("replicated")}
    if strange or not plan:
        sys.exit(
            f"--tp: transformers splits {type(model).__name__} as {sorted(strange)}; expected columns and rows alone"
        )
    splits = {f"{model.base_model_prefix}.{name}": SPLITS[style]() for name, style in plan.items() if style in SPLITS}
    return parallelize_module(model, mesh["tp"], splits)


def prepared(model: Any, options: argparse.Namespace, mesh: DeviceMesh) -> Any:
    """What to call instead of the model: the sharded model itself, or DDP around it."""
    if not options.shard and options.tp == 1:
        return DistributedDataParallel(model)
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in [*blocks, model.get_input_embeddings(), model]:  # PromptGate reads the embeddings by themselves
        fully_shard(module, mesh=mesh["data"])
    return model


def batch(data: torch.Tensor, step: int, options: argparse.Namespace, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """The sequences of this step and copy of the model, chosen by step, so that a resumed run sees those that it would
    have seen."""
    copies, copy = mesh["data"].size(), mesh["data"].get_local_rank()
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(len(data), (options.batch * copies,), generator=generator)[copy::copies]
    ids = data[rows].to(mesh.device_type)
    labels = ids.clone()
    labels[:, : options.length // 4] = -100
    return {"input_ids": ids, "labels": labels}


def checkpoints(folder: Path) -> list[Path]:
    """Those that are whole, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(model: Any, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    """Writes a checkpoint under another name and renames it when all processes have written; removes the one before."""
    part = folder / f"checkpoint-{step}.part"
    state, moments = get_state_dict(model, optimizer, options=OF_TRAINED)
    save({"model": state, "optimizer": moments}, checkpoint_id=part)
    if dist.get_rank() == 0:
        shutil.rmtree(part.with_suffix(""), ignore_errors=True)
        part.rename(part.with_suffix(""))
        for old in checkpoints(folder)[:-1]:
            shutil.rmtree(old)
    dist.barrier()


def resume(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Loads the last checkpoint; the steps that it has done. Ends the program if there is none."""
    found = checkpoints(folder)
    if not found:
        sys.exit(f"--resume: there is no checkpoint in {folder}")
    state, moments = get_state_dict(model, optimizer, options=OF_TRAINED)
    load({"model": state, "optimizer": moments}, checkpoint_id=found[-1])
    options = StateDictOptions(strict=False, ignore_frozen_params=True, flatten_optimizer_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=moments, options=options)
    return int(found[-1].name.removeprefix("checkpoint-"))


def train(options: argparse.Namespace, mesh: DeviceMesh) -> list[float]:
    """The losses of the steps that it did, each the mean over all processes."""
    model = base(options, mesh)
    torch.manual_seed(0)  # the same adapter everywhere
    config = ilora.ILoRAConfig(r=8, num_experts=4, lora_dropout=0.05)
    model = ilora.inject(model, config, gate=ilora.PromptGate(num_experts=4)).train()
    called, data, losses = prepared(model, options, mesh), tokens(options), list[float]()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    done = resume(called, optimizer, options.out) if options.resume else 0
    first = dist.get_rank() == 0
    for step in tqdm(range(done, options.steps), "steps", options.steps, initial=done, disable=not first):
        torch.manual_seed(step * mesh["data"].size() + mesh["data"].get_local_rank())  # for dropout
        loss = called(**batch(data, step, options, mesh), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
        if first:
            tqdm.write(f"step {step + 1} loss {losses[-1]:.6f}", file=sys.stdout)
        if (step + 1) % options.save_steps == 0 or step + 1 == options.steps:
            save_checkpoint(called, optimizer, step + 1, options.out)
    if called is model or first:  # every process has a part of a sharded model
        ilora.save_adapter(model, options.out / "adapter")
    return losses


@record  # the launcher shows the error of the process that failed first
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if dist.get_rank():
        logging.disable_progress_bar()
    try:
        copies = dist.get_world_size() // options.tp
        train(options, init_device_mesh(device, (copies, options.tp), mesh_dim_names=("data", "tp")))
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
