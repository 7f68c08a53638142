"""One rank of several, started by ranks.py.

Trains tiny models whose layers are split over the ranks in every way of VARIANTS; rank 0 writes what came out.
"""

import copy
import itertools
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import write_results
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import ilora

STEPS = 5
SIZES = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
GATES = ("tensor", "sequence", "prompt")
SAVED = ("llama", "sequence", 0.0, "float32")  # the variant that is saved and goes on
VARIANTS = {  # by the number of processes: (family, gate, dropout, dtype)
    2: [
        *itertools.product(FAMILIES, GATES, (0.0,), ("float32",)),
        *itertools.product(FAMILIES, GATES, (0.1,), ("float64",)),
    ],
    4: [SAVED, *itertools.product(("llama",), GATES, (0.1,), ("float64",))],
}
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def base(family, dtype):
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    return model(config(**SIZES)).to(getattr(torch, dtype))


def split(model, mesh):
    """The model with the layers of each block split by columns and rows, as every plan for Llama does."""
    plan = {name: ColwiseParallel() for name in COLUMNS} | {name: RowwiseParallel() for name in ROWS}
    return parallelize_module(model, mesh, {f"model.layers.*.{name}": style for name, style in plan.items()})


def injected(model, gate, dropout_p):
    """The model with adapters and a gate network whose values are the same for every split."""
    torch.manual_seed(1)
    dtype = model.dtype
    config = ilora.ILoRAConfig(r=8, num_experts=4, lora_dropout=dropout_p)
    network = {"tensor": None, "sequence": ilora.SequenceGate(6, 4), "prompt": ilora.PromptGate(num_experts=4)}[gate]
    model = ilora.inject(model, config, gate=network if network is None else network.to(dtype))
    torch.manual_seed(3)
    for name, parameter in sorted(trainable(model).items()):
        values = torch.randn(parameter.shape, dtype=torch.float64).to(dtype) / 8
        with torch.no_grad():
            if hasattr(parameter, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
            parameter.copy_(values if "gate" not in name else 4 * values)
    return model.train()


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gathered(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def batch(gate, dtype):
    torch.manual_seed(5)
    ids, labels = torch.randint(1, 53, (3, 7)), None
    labels = ids.clone()
    labels[:, :3] = -100
    z, own = torch.randn(3, 6, dtype=dtype), torch.rand(3, 4, dtype=dtype)
    more = {"tensor": {"ilora_gate": own}, "sequence": {"ilora_z": z}, "prompt": {}}[gate]
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "use_cache": False, **more}


def trained(model, gate, checked=None):
    """Five steps: the losses, the gradients of the first step, the parameters of the last, all whole."""
    inputs, losses, gradients = batch(gate, model.dtype), [], {}
    torch.manual_seed(9)
    optimizer = torch.optim.AdamW([*trainable(model).values()], lr=1e-3)
    for step in range(STEPS):
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {name: gathered(parameter.grad) for name, parameter in trainable(model).items()}
            if checked is not None:
                checked(model)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients, "parameters": whole(model)}


def whole(model):
    return {name: gathered(parameter) for name, parameter in trainable(model).items()}


def same_bits_everywhere(model):
    """Raises AssertionError unless each replicated gradient has the same bits on all ranks."""
    for name, parameter in trainable(model).items():
        grad = parameter.grad
        if hasattr(grad, "placements"):
            if any(placement.is_shard() for placement in grad.placements):
                continue
            grad = grad.to_local()
        everywhere = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, grad.contiguous())
        assert all(torch.equal(other, grad) for other in everywhere), name


def generated(model, gate):
    inputs = batch(gate, model.dtype)
    more = {name: value for name, value in inputs.items() if name.startswith("ilora")}
    ids = inputs["input_ids"]
    return model.eval().generate(ids, attention_mask=inputs["attention_mask"], max_new_tokens=4, num_beams=2, **more)


def logits(model, gate):
    with torch.no_grad():
        return model.eval()(**batch(gate, model.dtype)).logits


