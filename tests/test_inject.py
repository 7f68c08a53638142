"""What inject matches and refuses, and that the model can be had back as it was."""

import copy
from collections import OrderedDict

import pytest
import torch
import transformers as hf
from models import MODELS, E, gates, gpt2, injected, llama, mixtral, prompts, randomised
from torch import nn

import ilora
from ilora import ILoRAConfig, ILoRALinear, SequenceGate

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def matched(config, make=llama):
    return ilora.targets(ilora.inject(make(), config))


def test_all_linear_leaves_the_head_out():
    paths = matched(ILoRAConfig())
    assert {path.rsplit(".", 1)[-1] for path in paths} == set(PARTS)
    assert len(paths) == 2 * len(PARTS)
    model = ilora.inject(classifier(), ILoRAConfig())  # whose head was drawn anew: it is trained whole, and saved
    assert "score" not in ilora.targets(model)
    assert model.score.weight.requires_grad
    assert ilora.targets(ilora.inject(classifier(), ILoRAConfig(target_modules=["score"]))) == ("score",)


def classifier():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(vocab_size=31, **sizes, num_labels=3, pad_token_id=0))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": {"mlp.up_proj"}}, 2),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, 1),
        ({"target_modules": r".*\.1\.self_attn\.[qk]_proj"}, 2),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, 7),
        ({"target_modules": "all-linear", "layers_to_transform": [0, 1], "exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, 8),
        ({"target_modules": ["lm_head"]}, 1),
    ],
)
def test_ways_to_name_modules(options, count):
    assert len(matched(ILoRAConfig(**options))) == count


def test_patterns_give_modules_their_own_rank_alpha_and_experts():
    model = injected(
        rank_pattern={"q_proj": 4, r"layers\.1\.mlp\..*": 16},
        alpha_pattern={"model.layers.0.self_attn.q_proj": 5.0},
        expert_pattern={"q_proj": 1, "k_proj": 2},
    )
    layers = ilora.ilora_layers(model)
    q, k = (layers[f"model.layers.0.self_attn.{part}_proj"] for part in "qk")
    assert (q.r, q.num_experts, q.lora_alpha, q.scaling) == (4, 1, 5.0, 5.0 / 4)
    assert (k.r, k.num_experts, k.scaling) == (8, 2, 32 / 4)
    assert layers["model.layers.1.mlp.up_proj"].r == 16
    assert layers["model.layers.0.mlp.up_proj"].r == 8
    ids, g = prompts((5, 5))[0], gates(2)
    seen = {}
    for name, layer in (("q", q), ("k", k)):
        layer.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (args[0], y)}))
    model(input_ids=ids, ilora_gate=g)
    for name, layer, merged in (
        ("q", q, g.sum(-1, keepdim=True)),
        ("k", k, torch.stack([g[:, :2].sum(1), g[:, 2:].sum(1)], 1)),
    ):
        x, y = seen[name]
        plain = (layer.base_layer.weight, layer.base_layer.bias, layer.lora_A, layer.lora_B)
        torch.testing.assert_close(y, ilora.reference.ilora_linear(x, *plain, merged, layer.scaling))
    with pytest.raises(ValueError, match=r"q_proj: r=4 and num_experts=3"):
        ilora.inject(llama(), ILoRAConfig(rank_pattern={"q_proj": 4}, expert_pattern={"q_proj": 3}))


@pytest.mark.parametrize("name", MODELS)
def test_eject_gives_the_model_back(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, kind = copy.deepcopy(model.state_dict()), type(model)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    parameters = {key: id(p) for key, p in model.named_parameters()}
    ilora.inject(model, ILoRAConfig(), gate=ilora.UniformGate(E))
    assert isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    trained = ("lora_", *model.ilora.config.modules_to_save)
    assert not any(p.requires_grad for key, p in model.named_parameters() if not any(name in key for name in trained))
    randomised(model)
    assert ilora.eject(model) is model
    assert type(model) is kind
    assert {key: id(p) for key, p in model.named_parameters()} == parameters
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not {"ilora", "ilora_gate", "_hf_peft_config_loaded"} & vars(model).keys()
    with pytest.raises(ValueError, match="has no iLoRA in it"):
        ilora.eject(model)
    ilora.inject(model, ILoRAConfig())


def test_a_fresh_injection_changes_nothing_yet():
    torch.manual_seed(0)
    model, ids = llama().eval(), prompts((5, 5))[0]
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(ilora.inject(model)(input_ids=ids, ilora_gate=gates(2)).logits, expected)


def test_disable_adapter_is_the_frozen_model():
    torch.manual_seed(0)
    model, ids, g = llama().eval(), prompts((5, 5))[0], gates(2)
    expected = model(input_ids=ids).logits
    ilora.inject(model, ILoRAConfig(modules_to_save=["lm_head"]))
    randomised(model)
    model.lm_head.weight.data.add_(1.0)
    adapted = model(input_ids=ids, ilora_gate=g).logits
    with ilora.disable_adapter(model), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=2, do_sample=False)[:, :5], ids)
        with pytest.raises(RuntimeError, match="the adapter is disabled"):
            model(input_ids=ids, ilora_gate=g)
    with pytest.raises(KeyError), ilora.disable_adapter(model):
        raise KeyError
    assert torch.equal(model(input_ids=ids, ilora_gate=g).logits, adapted)


