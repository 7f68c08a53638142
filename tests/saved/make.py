"""Saves adapters of every kind, and what the models compute with them, in a folder named after this version of ilora.

    python tests/saved/make.py

It refuses to overwrite: what a version has saved is kept, so that `test_saved_by_earlier_versions.py` can load it with
every later one. A new version adds a folder of its own, best made when the way of saving has changed.

    bases/NAME.safetensors      the weights of a tiny model of `saved_cases.BASES`
    adapters/CASE/              what `save_adapter` or `save_pretrained` wrote
    peft/CASE/                  what PEFT's `save_pretrained` or `ilora.to_peft` wrote
    expected/CASE.safetensors   in.NAME: arguments of the model; out: its output; the metadata says how it was made
    layer.safetensors           the state of one `ILoRALinear`, an input, a gate and the output
"""

import json
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))
from safetensors.torch import save_file  # noqa: E402
from saved_cases import BASES, NormedGate, adapted, ids, randomise  # noqa: E402

import ilora  # noqa: E402
from ilora import PromptGate, SequenceGate, UniformGate  # noqa: E402

OUT = ROOT / ilora.__version__
Z = 2 * torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(6))
G = torch.softmax(2 * torch.randn(3, 4, generator=torch.Generator().manual_seed(8)), -1)
FEW = {"target_modules": ("q_proj", "down_proj"), "r": 4}
PATTERNS = {
    "rank_pattern": {"(q_proj|c_fc)": 16},
    "alpha_pattern": {r"1.mlp.(up_proj|c_fc)": 7},
    "expert_pattern": {"(k_proj|c_proj)": 2},
}
WHOLE = {"layers_to_transform": (1,), "lora_dropout": 0.1}
PER_LAYER = {"per_layer": True, "top_k": 3, "balance": 0.01}

# case: (base, its dtype, gate network, arguments of the call, settings)
ADAPTERS = {
    "no_gate": ("llama", "float32", None, {"ilora_gate": G}, {}),
    "dense": ("llama", "float32", SequenceGate(6, 4, temperature=0.5, dropout=0.2), {"ilora_z": Z}, FEW),
    "topk": ("llama", "float32", SequenceGate(6, 4, kind="topk", top_k=3), {"ilora_z": Z}, FEW),
    "mlp": ("llama", "float32", SequenceGate(6, 4, kind="mlp", hidden_dim=9), {"ilora_z": Z}, FEW),
    "noisy": ("llama", "float32", SequenceGate(6, 4, kind="noisy", balance=0.01), {"ilora_z": Z}, FEW),
    "per_layer_dense": ("llama", "float32", SequenceGate(6, 4, per_layer=True), {"ilora_z": Z}, FEW),
    "per_layer_topk": ("llama", "float32", SequenceGate(6, 4, kind="topk", **PER_LAYER), {"ilora_z": Z}, FEW),
    "prompt": ("llama", "float32", PromptGate(4, min_tokens=2), {}, FEW),
    "prompt_topk": ("gpt2", "float32", PromptGate(4, kind="topk", per_layer=True), {}, {"target_modules": ("c_attn",)}),
    "uniform": ("llama", "float32", UniformGate(4), {}, FEW),
    "own_gate": ("llama", "float32", NormedGate(), {"ilora_z": Z}, FEW),
    "patterns_llama": ("llama", "float32", SequenceGate(6, 4), {"ilora_z": Z}, PATTERNS),
    "patterns_gpt2": ("gpt2", "float32", SequenceGate(6, 4), {"ilora_z": Z}, PATTERNS),
    "two_experts": ("llama", "float32", SequenceGate(6, 2), {"ilora_z": Z}, {**FEW, "num_experts": 2}),
    "one_expression": (
        *("llama", "float32", None, {"ilora_gate": G}),
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ("0.self_attn.v_proj",), "r": 4},
    ),
    "whole_llama": (
        *("llama", "float32", PromptGate(4), {}),
        {**WHOLE, "modules_to_save": ("lm_head", "model.norm")},
    ),
    "whole_gpt2": ("gpt2", "float32", None, {"ilora_gate": G}, {**WHOLE, "modules_to_save": ("lm_head", "ln_f")}),
    "task_head": ("bert", "float32", PromptGate(4), {}, {}),
    "shared_layer": ("twice", "float32", SequenceGate(6, 4), {"ilora_z": Z}, {"modules_to_save": ("head",)}),
    "shared_whole": (
        *("twice", "float32", None, {"ilora_gate": G}),
        {"target_modules": ("between",), "modules_to_save": ("first",)},
    ),
    "bfloat16": ("llama", "bfloat16", SequenceGate(6, 4), {"ilora_z": Z}, {**FEW, "modules_to_save": ("lm_head",)}),
    "float32_beside_bfloat16": (
        *("llama", "bfloat16", SequenceGate(6, 4), {"ilora_z": Z}),
        {**FEW, "adapter_dtype": "float32"},
    ),
}
LORAS = {  # case: (base, PEFT's settings)
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}),
    "rslora": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"up_proj": 12},
            "alpha_pattern": {"q_proj": 5},
        },
    ),
    "whole": ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}
EXPORTS = {"exported_llama": "patterns_llama", "exported_gpt2": "whole_gpt2"}


@torch.no_grad()
def output(model, arguments):
    result = model(**arguments)
    return result if isinstance(result, torch.Tensor) else result.logits


