"""Saving and loading: to the bit, atomic, in place, several adapters, transformers' own way of saving."""

import json

import pytest
import torch
from saved_cases import (
    MODELS,
    BlockGate,
    NormedGate,
    adapted,
    as_from_a_file,
    assert_same_state,
    assert_untouched,
    bits,
    llama,
    logits,
    randomise,
)

import ilora
from ilora import AdapterError, ILoRAConfig, PromptGate, SequenceGate, UniformGate

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

Z = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
GATES = {
    "none": (lambda: None, {"ilora_gate": torch.rand(3, 4)}),
    "sequence-per-layer": (lambda: SequenceGate(6, 4, per_layer=True), {"ilora_z": Z}),
    "sequence-mlp": (lambda: SequenceGate(6, 4, kind="mlp", temperature=0.5), {"ilora_z": Z}),
    "sequence-noisy": (lambda: SequenceGate(6, 4, kind="noisy", balance=0.01), {"ilora_z": Z}),
    "prompt": (lambda: PromptGate(4, kind="topk"), {}),
    "uniform": (lambda: UniformGate(4), {}),
    "custom": (lambda: NormedGate(), {"ilora_z": Z}),
}
PATTERNS = {
    "rank_pattern": {"(q_proj|c_fc)": 16},
    "alpha_pattern": {r"1.mlp.(up_proj|c_fc)": 7},
    "expert_pattern": {"(k_proj|c_proj)": 2},
    "lora_dropout": 0.1,
}
SAVED = {"llama": ("lm_head", "model.norm"), "gpt2": ("lm_head", "ln_f")}


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("family", MODELS)
def test_round_trip_keeps_every_bit(tmp_path, family, kind):
    network, call = GATES[kind]
    model = adapted(MODELS[family](), network(), **PATTERNS, modules_to_save=SAVED[family])
    path = ilora.save_adapter(model, tmp_path / "a")
    again = ilora.load_adapter(MODELS[family](), path, gate=NormedGate() if kind == "custom" else None)
    assert again.ilora.config == model.ilora.config
    assert_same_state(again.state_dict(), model.state_dict())
    flags = ({key: p.requires_grad for key, p in each.named_parameters()} for each in (again, model))
    assert next(flags) == next(flags)
    assert torch.equal(logits(again, **call), logits(model, **call))


@pytest.mark.parametrize("adapter_dtype", [None, "float32"])
def test_round_trip_keeps_bfloat16(tmp_path, adapter_dtype):
    config = {"modules_to_save": ("lm_head",), "adapter_dtype": adapter_dtype}
    model = adapted(llama().bfloat16(), SequenceGate(6, 4), **config)
    again = ilora.load_adapter(llama().bfloat16(), ilora.save_adapter(model, tmp_path / "a"))
    assert_same_state(again.state_dict(), model.state_dict())
    model.bfloat16()  # the gate network too
    again = ilora.load_adapter(llama().bfloat16(), ilora.save_adapter(model, tmp_path / "b"))
    if adapter_dtype is None:
        assert_same_state(again.state_dict(), model.state_dict())
    assert again.ilora_gate.weight.dtype == torch.bfloat16
    model = adapted(llama())
    again = ilora.load_adapter(llama().bfloat16(), ilora.save_adapter(model, tmp_path / "c"))
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].bfloat16()), key  # rounded as copy_ does


def test_shared_and_strided_tensors_are_saved_whole(tmp_path):
    model = adapted(llama())
    layers = [model.get_submodule(path) for path in ilora.targets(model)]
    both = torch.randn(2, 16, 8)
    layers[0].lora_B.data = both.transpose(1, 2)[0].T  # a view of more memory than it shows
    layers[0].lora_A.data = torch.randn(16, 8).T  # strided
    layers[1].lora_A = layers[0].lora_A  # tied
    again = ilora.load_adapter(llama(), ilora.save_adapter(model, tmp_path / "a"))
    assert_same_state(again.state_dict(), model.state_dict())
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size < 40_000


