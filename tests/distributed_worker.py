"""One rank of two, started by ranks.py.

Trains the tiny model in every way of VARIANTS on this rank's half of the batch; rank 0 writes what came out.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import training_worker
from ranks import write_results
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_worker import examples, trainable

import ilora

STEPS = 3
VARIANTS = ["ddp", "ddp-hf", "ddp-reentrant", "ddp-shared", "trainer"]
VARIANTS += ["fsdp", "fsdp-shared", "fsdp-hf", "fsdp-torch", "fsdp-prompt"]


def injected(prompt=False):
    """The model with a gate network whose gates differ much from user to user."""
    model = training_worker.injected(ilora.PromptGate if prompt else "z")
    torch.nn.init.normal_(model.ilora_gate.weight, std=1.0)
    for layer in ilora.ilora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.train()


def batch(rank=0, world=1, prompt=False):
    rows = examples(4)
    inputs = training_worker.batch(rows[rank * len(rows) // world : (rank + 1) * len(rows) // world])
    if prompt:
        del inputs["ilora_z"]
    return inputs


def steps(model, inputs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def gathered(model):
    """The trained parameters, whole, by the names of the plain model."""
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in trainable(model).items()}
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in whole.items()}


def run(variant, folder, rank, world):
    wrap, _, how = variant.partition("-")
    prompt = how == "prompt"
    model = injected(prompt)
    if how in ("hf", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    if how == "torch":
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = checkpoint_wrapper(layer)
    if how == "shared":
        assert len(ilora.share_inputs(model)) == 4
    if wrap == "trainer":
        return trainer(model, folder, 2)
    inputs = batch(rank, world, prompt)
    if wrap == "ddp":
        steps(DistributedDataParallel(model), inputs)
        return gathered(model)
    for layer in [*model.model.layers, *([model.model.embed_tokens] if prompt else [])]:
        fully_shard(layer)  # PromptGate reads the embeddings, which accelerate shards by themselves
    fully_shard(model)
    steps(model, inputs)
    model.save_pretrained(Path(folder) / variant, is_main_process=rank == 0)
    return gathered(model)


def trainer(model, folder, batch_size):
    """transformers' Trainer, which makes the model a DistributedDataParallel if there are several ranks."""
    options = {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "steps", "save_steps": STEPS, "max_steps": STEPS}
    training_worker.trained(model, Path(folder) / "trainer", per_device_train_batch_size=batch_size, **options)
    return gathered(model)


def main(folder):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {variant: run(variant, folder, rank, world) for variant in VARIANTS}
    if rank == 0:
        write_results(results, folder)
    dist.barrier()  # a rank that leaves early may abort the other
    dist.destroy_process_group()