def test_modules_to_save_are_trained_whole_and_ejected():
    torch.manual_seed(0)
    model = gpt2()
    embedding = model.transformer.wte.weight
    assert model.lm_head.weight is embedding  # tied
    kept = embedding.clone()
    ilora.inject(model, ILoRAConfig(modules_to_save=["lm_head"]))
    assert model.lm_head.weight is not embedding
    model.tie_weights()
    assert model.lm_head.weight is not embedding, "tied again: training the head would train the embeddings"
    assert [key for key, p in model.named_parameters() if p.requires_grad and "lora" not in key] == ["lm_head.weight"]
    model(input_ids=prompts((5, 5))[0], ilora_gate=gates(2)).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    ilora.eject(model)
    assert model.lm_head.weight is embedding
    assert torch.equal(embedding, kept)
    with pytest.raises(ValueError, match="no module of GPT2LMHeadModel is called 'nothing'"):
        ilora.inject(model, ILoRAConfig(modules_to_save=["nothing"]))


def test_trainable_parameters(capsys):
    model = injected(target_modules=["q_proj"])
    expected = 2 * (8 * 32 + 32 * 8)
    assert ilora.trainable_parameters(model)[0] == expected
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {expected:,} || all params: ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype):
    model = ilora.inject(llama().to(dtype), ILoRAConfig(), gate=ilora.SequenceGate(6, E))
    assert {p.dtype for key, p in model.named_parameters() if "ilora_gate" not in key} == {dtype}
    assert model.ilora_gate.weight.dtype == torch.float32
    model = ilora.inject(llama().to(torch.bfloat16), ILoRAConfig(adapter_dtype="float32"))
    assert {p.dtype for key, p in model.named_parameters() if "lora_" in key} == {torch.float32}
    model(input_ids=prompts((5, 5))[0], ilora_gate=gates(2)).logits.sum().backward()


def test_one_layer_in_two_places_stays_one():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    model = ilora.inject(Twice(), ILoRAConfig())
    assert model.first is model.second
    assert isinstance(model.second, ILoRALinear)
    model(torch.randn(2, 3, 4), ilora_gate=gates(2))
    ilora.eject(model)
    assert model.first is model.second
    assert type(model.first) is torch.nn.Linear


def test_refusals_name_what_is_wrong_and_change_nothing():
    model = llama()
    before = dict(model.named_modules())
    refused = {
        r"no module of LlamaForCausalLM matches.*'nothing'.*q_proj": {"target_modules": ["nothing"]},
        r"self_attn: target_modules matches this LlamaAttention, which is no linear": {"target_modules": ["self_attn"]},
        r"layers_to_transform=\(7,\)": {"layers_to_transform": [7]},
    }
    for words, options in refused.items():
        with pytest.raises(ValueError, match=words):
            ilora.inject(model, ILoRAConfig(**options))
    with pytest.raises(ValueError, match="num_experts"):
        ilora.inject(model, ILoRAConfig(), gate=ilora.SequenceGate(6, 8))
    with pytest.raises(TypeError, match="config: expected an ILoRAConfig, got dict"):
        ilora.inject(model, {"r": 8})
    with pytest.raises(TypeError, match="gate: expected a gate network"):
        ilora.inject(model, ILoRAConfig(), gate=gates(2))
    assert dict(model.named_modules()) == before
    assert type(model) is hf.LlamaForCausalLM
    assert all(p.requires_grad for p in model.parameters())
    ilora.inject(model)
    with pytest.raises(ValueError, match="has the adapter 'default' already"):
        ilora.inject(model)
    for wrapped in (torch.compile(llama()), torch.compile(model)):
        for call in (ilora.inject, ilora.eject):
            with pytest.raises(
                ValueError, match=r"OptimizedModule wraps a LlamaForCausalLM: give that one, .*_orig_mod"
            ):
                call(wrapped)