def refusal(function, model, **options):
    """The words in which a function of one gate refuses the model."""
    try:
        function(model, torch.full((4,), 0.25), **options)
    except ValueError as error:
        return str(error)


class Sums(TorchDispatchMode):
    """Counts the elements of each sum over processes in the block."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if function.namespace in ("c10d", "_c10d_functional") and "reduce" in function.__name__:
            self.elements.append(sum(x.numel() for x in tree_leaves(args) if isinstance(x, torch.Tensor)))
        return function(*args, **(kwargs or {}))


def sums(module, width, **gate):
    """[elements of each sum of the forward, those of the backward pass] for x [3, 7, width]."""
    counted = []
    with Sums() as mode:
        y = module(torch.ones(3, 7, width, requires_grad=True), **gate)
        counted.append(mode.elements)
        mode.elements = []
        y.sum().backward()
    return [*counted, mode.elements]


def sums_of_layers(model):
    """{name: what the layer sums, and what its frozen base does} for a layer of each split, R = 8 and 3 gates."""
    block, gate = model.model.layers[0], torch.rand(3, 4, requires_grad=True)
    widths = {"columns": (block.mlp.up_proj, 32), "rows": (block.mlp.down_proj, 48 // dist.get_world_size())}
    return {
        name: (sums(layer, width, gate=gate), sums(layer.base_layer, width)) for name, (layer, width) in widths.items()
    }


def sequence_parallel(mesh):
    """The words in which layers refuse inputs or outputs that are cut by rows between the blocks."""
    plan = {"up_proj": ColwiseParallel(input_layouts=Shard(1)), "down_proj": RowwiseParallel(output_layouts=Shard(1))}
    mlp, words = base("llama", "float32").model.layers[0].mlp, []
    parallelize_module(mlp, mesh, plan)
    for linear, shape in ((mlp.up_proj, (3, 4, 32)), (mlp.down_proj, (3, 8, 48 // dist.get_world_size()))):
        try:
            ilora.ILoRALinear(linear)(torch.ones(shape), gate=torch.ones(3, 4))
        except ValueError as error:
            words.append(str(error))
    return words


def with_fsdp(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model


def main(folder):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh, results = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)), {}
    for variant in VARIANTS[world]:
        family, gate, dropout_p, dtype = variant
        model = injected(split(base(family, dtype), mesh), gate, dropout_p)
        results[variant] = trained(model, gate, same_bits_everywhere)
        if variant == SAVED:
            ilora.save_adapter(model, Path(folder) / "saved")
            results["generated"] = generated(model, gate)
            results["refused"] = [refusal(ilora.merge, model), refusal(ilora.to_peft, model, path=folder)]
            results["copied"] = logits(copy.deepcopy(model), gate), logits(model, gate)
            results["sums"] = sums_of_layers(model.train())
            results["sequence parallel"] = sequence_parallel(mesh)
            again = ilora.load_adapter(split(base(family, dtype), mesh), Path(folder) / "saved").train()
            results["continued"] = trained(again, gate)
    auto = AutoModelForCausalLM.from_pretrained(Path(folder) / "base", tp_plan="auto", dtype=torch.float64)
    results["auto"] = trained(injected(auto, "sequence", 0.1), "sequence", same_bits_everywhere)
    results["auto split"] = all(layer.split is not None for layer in ilora.ilora_layers(auto).values())
    if world == 4:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tp"))
        model = injected(split(base("llama", "float64"), both["tp"]), "sequence", 0.0)
        results["fsdp"] = trained(with_fsdp(model, both), "sequence")
        model = injected(split(base("llama", "float64"), both["tp"]), "sequence", 0.0)
        copies = DistributedDataParallel(model, device_mesh=both["data"])
        try:
            copies(**batch("sequence", torch.float64))
        except RuntimeError as error:
            results["ddp"] = str(error)
    if rank == 0:
        write_results(results, folder)
    dist.barrier()  # a rank that leaves early may abort the others
    dist.destroy_process_group()
