"""The experts of sparse mixtures: which stay frozen is said, and the others are adapted."""

import copy
import re
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from models import GROUPED, HEADS, MAKE, TOKENS, E, gates, llama, mixtral, prompts, randomised

import ilora
from ilora import AdapterError, ILoRAConfig
from ilora.grouped.experts import ILoRAExperts, projections_of

ATTENTION = ILoRAConfig(target_modules=["q_proj"])


class OlderMixture(torch.nn.Module):
    """Experts as modules of their own."""

    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(10, 10, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(10, 15, bias=False) for _ in range(2))


def test_experts_that_stay_frozen_are_said_with_their_share():
    with pytest.warns(UserWarning, match=r"experts, 71% of the weights, stay frozen: experts; exclude") as caught:
        model = ilora.inject(OlderMixture(), ILoRAConfig(r=1, num_experts=1, target_modules=["q_proj"]))
    assert len(caught) == 1  # 300 of 100 + 300 and the adapter's 20
    assert caught[0].filename == __file__
    assert isinstance(model.q_proj, ilora.ILoRALinear)


def test_the_share_is_that_of_the_model(capsys):
    with pytest.warns(UserWarning, match=r"stay frozen: model\.layers\.0\.mlp\.experts and 1 more") as caught:
        model = ilora.inject(mixtral(), ATTENTION)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    assert f"{experts / total:.0%} of the weights" in str(caught[0].message)
    ilora.print_trainable_parameters(model)
    printed = capsys.readouterr().out
    assert f"|| experts without an update: {experts:,} ({experts / total:.0%} of all)" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("where", ["tensors", "experts"])
def test_experts_that_are_spread_over_processes_stay_frozen(where):
    model = mixtral()
    for block in model.model.layers:
        if where == "experts":
            block.mlp.experts._is_expert_parallel = True
        else:
            block.mlp.experts.down_proj.device_mesh = "two processes"  # as a DTensor has one
    with pytest.warns(UserWarning, match=r"stay frozen: model\.layers\.0\.mlp\.experts and 1 more"):
        ilora.inject(model, ILoRAConfig())
    assert not any(isinstance(module, ILoRAExperts) for module in model.modules())


def test_what_is_excluded_by_name_is_not_said_again(capsys):
    config = ILoRAConfig(target_modules=["q_proj"], exclude_modules=["experts"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ilora.inject(mixtral(), config)
        ilora.print_trainable_parameters(ilora.inject(llama(), ATTENTION))
    assert "experts" not in capsys.readouterr().out  # a dense model has none
    ilora.print_trainable_parameters(model)
    assert "experts without an update" in capsys.readouterr().out  # the line still tells


def test_an_added_adapter_says_it_too():
    model = ilora.inject(mixtral(), ILoRAConfig(target_modules=["q_proj"], exclude_modules=["experts"]))
    with pytest.warns(UserWarning, match="stay frozen"):
        ilora.add_adapter(model, "second", ATTENTION)


def test_shared_experts_are_layers_like_others():
    """DeepSeek's shared experts are a dense block: not counted, and adapted."""
    with pytest.warns(UserWarning, match="stay frozen") as caught:
        model = ilora.inject(MAKE["deepseek_v3"](), ILoRAConfig(target_modules=["q_a_proj"]))
    routed = sum(p.numel() for name, p in model.named_parameters() if re.search(r"\.experts\.", name))
    assert f"{routed / sum(p.numel() for p in model.parameters()):.0%} of" in str(caught[0].message)


def test_experts_trained_whole_are_not_frozen():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ilora.inject(mixtral(), ILoRAConfig(target_modules=["q_proj"], modules_to_save=["experts"]))


# ---- fused experts, adapted

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe")
MADE_HERE = {  # beside tests/models.py's
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**HEADS, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3},
    ),
    "olmoe": ("OlmoeForCausalLM", {**GROUPED, "num_experts": 6, "num_experts_per_tok": 2}),
}


def make(family):
    if family not in MADE_HERE:
        return MAKE[family]()
    kind, settings = MADE_HERE[family]
    return getattr(hf, kind)(getattr(hf, kind).config_class(**TOKENS, **settings))


def adapted(family, seed=0, gate=None, **options):
    """A tiny mixture in eval mode, attention and experts adapted with updates large enough to matter."""
    torch.manual_seed(seed)
    model = ilora.inject(make(family).eval(), ILoRAConfig(r=8, num_experts=E, **options), gate=gate)
    return with_updates(randomised(model, seed), seed)