def test_several_adapters(tmp_path):
    model = adapted(llama(), SequenceGate(6, 4), name="one")
    outputs = {"one": logits(model, ilora_z=Z)}
    ilora.add_adapter(model, "two", ILoRAConfig(r=4, num_experts=2, modules_to_save=("lm_head",)), PromptGate(2))
    outputs["two"] = logits(randomise(model))
    one, two = (ilora.save_adapter(model, tmp_path / name, name=name) for name in ("one", "two"))
    fresh = ilora.load_adapter(ilora.load_adapter(llama(), one, name="one"), two, name="two")
    for _ in range(2):
        assert ilora.adapters(fresh) == ("two", "one")
        assert torch.equal(logits(fresh), outputs["two"])
        assert torch.equal(logits(ilora.set_adapter(fresh, "one"), ilora_z=Z), outputs["one"])
        ilora.load_adapter(fresh, two, name="two")  # one that is kept beside it is overwritten, and comes to the front
    before = bits(fresh)
    other = r"two.*other settings.*r is 4, in the file 8.*num_experts is 2.*gate network's type"
    with pytest.raises(AdapterError, match=other):
        ilora.load_adapter(fresh, one, name="two")
    with pytest.raises(ValueError, match="no adapter 'three'"):
        ilora.save_adapter(fresh, tmp_path / "three", name="three")
    assert_untouched(fresh, before)


def test_the_order_of_names_is_no_setting(tmp_path):
    path = ilora.save_adapter(adapted(llama(), target_modules=("q_proj", "v_proj")), tmp_path / "a")
    model = adapted(llama(), target_modules=("v_proj", "q_proj"), std=0.3)
    loaded = ilora.load_adapter(model, path)
    assert_same_state(loaded.state_dict(), ilora.load_adapter(llama(), path).state_dict())


def test_a_gate_network_that_is_given(tmp_path):
    sequence, gate = adapted(llama(), SequenceGate(6, 4)), SequenceGate(6, 4)
    path = ilora.save_adapter(sequence, tmp_path / "a")
    assert ilora.load_adapter(llama(), path, gate=gate).ilora_gate is gate
    kind = adapted(llama(), BlockGate(6, 4, per_layer=True))
    path = ilora.save_adapter(kind, tmp_path / "b")
    again = ilora.load_adapter(llama(), path, gate=BlockGate(6, 4, per_layer=True))  # not bound to the layers yet
    assert_same_state(again.state_dict(), kind.state_dict())


def on_meta():
    with torch.device("meta"):
        return type(llama())(llama().config)


def with_gate(gate):
    return lambda: adapted(llama(), gate())