def test_experts_of_a_sparse_mixture():
    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = torch.nn.Linear(4, 2)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    with pytest.raises(ValueError, match=r"experts\.0: an expert of a sparse mixture"):
        ilora.inject(Mixture(), ILoRAConfig())
    assert ilora.targets(ilora.inject(Mixture(), ILoRAConfig(exclude_modules=r".*experts\..*"))) == ("router",)
    fused = [path for path in ilora.targets(injected(mixtral)) if ".experts." in path]  # a tensor for each projection
    assert [path.rsplit(".", 1)[-1] for path in fused] == ["gate_up_proj", "down_proj"] * 2
    with pytest.raises(ValueError, match=r"out_proj: nn.MultiheadAttention reads this weight"):
        ilora.inject(torch.nn.MultiheadAttention(8, 2), ILoRAConfig())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": 6}, ValueError, "r=6, num_experts=4: the experts must divide"),
        ({"r": 0}, ValueError, "r: must be at least 1"),
        ({"r": 8.0}, TypeError, "r: expected an int"),
        ({"r": True}, TypeError, "r: expected an int"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout: must be 0 <= p < 1"),
        ({"lora_alpha": "32"}, TypeError, "lora_alpha: expected a number"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha: must be finite"),
        ({"lora_alpha": 10**400}, ValueError, "lora_alpha: must be finite"),
        ({"target_modules": "("}, ValueError, "target_modules: '\\(' is no regular expression"),
        ({"target_modules": 5}, TypeError, "target_modules: expected a name"),
        ({"modules_to_save": "lm_head"}, TypeError, "expected a list of names"),
        ({"layers_to_transform": ["1"]}, TypeError, "layers_to_transform: expected a list of ints"),
        ({"rank_pattern": {"q": 0}}, ValueError, "rank_pattern: must hold positive ints"),
        ({"rank_pattern": ["q"]}, TypeError, "rank_pattern: expected a dict"),
        ({"adapter_dtype": "int8"}, ValueError, "adapter_dtype: must be one of"),
        ({"backend": "cuda"}, ValueError, "backend: must be None or one of"),
        ({"alpha_pattern": {"q": float("inf")}}, ValueError, "alpha_pattern: must hold finite"),
    ],
)
def test_bad_settings(options, error, words):
    with pytest.raises(error, match=words):
        ILoRAConfig(**options)


def test_config_round_trip():
    config = ILoRAConfig(
        r=16, target_modules={"v_proj", "q_proj"}, layers_to_transform=[0], rank_pattern={"q_proj": 8}, lora_alpha=2.5
    )
    assert ILoRAConfig.from_dict(config.to_dict()) == config
    assert config.target_modules == ("q_proj", "v_proj")
    with pytest.raises(ValueError, match="has no field 'rank'"):
        ILoRAConfig.from_dict({"rank": 8})