def keep(case, model, arguments, **how):
    """The arguments, what the model computes from them in float32, how it was made, and its parameters' order."""
    model.float()
    tensors = {f"in.{name}": value for name, value in arguments.items()} | {"out": output(model, arguments)}
    how["trainable"] = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    (OUT / "expected").mkdir(exist_ok=True)
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in how.items()}
    save_file(tensors, OUT / "expected" / f"{case}.safetensors", metadata)


def check_that_it_matters(case, model, arguments):
    """A kept output says little if it is the frozen model's, or that of another gate."""
    found = output(model, arguments)
    plain = {name: value for name, value in arguments.items() if not name.startswith("ilora_")}
    with ilora.disable_adapter(model):
        others = [output(model, plain)]
    if case != "uniform":
        experts = 2 if case == "two_experts" else 4
        others.append(output(model, {**plain, "ilora_gate": torch.full((1, experts), 1 / experts)}))
    for other in others:
        assert (found - other).abs().max() > 0.01 * found.abs().max(), case


def make_adapters():
    for case, (base, dtype, gate, call, settings) in ADAPTERS.items():
        model = adapted(BASES[base]().to(getattr(torch, dtype)), gate, std=0.2, **settings)
        if case == "shared_layer":
            model.head[0].running_mean.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(9))
            model.head[0].running_var.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(10))
        if case == "bfloat16":
            model.bfloat16()  # the gate network too
        arguments = {"x": X} if base == "twice" else {"input_ids": ids()}
        ilora.save_adapter(model, OUT / "adapters" / case)
        model.float()
        check_that_it_matters(case, model, arguments | call)
        keep(case, model, arguments | call, base=base, dtype=dtype)


def make_several():
    """Two adapters of one model, and one more as the Trainer saves it."""
    model = adapted(BASES["llama"](), SequenceGate(6, 4), name="one", std=0.2, **FEW)
    settings = {"r": 4, "num_experts": 2, "target_modules": ("v_proj",), "modules_to_save": ("lm_head",)}
    ilora.add_adapter(model, "two", ilora.ILoRAConfig(**settings), PromptGate(2))
    randomise(model, 0.3)
    calls = {"one": {"input_ids": ids(), "ilora_z": Z}, "two": {"input_ids": ids()}}
    for name, arguments in calls.items():
        ilora.save_adapter(model, OUT / "adapters" / f"several_{name}", name=name)
        keep(f"several_{name}", ilora.set_adapter(model, name), arguments, base="llama", dtype="float32")
    model = adapted(BASES["llama"](), NormedGate(), std=0.2, **FEW, modules_to_save=("lm_head",))
    model.save_pretrained(OUT / "adapters" / "save_pretrained")
    keep("save_pretrained", model, {"input_ids": ids(), "ilora_z": Z}, base="llama", dtype="float32")


def make_loras():
    """What PEFT saves, what it computes, and the iLoRA that came of it."""
    import peft

    for case, (base, settings) in LORAS.items():
        config = peft.LoraConfig(**{"r": 8, "lora_alpha": 24, "task_type": "CAUSAL_LM", **settings})
        live = peft.get_peft_model(BASES[base](), config).eval()
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.2)
        folder = OUT / "peft" / case
        live.save_pretrained(str(folder))
        (folder / "README.md").unlink()
        keep(f"peft_{case}", live, {"input_ids": ids()}, base=base)
        ilora.save_adapter(ilora.from_peft(folder, 4, model=BASES[base]()), OUT / "adapters" / f"from_peft_{case}")
        model = ilora.load_adapter(BASES[base](), OUT / "adapters" / f"from_peft_{case}").eval()
        keep(f"from_peft_{case}", model, {"input_ids": ids(), "ilora_gate": G}, base=base, dtype="float32")


def make_exports():
    for case, source in EXPORTS.items():
        base = ADAPTERS[source][0]
        model = ilora.load_adapter(BASES[base](), OUT / "adapters" / source).eval()
        ilora.to_peft(model, G[0], OUT / "peft" / case)
        keep(f"peft_{case}", model, {"input_ids": ids(), "ilora_gate": G[:1]}, base=base, source=source)


def make_layer():
    torch.manual_seed(3)
    layer = ilora.ILoRALinear(torch.nn.Linear(6, 5), r=4, num_experts=4, lora_alpha=12).eval()
    torch.nn.init.normal_(layer.lora_B)
    tensors = dict(layer.state_dict()) | {"in.x": X, "in.gate": G, "out": layer(X, gate=G).detach()}
    save_file(tensors, OUT / "layer.safetensors")


def main():
    if OUT.exists():
        sys.exit(f"{OUT} is there already. What a version has saved is kept; a new version makes a folder of its own.")
    try:
        for name, base in BASES.items():
            (OUT / "bases").mkdir(parents=True, exist_ok=True)
            state = {key: value.clone() for key, value in base().state_dict().items()}
            save_file(state, OUT / "bases" / f"{name}.safetensors")
        for make in (make_adapters, make_several, make_loras, make_exports, make_layer):
            make()
    except BaseException:
        shutil.rmtree(OUT, ignore_errors=True)  # half of it would be taken for all
        raise
    size = sum(file.stat().st_size for file in OUT.rglob("*") if file.is_file())
    print(f"{OUT}: {len(list((OUT / 'expected').iterdir()))} cases, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