PLAIN, SEQUENCE = with_gate(lambda: None), with_gate(lambda: SequenceGate(6, 4))
OWN, BLOCK = with_gate(NormedGate), with_gate(lambda: BlockGate(6, 4, per_layer=True))
REFUSED = {  # message: (what was saved, the model to load it into, arguments)
    r"ilora_config\.json: gate: .*saved_cases\.NormedGate; build it and give it as gate=": (OWN, llama, {}),
    r"ilora_gate\.safetensors: tensor .*expected shape .*5\], got .*6\]": (OWN, llama, {"gate": NormedGate(5)}),
    "saved without a gate network, but gate= is given": (PLAIN, llama, {"gate": NormedGate()}),
    "the gate network's z_dim is 7, in the file 6": (SEQUENCE, llama, {"gate": SequenceGate(7, 4)}),
    "the gate network's z_dim is 1, in the file 6": (SEQUENCE, llama, {"gate": SequenceGate(1, 4)}),
    "the gate network's type is 'custom', in the file 'SequenceGate'": (SEQUENCE, llama, {"gate": NormedGate()}),
    "does not fit Llama.*: num_experts: .* 2, got 4": (BLOCK, llama, {"gate": BlockGate(6, 2)}),
    "does not fit GPT2LMHeadModel: no module of GPT2LMHeadModel matches": (
        lambda: adapted(llama(), target_modules=("q_proj",)),
        MODELS["gpt2"],
        {},
    ),
    r"adapter_model\.safetensors: tensor .*layers\.2.*lora_A.* is missing": (PLAIN, lambda: llama(layers=3), {}),
    "lora_A: the model is on the meta device": (SEQUENCE, on_meta, {}),
    "DataParallel wraps a LlamaForCausalLM": (PLAIN, lambda: torch.nn.DataParallel(llama()), {}),
    "adapter 'default' has other settings: r is 4, in the file 8;": (PLAIN, lambda: adapted(llama(), r=4), {}),
    "adapter 'default' has its gate network; leave it out": (SEQUENCE, SEQUENCE, {"gate": SequenceGate(6, 4)}),
    "unmerge": (PLAIN, lambda: ilora.merge(PLAIN(), torch.rand(1, 4)), {"name": "other"}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused_and_the_model_kept(tmp_path, words):
    saved, model, options = REFUSED[words]
    path, model = ilora.save_adapter(saved(), tmp_path / "a"), model()
    before = bits(model)
    with pytest.raises(AdapterError, match=words):
        ilora.load_adapter(model, path, **options)
    if "meta" not in words:
        assert_untouched(model, before)
    assert type(model) is before[0]


def test_a_merged_model_is_saved_unmerged(tmp_path):
    model, gate = adapted(llama()), torch.rand(1, 4)
    gated = logits(model, ilora_gate=gate)
    ilora.merge(model, gate)
    again = ilora.load_adapter(llama(), ilora.save_adapter(model, tmp_path / "b"))
    assert torch.equal(logits(again, ilora_gate=gate), gated)


def test_paths(tmp_path):
    model = adapted(llama(layers=1))
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file"):
        ilora.save_adapter(model, tmp_path / "file")
    fresh = llama(layers=1)
    for path, why in ((tmp_path / "file", "got a file"), (tmp_path / "no", "no such directory"), ("no", "no such")):
        with pytest.raises(AdapterError, match=why):
            ilora.load_adapter(fresh, path)
    path = ilora.save_adapter(model, tmp_path / "deep" / "er")
    (path / "ilora_config.json").unlink()
    with pytest.raises(AdapterError, match="from_peft"):
        ilora.load_adapter(fresh, path)
    with pytest.raises(ValueError, match="has no iLoRA in it"):
        ilora.save_adapter(fresh, tmp_path / "b")
    (tmp_path / "empty").mkdir()
    ilora.load_adapter(fresh, ilora.save_adapter(model, tmp_path / "empty"))


def test_names_that_mean_nothing_here_are_read_from_files(tmp_path):
    settings = {"target_modules": ("q_proj", "c_attn"), "rank_pattern": {"lm_head": 4}, "layers_to_transform": (0, 7)}
    config = ILoRAConfig(**settings, exclude_modules=("h.0",))
    with pytest.raises(ValueError, match="no module of LlamaForCausalLM matches 'c_attn'"):
        ilora.inject(llama(), config)
    model = randomise(as_from_a_file(llama(), config))  # as earlier versions did
    path = ilora.save_adapter(model, tmp_path / "a")
    again = ilora.load_adapter(llama(), path)
    assert again.ilora.config == config
    assert_same_state(ilora.load_adapter(again, path).state_dict(), model.state_dict())


def test_verify_false_skips_checksums_only(tmp_path):
    path = ilora.save_adapter(adapted(llama(layers=1)), tmp_path / "a")
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "renamed"}))
    with pytest.raises(AdapterError, match="SHA-256"):
        ilora.load_adapter(llama(layers=1), path)
    ilora.load_adapter(llama(layers=1), path, verify=False)
    file.write_text("what PEFT makes of it is its own affair")
    ilora.load_adapter(llama(layers=1), path, verify=False)
    file.unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json: is missing"):
        ilora.load_adapter(llama(layers=1), path, verify=False)


def test_a_head_that_was_resized_is_saved_as_it_is(tmp_path):
    model = llama()
    ilora.inject(model, ILoRAConfig(modules_to_save=("lm_head",)), gate=UniformGate(4))
    model.resize_token_embeddings(model.config.vocab_size + 9)
    with torch.no_grad():
        model.lm_head.weight.fill_(7.0)
    ilora.save_adapter(model, tmp_path / "adapter")
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(kept, model.lm_head.weight)
    ilora.add_adapter(model, "other", ILoRAConfig(), gate=UniformGate(4))
    ilora.set_adapter(model, "default")
    assert torch.equal(model.lm_head.weight, kept)