def test_several_adapters_on_one_base():
    model, ids = injected(), prompts((5, 5))[0]
    g, z = gates(2), torch.randn(2, 6)
    first = model(input_ids=ids, ilora_gate=g).logits
    parameters = {key: id(p) for key, p in model.named_parameters()}
    network = ilora.SequenceGate(6, 2)
    ilora.add_adapter(
        model, "other", ILoRAConfig(r=4, num_experts=2, target_modules=["v_proj"], modules_to_save=["lm_head"]), network
    )
    randomised(model, 3)
    assert ilora.adapters(model) == ("other", "default")
    assert len(ilora.targets(model)) == 2
    second = model(input_ids=ids, ilora_z=z).logits
    assert (first - second).abs().max() > 1e-3
    ilora.set_adapter(model, "default")
    assert torch.equal(model(input_ids=ids, ilora_gate=g).logits, first)
    assert {key: id(p) for key, p in model.named_parameters()} == parameters
    ilora.set_adapter(model, "other")
    assert torch.equal(model(input_ids=ids, ilora_z=z).logits, second)
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        ilora.add_adapter(model, "default")
    with pytest.raises(ValueError, match="no adapter 'third'"):
        ilora.set_adapter(model, "third")
    with pytest.raises(ValueError, match="'other' is the active one"):
        ilora.delete_adapter(model, "other")
    with pytest.raises(ValueError, match="matches target_modules"):
        ilora.add_adapter(model, "third", ILoRAConfig(target_modules=["nothing"]))
    assert torch.equal(model(input_ids=ids, ilora_z=z).logits, second)
    ilora.delete_adapter(model, "default")
    assert ilora.adapters(model) == ("other",)
    ilora.eject(model)
    assert type(model) is hf.LlamaForCausalLM


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_agrees_with_the_gated_one(name):
    model, g = injected(MODELS[name]), gates(2)
    ids, more = prompts((5, 5))[0], {}
    if name in ("t5", "bart"):
        more = {"decoder_input_ids": ids}
    if name == "t5":  # its unscaled attention makes rounding errors large
        model.double()
    gated = model(input_ids=ids, ilora_gate=g, **more).logits
    for i in range(2):
        ilora.merge(model, g[i])
        torch.testing.assert_close(model(input_ids=ids, **more).logits[i], gated[i], rtol=1e-4, atol=1e-5)
        ilora.unmerge(model)
    assert torch.equal(model(input_ids=ids, ilora_gate=g, **more).logits, gated)


def test_merging_asks_for_one_gate_and_says_what_it_cannot_do():
    model, g, ids = injected(), gates(2), prompts((5, 5))[0]
    with pytest.raises(TypeError, match="merge"):
        ilora.merge(model)
    for wrong in (g, torch.ones(3)):
        with pytest.raises(ValueError, match="expected one user's gate"):
            ilora.merge(model, wrong)
    with pytest.raises(ValueError, match="no gate is merged"):
        ilora.unmerge(model)
    ilora.merge(model, g[:1])
    merged = model(input_ids=ids).logits
    with pytest.raises(RuntimeError, match="a gate is merged into the weights"):
        model(input_ids=ids, ilora_gate=g)
    with pytest.raises(RuntimeError, match="nothing would be trained"):
        model.train()(input_ids=ids)
    for refused in (
        lambda: ilora.merge(model, g[0]),
        lambda: ilora.eject(model),
        lambda: ilora.add_adapter(model, "b"),
    ):
        with pytest.raises(ValueError, match="merged"):
            refused()
    ilora.unmerge(model.eval())
    ilora.merge(model, g[0], keep_base=False)
    with pytest.raises(ValueError, match="weights before it are gone"):
        ilora.unmerge(model)
    plain = ilora.eject(model)
    assert type(plain) is hf.LlamaForCausalLM
    assert torch.equal(plain(input_ids=ids).logits, merged)