def with_updates(model, seed=0):
    generator = torch.Generator().manual_seed(seed + 2)
    for experts in model.ilora.adapter.experts.values():
        for update in experts.updates:
            update.lora_B_experts.data.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_means_the_experts_and_a_fresh_adapter_changes_nothing(family):
    torch.manual_seed(0)
    model = make(family).eval()
    ids, mask = prompts((5, 7))
    before = model(input_ids=ids, attention_mask=mask).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ilora.inject(model, ILoRAConfig(r=8, num_experts=E))
    found = [path for path in ilora.targets(model) if path.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
    assert len(found) == (2 if family == "deepseek_v3" else 4)  # whose first block is dense
    assert not any(re.search(r"router|mlp\.gate$", path) for path in ilora.targets(model))
    after = model(input_ids=ids, attention_mask=mask, ilora_gate=gates(2)).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_under_different_gates_equals_one_instance_at_a_time(family):
    model, gate = adapted(family), gates(3)
    ids, mask = prompts((7, 7, 7))
    together = model(input_ids=ids, attention_mask=mask, ilora_gate=gate).logits
    alone = [
        model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], ilora_gate=gate[i : i + 1]).logits
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    with no_update_of(model.ilora.adapter.experts):
        assert (model(input_ids=ids, attention_mask=mask, ilora_gate=gate).logits - together).abs().max() > 1e-3
    with ilora.gated(model, gate[:1].expand(3, -1)):  # other gates, other answers
        assert (model(input_ids=ids, attention_mask=mask).logits[1:] - together[1:]).abs().max() > 1e-3


@contextmanager
def no_update_of(experts):
    kept = [(update.lora_B_experts, update.lora_B_experts.data) for each in experts.values() for update in each.updates]
    for parameter, data in kept:
        parameter.data = torch.zeros_like(data)
    yield
    for parameter, data in kept:
        parameter.data = data


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_beams_equals_one_prompt_at_a_time(family):
    model, gate = adapted(family), gates(2)
    ids, mask = prompts((5, 5))
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "min_new_tokens": 6}
    together = model.generate(input_ids=ids, attention_mask=mask, ilora_gate=gate, **settings)
    for i in range(2):
        alone = model.generate(
            input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], ilora_gate=gate[i : i + 1], **settings
        )
        assert torch.equal(together[i : i + 1], alone)


