"""What PEFT trained comes in and computes what it computed; what iLoRA cannot express is refused by name."""

import json

import pytest
import torch
from saved_cases import MODELS, assert_untouched, bits, close, ids, llama, logits, strictly, uniform

import ilora
from ilora import AdapterError, SequenceGate

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


LORAS = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "llama-all-linear": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "llama-rslora": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 12}},
    "llama-patterns": {
        "target_modules": r".*\.(q|k)_proj",
        "rank_pattern": {"0.self_attn.q_proj": 4, "^model.layers.1.self_attn.k_proj": 16},
        "alpha_pattern": {"q_proj": 5},
    },
    "llama-saved": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
}


def trained(name, seed=1, **more):
    """A PEFT LoRA after two steps of training."""
    base = MODELS[name.partition("-")[0]](seed)
    model = peft.get_peft_model(
        base, peft.LoraConfig(**{"r": 8, "lora_alpha": 24, "task_type": "CAUSAL_LM", **LORAS[name], **more})
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("name", LORAS)
def test_from_peft_computes_what_peft_computed(tmp_path, name):
    source = trained(name)
    want, family = logits(source), MODELS[name.partition("-")[0]]
    assert not torch.allclose(want, logits(family()), atol=1e-3)
    source.save_pretrained(str(tmp_path / "peft"))
    model = ilora.from_peft(str(tmp_path / "peft"), 4, model=family(), gate=SequenceGate(6, 4))
    close(logits(model, ilora_gate=uniform()), want)
    live = ilora.from_peft(source, 4, gate=SequenceGate(6, 4))
    close(logits(live, ilora_gate=uniform()), want)
    assert live.ilora.config == model.ilora.config
    assert not any("peft" in type(module).__module__ for module in live.modules())
    path = ilora.save_adapter(live, tmp_path / "ilora")
    close(logits(strictly(lambda: peft.PeftModel.from_pretrained(family(), str(path)))), want)
    assert logits(ilora.eject(live)).equal(logits(family())) or "saved" in name


@pytest.mark.parametrize("file", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("base", ["float16", "bfloat16", "float32", "float64"])
def test_from_peft_makes_an_adapter_that_runs_and_keeps_the_values(tmp_path, file, base):
    lora = peft.LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False)
    source = peft.get_peft_model(llama().to(getattr(torch, file)), lora, autocast_adapter_dtype=False)
    source.save_pretrained(str(tmp_path))
    model = ilora.from_peft(tmp_path, 4, model=llama().to(getattr(torch, base)))
    assert logits(model, ilora_gate=uniform()).isfinite().all()
    for path, layer in ilora.ilora_layers(model).items():
        kept = source.base_model.model.get_submodule(path).lora_A["default"].weight
        assert torch.equal(layer.lora_A, kept.to(layer.lora_A.dtype))
        assert torch.promote_types(layer.lora_A.dtype, kept.dtype) == layer.lora_A.dtype
    wide = "float32" if base != file and base.endswith("16") else None
    assert model.ilora.config.adapter_dtype == wide


def test_from_peft_refuses_files_that_repeat_weights_of_the_base(tmp_path):
    def base():
        model = llama()
        model.config.vocab_size += 1  # as after resize_token_embeddings, which makes PEFT save the embeddings
        return model

    config = peft.LoraConfig(r=8, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    source = peft.get_peft_model(base(), config).eval()
    want = logits(source)
    source.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    model = base()
    before = bits(model)
    with pytest.raises(AdapterError, match=r"lm_head\.base_layer\.weight' is a weight of the base.*pass the PeftModel"):
        ilora.from_peft(tmp_path / "a", 4, model=model)
    assert_untouched(model, before)
    source.save_pretrained(str(tmp_path / "b"), save_embedding_layers=False)
    close(logits(ilora.from_peft(tmp_path / "b", 4, model=model), ilora_gate=uniform()), want)
    with pytest.raises(ValueError, match="has the adapter 'default' already"):
        ilora.from_peft(tmp_path / "b", 4, model=model)
    close(logits(ilora.from_peft(source, 4), ilora_gate=uniform()), want)


def test_from_peft_takes_the_active_adapter():
    source = trained("llama")
    source.add_adapter("second", peft.LoraConfig(r=4, target_modules=["gate_proj"], init_lora_weights=False))
    source.set_adapter("second")
    want = logits(source.eval())
    model = ilora.from_peft(source, 4)
    assert {path.rsplit(".", 1)[1] for path in ilora.targets(model)} == {"gate_proj"}
    close(logits(model, ilora_gate=uniform()), want)


REFUSED = {
    "DoRA": {"use_dora": True},
    "trained biases": {"bias": "all"},
    "a bias on lora_B": {"lora_bias": True},
    "replicated layers": {"layer_replication": [[0, 1], [0, 2]]},
    "trains no single tokens": {"trainable_token_indices": [1, 2]},
    "embed_tokens": {"target_modules": ["embed_tokens", "q_proj"]},
    "rank 6, which num_experts=4": {"r": 6},
    "rank 512, more than the 256": {"r": 512},
}


@pytest.mark.parametrize("why", REFUSED)
def test_from_peft_refuses_by_name(tmp_path, why):
    config = peft.LoraConfig(**{"r": 8, "target_modules": ["q_proj"], **REFUSED[why]})
    source = peft.get_peft_model(llama(), config).eval()
    source.save_pretrained(str(tmp_path / "a"))
    before, want = bits(source), logits(source)
    with pytest.raises(AdapterError, match=why):
        ilora.from_peft(source, 4)
    assert_untouched(source, before)
    assert torch.equal(logits(source), want)
    model = llama()
    before = bits(model)
    with pytest.raises(AdapterError, match=why):
        ilora.from_peft(tmp_path / "a", 4, model=model)
    assert_untouched(model, before)


def ia3():
    return peft.get_peft_model(llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


def merged():
    model = trained("llama")
    model.merge_adapter()
    return model


OTHERS = {  # message: (error, source, gate)
    "expected 'LORA', got 'IA3'": (AdapterError, ia3, None),
    r"expected a peft\.PeftModel": (TypeError, llama, None),
    "a saved adapter needs model=": (TypeError, lambda: "somewhere", None),
    "it is merged into its base; call unmerge_adapter": (AdapterError, merged, None),
    # refused when PEFT's layers are gone already
    "num_experts: expected this gate network's 2, got 4": (ValueError, lambda: trained("llama"), SequenceGate(6, 2)),
}


@pytest.mark.parametrize("words", OTHERS)
def test_from_peft_refuses_other_things(words):
    error, make, gate = OTHERS[words]
    source = make()
    before = None if isinstance(source, str) else (bits(source), logits(source))
    with pytest.raises(error, match=words):
        ilora.from_peft(source, 4, gate=gate)
    if before is not None:
        assert_untouched(source, before[0])
        assert torch.equal(logits(source), before[1])


def surplus(name):
    return {f"base_model.model.{name}": torch.ones(8, 2)}


DAMAGE = {
    "adapter_config.json: peft_type": ("config", lambda c: c.update(peft_type="LOHA")),
    "field 'alpha_pattern': expected an object": ("config", lambda c: c.update(alpha_pattern=[1])),
    "the lora_alpha of .*expected a number": ("config", lambda c: c.update(lora_alpha="8")),
    "'.*lora_A.weight': expected shape": ("config", lambda c: c.update(r=4)),
    "init_lora_weights='pissa'": ("config", lambda c: c.update(init_lora_weights="pissa")),
    "new_thing=3: iLoRA has no counterpart": ("config", lambda c: c.update(new_thing=3)),
    "'.*lora_B.weight' of shape .* is missing": ("tensors", lambda t: t.pop(next(k for k in t if "lora_B" in k))),
    "'base_model.model.lm_head.weight' is a weight of the base model.*PeftModel": (
        "tensors",
        lambda t: t.update(surplus("lm_head.weight")),
    ),
    "unexpected tensor 'base_model.model.no.weight'": ("tensors", lambda t: t.update(surplus("no.weight"))),
    "unexpected tensor 'base_model.model.no.lora_A": ("tensors", lambda t: t.update(surplus("no.lora_A.weight"))),
    "got torch.int64": ("tensors", lambda t: t.update({k: v.long() for k, v in t.items()})),
    "it has no LoRA layer": ("tensors", lambda t: t.clear()),
}


@pytest.mark.parametrize("why", DAMAGE)
def test_from_peft_checks_the_files(tmp_path, why):
    from safetensors.torch import load_file, save_file

    trained("llama").save_pretrained(str(tmp_path))
    kind, change = DAMAGE[why]
    if kind == "config":
        fields = json.loads((tmp_path / "adapter_config.json").read_text())
        change(fields)
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    else:
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = llama()
    before = bits(model)
    with pytest.raises(AdapterError, match=why):
        ilora.from_peft(tmp_path, 4, model=model)
    assert_untouched(model, before)