def test_merging_a_gate_for_each_block():
    model, ids = injected(), prompts((5,))[0]
    g = torch.stack([gates(1, seed=s) for s in range(2)])
    expected = model(input_ids=ids, ilora_gate=g).logits
    torch.testing.assert_close(ilora.merge(model, g)(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_gate_network_has_the_model_s_mode_and_may_be_replaced():
    model = ilora.inject(llama().eval(), ILoRAConfig(), gate=ilora.SequenceGate(6, E, "noisy"))
    assert not model.ilora_gate.training
    assert model.train().ilora_gate.training
    other = ilora.SequenceGate(6, E)
    model.ilora_gate = other
    ilora.add_adapter(model, "second", ILoRAConfig())
    assert model.ilora_gate is None
    assert ilora.set_adapter(model, "default").ilora_gate is other


def test_a_class_changed_since_is_not_ejected():
    model = ilora.inject(llama())
    model.__class__ = type("Sharded", (type(model),), {})
    with pytest.raises(ValueError, match=r"changed after inject, to Sharded"):
        ilora.eject(model)


def test_layers_of_peft_inside_a_plain_model_are_refused():
    peft = pytest.importorskip("peft")
    model = llama()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj: it is PEFT's Linear; take PEFT's adapter out"):
        ilora.inject(model, ILoRAConfig())
    assert type(model) is hf.LlamaForCausalLM


def test_a_layer_made_of_layers_is_adapted_once():
    class Factored(torch.nn.Module):
        in_features, out_features = 8, 8

        def __init__(self):
            super().__init__()
            self.down, self.up = torch.nn.Linear(8, 2), torch.nn.Linear(2, 8)

        def forward(self, x):
            return self.up(self.down(x))

    model = torch.nn.Sequential(Factored(), torch.nn.Linear(8, 4))
    assert ilora.targets(ilora.inject(model, ILoRAConfig(r=4))) == ("0", "1")
    model(torch.randn(2, 3, 8), ilora_gate=gates(2))


def test_a_partial_state_says_what_of_the_adapter_it_lacks():
    class WithStatistics(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))
            self.linear = torch.nn.Linear(6, E)

        def forward(self, z):
            return self.linear(z - self.mean).softmax(-1)

    model = ilora.inject(llama(), ILoRAConfig(target_modules=["q_proj"]), gate=WithStatistics())
    state = {k: v for k, v in model.state_dict().items() if "lora_A" in k}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert {key.rsplit(".", 1)[-1] for key in missing} == {"lora_B", "mean", "weight", "bias"}
    assert all("lora_B" in key or key.startswith("ilora_gate.") for key in missing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_parked_follows_the_model_to_another_dtype(dtype):
    def settings():
        return ilora.ILoRAConfig(r=4, num_experts=2, target_modules=["0"], modules_to_save=["1"])

    norm = torch.nn.LayerNorm(4, dtype=torch.float64)  # of a dtype of its own, which nobody changes
    norm.forward = lambda x: x
    block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4), norm)
    ilora.inject(block, settings())
    ilora.add_adapter(block, "other", settings())
    for module in (block[0], block[1]):
        module.to(dtype)
    x, gate = torch.randn(3, 5, 8, dtype=dtype), torch.rand(3, 2)
    with ilora.disable_adapter(block):
        assert block(x).dtype == dtype
    ilora.set_adapter(block, "default")
    assert block(x, ilora_gate=gate).dtype == dtype
    ilora.eject(block)
    assert block(x).dtype == dtype
    assert [p.dtype for p in block.parameters()] == [dtype] * 4 + [torch.float64] * 2


def test_an_adapter_keeps_the_dtype_that_was_asked_for():
    block = ilora.inject(torch.nn.Sequential(torch.nn.Linear(8, 8)), ilora.ILoRAConfig(adapter_dtype="bfloat16"))
    ilora.add_adapter(block, "other", ilora.ILoRAConfig())
    ilora.set_adapter(block, "default")
    assert block[0].lora_A.dtype == block[0].lora_B.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(3, 5, 8), ilora_gate=torch.rand(3, 4)).dtype == torch.bfloat16


def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


@pytest.mark.parametrize("make", [block, lambda: nn.ModuleList([block()]), lambda: nn.ModuleDict({"a": block()})])
def test_a_container_would_take_a_gate_network_for_one_of_its_modules(make):
    model = make()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="put it into a module of your own"):
        ilora.inject(model, ILoRAConfig(), gate=SequenceGate(6, 4))
    assert list(model.state_dict()) == names
    ilora.inject(model, ILoRAConfig())
    with pytest.raises(ValueError, match="put it into a module of your own"):
        model.ilora_gate = SequenceGate(6, 4)
    assert len(model) == len(ilora.eject(model)) == len(make())


def test_a_sequential_takes_gates():
    x = torch.randn(3, 8)
    model = ilora.inject(block(), ILoRAConfig())
    torch.testing.assert_close(model(x, ilora_gate=torch.rand(3, 4)), block()(x))
    assert list(model._modules) == ["0", "1", "2"]


def test_a_child_called_module_makes_no_wrapper():
    model = nn.Sequential(OrderedDict(module=nn.Linear(8, 8)))
    assert ilora.targets(ilora.inject(model)) == ("module",)
    with pytest.raises(ValueError, match=r"DataParallel wraps a Sequential: give that one, model\.module"):
        ilora.targets(nn.DataParallel(model))


def test_names_that_the_model_has_already():
    model = block()
    model.ilora_gate = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="Sequential has an attribute ilora or ilora_gate of its own"):
        ilora.inject(model, ILoRAConfig())
    assert type(model) is nn.Sequential


def test_another_gate_network_must_fit():
    model = injected(gate=SequenceGate(6, 4))
    before = model.ilora_gate
    with pytest.raises(ValueError, match="num_experts: expected this gate network's 3, got 4"):
        model.ilora_gate = SequenceGate(6, 3)
    assert model.ilora_gate is model.ilora.adapter.gate is before
    model.ilora_gate = SequenceGate(6, 4, per_layer=True)
    assert model.ilora_gate.num_layers == 2