def plain_experts(wrapper, hidden, index, weights, gate):
    """One expert, token and choice at a time: what ILoRAExperts is to compute, in other words."""
    base, N = wrapper.base_layer, len(gate)
    rows = []
    for m in range(len(hidden)):
        own = gate[m // (len(hidden) // N)]
        total = torch.zeros_like(hidden[m])
        for x, weight in zip(index[m].tolist(), weights[m], strict=True):
            h = hidden[m]
            for name, update in zip((wrapper.up, wrapper.down), wrapper.updates, strict=True):
                W = getattr(base, name)[x].detach()
                W = W.T if base.is_transposed else W
                ranks = own.repeat_interleave(update.r // update.num_experts) * update.scaling
                z = W @ h + update.lora_B_experts[x] @ (ranks * (update.lora_A_experts[x] @ h))
                if base.has_bias:
                    z = z + getattr(base, f"{name}_bias")[x].detach()
                h = (base._apply_gate(z[None])[0] if base.has_gate else base.act_fn(z)) if name == wrapper.up else z
            total = total + weight * h
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_a_plain_loop_over_experts(family):
    model = adapted(family, adapter_dtype="float64").double()
    wrapper = list(model.ilora.adapter.experts.values())[-1]
    d, X = wrapper.updates[0].in_features, wrapper.updates[0].slots
    hidden = torch.randn(10, d, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(X)[:2] for _ in range(10)])
    weights = torch.rand(10, 2, dtype=torch.float64, requires_grad=True)
    gate = gates(2).double().requires_grad_()
    leaves = [hidden, weights, gate, *wrapper.factors]
    with ilora.gated(model, gate):
        found = wrapper(hidden, index, weights)
    want = plain_experts(wrapper, hidden, index, weights, gate)
    dy = torch.randn_like(want)
    results = [(y, *torch.autograd.grad(y, leaves, dy)) for y in (found, want)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_experts_without_a_gate_of_their_own_and_with_a_norm_after_them():
    """NemotronH's have one matrix before the activation, MuseSpark's a norm at the end."""
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    sizes = {"n_routed_experts": 4, "hidden_size": 16, "moe_intermediate_size": 12, "moe_latent_size": None}
    sizes |= {
        "num_local_experts": 4,
        "num_experts": 4,
        "intermediate_size": 12,
        "mlp_hidden_act": "relu2",
        "moe_hidden_size": 16,
        "post_norm_eps": 1e-6,
    }
    config = SimpleNamespace(**sizes, hidden_act="silu", rms_norm_eps=1e-6, _experts_implementation="eager")
    for kind in (NemotronHExperts, MuseSparkExperts):
        base = kind(config).requires_grad_(False)
        for parameter in base.parameters():
            parameter.normal_(std=0.3)
        both = projections_of(base)
        assert both == (("gate_up_proj" if base.has_gate else "up_proj"), "down_proj")
        settings = {name: {"r": 4, "num_experts": 2, "lora_alpha": 8} for name in both}
        wrapper = ILoRAExperts("experts", base, settings, gate_experts=2)
        hidden, index, weights = torch.randn(6, 16), torch.randint(4, (6, 2)), torch.rand(6, 2)
        with ilora.gated(wrapper, torch.rand(2, 2)):
            torch.testing.assert_close(wrapper(hidden, index, weights), base(hidden, index, weights))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_models_own_implementation_makes_no_difference(implementation):
    ids, _ = prompts((6, 6))
    model = adapted("qwen3_moe")
    want = model(input_ids=ids, ilora_gate=gates(2)).logits
    with ilora.disable_adapter(model):
        frozen = model(input_ids=ids).logits
    model.set_experts_implementation(implementation)
    assert torch.equal(model(input_ids=ids, ilora_gate=gates(2)).logits, want)
    with ilora.disable_adapter(model):
        torch.testing.assert_close(model(input_ids=ids).logits, frozen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    model = adapted("qwen3_moe", lora_dropout=0.2).train()
    ids, _ = prompts((6, 6))

    def gradients():
        model.zero_grad()
        gate = gates(2).requires_grad_()
        torch.manual_seed(3)
        model(input_ids=ids, labels=ids, ilora_gate=gate).loss.backward()
        return [gate.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients()
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert all(p.grad.any() for p in model.ilora.adapter.experts["model.layers.0.mlp.experts"].factors)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_saved_and_loaded_to_the_bit(family, tmp_path):
    model = adapted(family, gate=ilora.UniformGate(E), rank_pattern={"experts.down_proj": 4})
    ilora.save_adapter(model, tmp_path / "a")
    torch.manual_seed(0)
    other = ilora.load_adapter(make(family).eval(), tmp_path / "a")
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    ids, _ = prompts((6, 6))
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    ilora.eject(other)
    assert type(other.get_submodule("model.layers.0.mlp.experts")).__name__.endswith("Experts")
    assert not any("lora" in name for name, _ in other.named_parameters())


def test_what_was_saved_before_experts_were_adapted_loads_without_them(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr("ilora.adapter.switch.find_experts", lambda *_: {})
        older.setattr("ilora.adapter.targets.find_experts", lambda *_: {})
        with pytest.warns(UserWarning, match="stay frozen"):
            model = adapted("mixtral")
    assert not model.ilora.adapter.experts
    ilora.save_adapter(model, tmp_path / "a")
    torch.manual_seed(0)
    other = ilora.load_adapter(make("mixtral").eval(), tmp_path / "a")
    ids, _ = prompts((6, 6))
    want = model(input_ids=ids, ilora_gate=gates(2)).logits
    assert torch.equal(other(input_ids=ids, ilora_gate=gates(2)).logits, want)
    ilora.load_adapter(other, tmp_path / "a")  # over its own values
    ilora.save_adapter(other, tmp_path / "b")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_peft_reads_the_directory_as_the_uniform_gate(family, tmp_path):
    model = adapted(family)
    ilora.save_adapter(model, tmp_path / "a")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    live = peft.PeftModel.from_pretrained(make(family).eval(), str(tmp_path / "a")).eval()
    ids, _ = prompts((6, 6))
    want = model(input_ids=ids, ilora_gate=torch.full((2, E), 1 / E)).logits
    torch.testing.assert_close(live(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_merged_and_unmerged(family):
    model, gate = adapted(family, expert_pattern={"down_proj": 2}), gates(2)
    ids, _ = prompts((6, 6))
    want = model(input_ids=ids, ilora_gate=gate[:1].expand(2, -1)).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ilora.merge(model, gate[0])
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)
    ilora.unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(input_ids=ids, ilora_gate=gate[:1].expand(2, -1)).logits, want)
    ilora.merge(model, gate[0], keep_base=False)
    plain = ilora.eject(model)
    torch.testing.assert_close(plain(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_to_peft_computes_what_the_gated_model_computes(family, tmp_path):
    peft = pytest.importorskip("peft")
    model, gate = adapted(family, rank_pattern={"experts.down_proj": 4}), gates(2)[0]
    ids, _ = prompts((6, 6))
    want = model(input_ids=ids, ilora_gate=gate[None].expand(2, -1)).logits
    path = ilora.to_peft(model, gate, tmp_path / "a")
    live = peft.PeftModel.from_pretrained(ilora.eject(model), str(path)).eval()
    torch.testing.assert_close(live(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)


def peft_lora(family, parameters, **options):
    """A PEFT LoRA of attention and of these parameters, its updates not zero."""
    torch.manual_seed(0)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], target_parameters=parameters, **options)
    live = peft.get_peft_model(make(family).eval(), config)
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return live.eval()


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_from_peft_takes_target_parameters_over(family, saved, tmp_path):
    live = peft_lora(family, ["experts.gate_up_proj", "experts.down_proj"])
    ids, _ = prompts((6, 6))
    want = live(input_ids=ids).logits
    if saved:
        live.save_pretrained(tmp_path / "peft")
        torch.manual_seed(0)
        model = ilora.from_peft(tmp_path / "peft", E, model=make(family).eval())
    else:
        model = ilora.from_peft(live, E)
    assert sum(".experts." in path for path in ilora.targets(model)) == 4
    got = model(input_ids=ids, ilora_gate=torch.full((2, E), 1 / E)).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_from_peft_refuses_other_parameters():
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.experts it has .*down_proj alone; iLoRA adapts both"):
        ilora.from_peft(peft_lora("qwen3_moe", ["experts.down_proj"]), E)
    with pytest.raises(AdapterError, match=r"'mlp\.gate\.weight' is no tensor of fused experts"):
        ilora.from_peft(peft_lora("qwen3_moe", ["mlp.gate.weight"]), E)


def test_training_lowers_the_loss_of_experts_alone():
    model = adapted("mixtral", target_modules=["experts"]).train()
    ids, _ = prompts((8, 8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, ilora_gate=gates(2)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.4  # the frozen head lets it fall no further


def test_dropout_is_drawn_from_torchs_generator_in_training_alone():
    model = adapted("mixtral", lora_dropout=0.3, target_modules=["experts"]).train()
    ids, _ = prompts((8, 8))

    def logits(seed):
        torch.manual_seed(seed)
        return model(input_ids=ids, ilora_gate=gates(2)).logits

    dropped = logits(1)
    assert torch.equal(logits(1), dropped)
    assert (logits(2) - dropped).abs().max() > 1e-3
    model.eval()
    assert torch.equal(logits(1), logits(2))


@pytest.mark.parametrize("adapter_dtype", [None, "float32"])
def test_bfloat16(adapter_dtype):
    """Error below twice that of the plain loop in bfloat16, and gradients in the dtypes of what they belong to."""
    model = adapted("qwen3_moe", adapter_dtype=adapter_dtype)
    wrapper, gate = model.ilora.adapter.experts["model.layers.0.mlp.experts"], gates(2)
    wrapper.bfloat16()
    exact = copy.deepcopy(wrapper).double()
    if adapter_dtype is not None:
        for update in wrapper.updates:
            update.float()
    hidden, index, weights = torch.randn(8, 32).bfloat16(), torch.randint(6, (8, 3)), torch.rand(8, 3)
    with ilora.gated(model, gate):
        found = wrapper(hidden, index, weights)
    want = plain_experts(exact, hidden.double(), index, weights.double(), gate.double())
    for parameter in wrapper.parameters():
        parameter.data = parameter.data.bfloat16()
    torchs = plain_experts(wrapper, hidden, index, weights.bfloat16(), gate.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - want).abs().max() < 2 * (torchs - want).abs().max()


def test_segments_and_packed_rows():
    """Two sequences in one row under two gates equal the two by themselves, in the experts' own call."""
    model = adapted("mixtral")
    wrapper = model.ilora.adapter.experts["model.layers.0.mlp.experts"]
    hidden, index, weights = torch.randn(10, 32), torch.randint(4, (10, 1)), torch.rand(10, 1)
    gate, segments = gates(2), torch.tensor([0, 3, 10], dtype=torch.int32)
    with ilora.gated(model, gate, segments):
        together = wrapper(hidden, index, weights)
    parts = []
    for i, rows in enumerate((slice(0, 3), slice(3, 10))):
        with ilora.gated(model, gate[i : i + 1]):
            parts.append(wrapper(hidden[rows], index[rows], weights[rows]))
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_names_in_a_configuration():
    model = ilora.inject(make("olmoe"), ILoRAConfig(target_modules=["experts"]))
    assert {path.rsplit(".", 1)[-1] for path in ilora.targets(model)} == {"gate_up_proj", "down_proj"}
    patterns = {"rank_pattern": {"experts.gate_up_proj": 4}, "expert_pattern": {"down_proj": 2}}
    with pytest.warns(UserWarning, match=r"stay frozen: model\.layers\.0\.mlp\.experts; "):
        model = ilora.inject(make("olmoe"), ILoRAConfig(layers_to_transform=[1], **patterns))
    (wrapper,) = model.ilora.adapter.experts.values()
    assert [(update.r, update.num_experts) for update in wrapper.updates] == [(4, 4), (8, 2)]
    assert wrapper.name == "model.layers.1.mlp.experts"
    ids, _ = prompts((6, 6))
    model(input_ids=ids, ilora_gate=gates(2))
    model = ilora.inject(make("olmoe"), ILoRAConfig(exclude_modules=["experts"]))
    assert not model.ilora.adapter.experts


def test_several_adapters_and_a_gate_for_each_block():
    model = adapted("mixtral")
    ids, _ = prompts((6, 6))
    first = model(input_ids=ids, ilora_gate=gates(2)).logits
    ilora.add_adapter(model, "second", ILoRAConfig(r=4, num_experts=2, target_modules=["experts"]))
    with_updates(model, 5)
    second = model(input_ids=ids, ilora_gate=gates(2)[:, :2]).logits
    assert (first - second).abs().max() > 1e-3
    ilora.set_adapter(model, "default")
    assert torch.equal(model(input_ids=ids, ilora_gate=gates(2)).logits, first)
    gate = ilora.SequenceGate(z_dim=6, num_experts=E, per_layer=True)
    model = adapted("mixtral", gate=gate)
    assert model.ilora.adapter.blocks == ["model.layers.0", "model.layers.1"]
    assert [experts.gate_index for experts in model.ilora.adapter.experts.values()] == [0, 1]
    model(input_ids=ids, ilora_z=torch.randn(2, 6))


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    model = adapted("qwen3_moe")
    wrapper = model.ilora.adapter.experts["model.layers.0.mlp.experts"]
    hidden, index, weights = torch.randn(8, 32), torch.randint(6, (8, 3)), torch.rand(8, 3)
    with ilora.gated(model, gates(2)):
        want = wrapper(hidden, index, weights)
        compiled = torch.compile(wrapper, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(hidden, index, weights), want)


def test_refusals():
    model = adapted("mixtral")
    ids, _ = prompts((6, 6))
    with pytest.raises(RuntimeError, match=r"has no gate"):
        model.ilora.adapter.experts["model.layers.0.mlp.experts"](torch.randn(2, 32), ids[:, :2], torch.rand(2, 2))
    base = model.ilora.adapter.experts["model.layers.0.mlp.experts"].base_layer
    handle = base.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"hooks or another forward"):
        model(input_ids=ids, ilora_gate=gates(2))
    handle.remove()
    model(input_ids=ids, ilora_gate=gates(2))
    wrapper = model.ilora.adapter.experts["model.layers.0.mlp.experts"]
    with ilora.gated(model, gates(2)), pytest.raises(ValueError, match=r"rows do not divide the M=5 tokens"):
        wrapper(torch.randn(5, 32), torch.zeros(5, 1).long(), torch.ones(5, 1))
