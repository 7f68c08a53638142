"""One rank of four, started by ranks.py: pipelines, sequences cut over ranks, checkpoints of sharded models.

Ranks 0 and 1 compute in float64, ranks 2 and 3 the same in float32, but for the checkpoints, which are of all four.
"""

import torch
import torch.distributed as dist
from ranks import write_results
from tensor_parallel_worker import injected, trainable
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, SplitPoint, pipeline
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import ilora

MICRO_BATCHES, STEPS = 4, 3
SIZES = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4}
CASES = ("1F1B", "interleaved", "recomputed", "traced")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Plain(nn.Module):
    """A model that torch's tracer can cut: it cuts no Llama of transformers."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(53, 16), nn.Linear(16, 53)
        self.layers = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Skipped(nn.Module):
    """In the place of a block that another stage has."""

    def forward(self, hidden, *args, **kwargs):
        return hidden


class Stage(nn.Module):
    """The blocks `first` to `last` of an injected Llama: (ids, z) or (hidden, gate) -> (hidden, gate) or logits."""

    def __init__(self, model, first, last):
        super().__init__()
        blocks = getattr(model, "model", model).layers
        self.model, self.is_first, self.is_last = model, first == 0, last == len(blocks)
        for i in range(len(blocks)):
            if not first <= i < last:
                blocks[i] = Skipped()
        if not self.is_first:
            model.ilora_gate = None
        if not self.is_last:
            self.cut_end()

    def cut_end(self):
        self.model.model.norm = self.model.lm_head = Skipped()

    def forward(self, x, given):
        gate = ilora.gate_of(self.model, ilora_z=given) if self.is_first else given
        hidden = self.blocks(x, gate)
        return hidden if self.is_last else (hidden, gate)

    def blocks(self, x, gate):
        inputs = {"input_ids" if self.is_first else "inputs_embeds": x}
        return self.model(**inputs, ilora_gate=gate, use_cache=False).logits


class RecomputedStage(Stage):
    """Blocks of `Plain`, which are computed again in the backward pass."""

    def cut_end(self):
        self.model.head = Skipped()

    def blocks(self, x, gate):
        x = self.model.embed(x) if self.is_first else x
        return checkpoint(self.under, x, gate, use_reentrant=False)

    def under(self, x, gate):
        with ilora.gated(self.model, gate):
            for layer in self.model.layers:
                x = layer(x)
            return self.model.head(x)


class Traced(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, z, ids):  # in the order in which the model uses them, as the tracer wants it
        return self.model(ids, ilora_z=z)


def model_of(case, dtype):
    torch.manual_seed(0)
    if case in ("1F1B", "interleaved"):
        return injected(LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype), "sequence", 0.0)
    model = Plain().to(dtype)
    model.dtype = dtype
    return injected(model, "sequence", 0.0)


def loss_of(logits, ids):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batch(dtype):
    """Ids and z of eight sequences, two to a micro-batch."""
    torch.manual_seed(5)
    return torch.randint(1, 53, (8, 7)), torch.randn(8, 6, dtype=dtype)


def trained(parameters, step):
    """Losses of three steps, one a micro-batch, and the gradients of the first."""
    optimizer, losses, gradients = torch.optim.AdamW([*parameters.values()], lr=1e-2), [], {}
    for _ in range(STEPS):
        losses += step()
        gradients = gradients or {name: parameter.grad.clone() for name, parameter in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients}


def alone(case, dtype):
    """What one process makes of the micro-batches, one after another."""
    model, (ids, z) = model_of(case, dtype), batch(dtype)

    def step():
        losses = []
        for some, zs in zip(ids.chunk(MICRO_BATCHES), z.chunk(MICRO_BATCHES), strict=True):
            output = model(some, ilora_z=zs)
            loss = loss_of(getattr(output, "logits", output), some)
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.item())
        return losses

    return trained(trainable(model), step)


def run(schedule, rank, ids, *inputs):
    """One step; the losses, one a micro-batch, on the rank of the last stage."""
    losses = []
    if rank == 0:
        schedule.step(*inputs)
    else:
        schedule.step(target=ids, losses=losses)
    return [loss.item() for loss in losses]


def piped(case, dtype, group):
    """What this rank has of a pipeline of two stages, or, interleaved, of four stages on two ranks."""
    rank, (ids, z), cpu = dist.get_rank(group), batch(dtype), torch.device("cpu")
    if case == "traced":
        size = len(ids) // MICRO_BATCHES
        cut = {"model.layers.2": SplitPoint.BEGINNING}
        stage = pipeline(Traced(model_of(case, dtype)), (z[:size], ids[:size]), split_spec=cut)
        stage = stage.build_stage(rank, cpu, group)
        schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_of)
        return trained(trainable(stage.submod.model), lambda: run(schedule, rank, ids, z, ids))
    cuts = (0, 1, 2, 3, 4) if case == "interleaved" else (0, 2, 4)
    kind, count = RecomputedStage if case == "recomputed" else Stage, len(cuts) - 1
    parts = {i: kind(model_of(case, dtype), cuts[i], cuts[i + 1]) for i in range(rank, count, 2)}
    stages = [PipelineStage(part, i, count, cpu, group=group) for i, part in parts.items()]
    schedule = ScheduleInterleaved1F1B(stages, MICRO_BATCHES, loss_fn=loss_of) if count > 2 else None
    schedule = schedule or Schedule1F1B(stages[0], MICRO_BATCHES, loss_fn=loss_of)
    parameters = {name: p for part in parts.values() for name, p in trainable(part.model).items()}
    return trained(parameters, lambda: run(schedule, rank, ids, ids, z))


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    dtype, group = (torch.float64, torch.float32)[rank // 2], groups[rank // 2]
    found = {case: piped(case, dtype, group) for case in CASES}
    results = [None] * 4
    dist.all_gather_object(results, found)
    if rank == 0:
        write_results({"pipelines": results}, folder)
    dist.barrier()  # a rank that leaves early may abort the others
    dist.destroy_process_group()
