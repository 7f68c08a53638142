"""Several adapters in one batch: each row is what its adapter alone makes of it, in forward, training and generate."""

import copy
from functools import partial

import pytest
import torch
import transformers as hf
from models import MAKE, E, injected, prompts, randomised
from test_generated_rows import WINDOW, transcribe, whisper
from torch import nn

import ilora
from ilora import ILoRAConfig

NAMES = ["prompt", "plain", None, "network", "prompt", "given"]  # the adapter of each row
Z, GATE = torch.randn(6, 5), torch.rand(6, 2)
FAMILIES = {  # model: names of layers of which the adapters have different ones
    "llama": ("q_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_fc", "c_proj"),
    "t5": ("q", "v", "wo"),
}
EXPECTED = {"rtol": 1e-4, "atol": 1e-5}


def several(family="llama", dropout=0.0):
    """A model with four adapters that differ in all that an adapter can have of its own; the last one is active."""
    a, b, c = FAMILIES[family]
    model = injected(MAKE[family], ilora.UniformGate(E), lora_dropout=dropout)
    ilora.add_adapter(
        model,
        "prompt",
        ILoRAConfig(r=6, num_experts=2, target_modules=[a, b], lora_dropout=dropout),
        ilora.PromptGate(2),
    )
    randomised(model, 1)
    network = ilora.SequenceGate(5, 3, per_layer=True)
    ilora.add_adapter(model, "network", ILoRAConfig(r=6, num_experts=3, lora_alpha=7), network)
    randomised(model, 2)
    nn.init.normal_(network.weight)
    config = ILoRAConfig(r=4, num_experts=2, expert_pattern={a: 1}, target_modules=[a, c])
    randomised(ilora.add_adapter(model, "given", config), 3)
    ilora.delete_adapter(ilora.add_adapter(ilora.set_adapter(model, "default"), "plain", ILoRAConfig(r=8)), "default")
    model.ilora_gate = ilora.UniformGate(E)
    return randomised(model, 4)


def batch(family="llama"):
    ids, mask = prompts((7, 4, 9, 5, 6, 8))
    decoder = {"decoder_input_ids": prompts((4,) * 6, seed=1)[0]} if family == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **decoder}


def mixed(model, call, inputs, names=tuple(NAMES), gate=GATE):
    given = {"given": gate[[i for i, name in enumerate(names) if name == "given"]]}
    return call(**inputs, ilora_adapters=list(names), ilora_z=Z, ilora_gate=given)


def alone(model, call, name, inputs):
    """(the rows of this adapter, what it makes of them alone)."""
    rows = [i for i, other in enumerate(NAMES) if other == name]
    own = {key: value[rows] for key, value in inputs.items()}
    if name is None:
        with ilora.disable_adapter(model):
            return rows, call(**own)
    ilora.set_adapter(model, name)
    return rows, call(**own, **{"network": {"ilora_z": Z[rows]}, "given": {"ilora_gate": GATE[rows]}}.get(name, {}))


@pytest.mark.parametrize("active", ["plain", "given"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_what_its_adapter_makes_of_it_alone(family, active):
    model, inputs = several(family), batch(family)
    ilora.set_adapter(model, active)
    together = mixed(model, model, inputs).logits
    indices = torch.tensor([ilora.adapters(model).index(name) if name else -1 for name in NAMES])
    again = model(**inputs, ilora_adapters=indices, ilora_z=Z, ilora_gate={"given": GATE[5:]}).logits
    assert torch.equal(together, again)
    for name in dict.fromkeys(NAMES):
        rows, want = alone(model, model, name, inputs)
        torch.testing.assert_close(together[rows], want.logits, **EXPECTED)
        assert (want.logits - together.roll(1, 0)[rows]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_beams_and_return_sequences(family):
    model, inputs = several(family), batch()
    search = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    call = partial(model.generate, **search, eos_token_id=None)
    together = mixed(model, call, inputs).view(6, 2, -1)
    for name in dict.fromkeys(NAMES):
        rows, want = alone(model, call, name, inputs)
        assert torch.equal(together[rows].flatten(0, 1), want), name


def gradients(model, losses):
    parameters = {name: ilora.adapter_parameters(model, name) for name in losses}
    every = [parameter for own in parameters.values() for parameter in own]
    found = iter(torch.autograd.grad(sum(losses.values()), every, allow_unused=True))
    return {name: [next(found) for _ in own] for name, own in parameters.items()}


def test_gradients_equal_those_of_each_alone():
    model, inputs = several().train(), batch()
    labels = torch.where((inputs["attention_mask"] == 1) & (torch.arange(9) > 5), inputs["input_ids"], -100)
    inputs["labels"] = labels
    losses = ilora.adapter_losses(mixed(model, model, inputs).logits, labels, NAMES)
    together = gradients(model, losses)
    for name in losses:
        _, want = alone(model, model, name, inputs)
        torch.testing.assert_close(losses[name], want.loss)
        own = gradients(model, {name: want.loss})[name]
        assert sum(grad is not None for grad in own) >= 8
        for ours, wanted in zip(together[name], own, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Two forwards with other adapters before two backwards, under dropout."""

    def run(checkpointing):
        model, inputs = several(dropout=0.2).train(), batch()
        inputs["labels"] = inputs["input_ids"]
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        gate = GATE.clone().requires_grad_()
        losses = [mixed(model, model, inputs, names, gate).loss for names in (NAMES, NAMES[::-1])]
        for loss in losses:
            loss.backward()
        every = [parameter for name in ilora.adapters(model) for parameter in ilora.adapter_parameters(model, name)]
        assert all(parameter.grad is not None for parameter in every)
        return [gate.grad, *(parameter.grad for parameter in every)]

    for plain, recomputed in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


def linear(X, **settings):
    """One layer with X adapters a0, a1, ... of rank 16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20))
    ilora.inject(model, ILoRAConfig(r=16, num_experts=2, **settings), name="a0")
    for i in range(1, X):
        ilora.add_adapter(model, f"a{i}", ILoRAConfig(r=16, num_experts=2, lora_alpha=8 + i, **settings))
    for name in ilora.adapters(model):
        nn.init.normal_(ilora.adapter_parameters(model, name)[1])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_64_adapters_equal_64_runs(dtype):
    model, x, gate = linear(64).to(dtype), torch.randn(64, 5, 24).to(dtype), torch.rand(64, 2)
    names = [f"a{i}" for i in torch.randperm(64).tolist()]
    leaf = x.clone().requires_grad_()
    y = model(leaf, ilora_adapters=names, ilora_gate=gate)
    dy = torch.randn_like(y)
    y.backward(dy)
    for i, name in enumerate(names):
        together = [parameter.grad for parameter in ilora.adapter_parameters(model, name)]
        ilora.set_adapter(model, name)
        own = x[i : i + 1].clone().requires_grad_()
        want = model(own, ilora_gate=gate[i : i + 1])
        found = torch.autograd.grad(want, [own, *ilora.adapter_parameters(model, name)], dy[i : i + 1])
        for ours, wanted in zip((y[i : i + 1], leaf.grad[i : i + 1], *together), (want, *found), strict=True):
            error = (ours.float() - wanted.float()).abs().max()
            assert error <= (1e-5 if dtype is torch.float32 else 2e-2) * wanted.abs().max(), name


def test_no_row_moves_another():
    model, inputs = several().eval(), batch()
    before = mixed(model, model, inputs).logits
    inputs["input_ids"][0, 3] += 1
    assert torch.equal(mixed(model, model, inputs).logits[1:], before[1:])
    for name in ("prompt", "network"):
        with torch.no_grad():
            for parameter in ilora.adapter_parameters(model, name):
                parameter.mul_(1.5)
        moved = (mixed(model, model, inputs).logits != before).flatten(1).any(1)
        expected = [other in ("prompt", name) for other in NAMES]
        assert moved.tolist() == expected


def test_each_adapter_has_its_dropout():
    model = nn.Sequential(nn.Linear(64, 8))
    for name, p in (("none", 0.0), ("half", 0.5), ("none too", 0.0)):
        config = ILoRAConfig(r=4, num_experts=1, lora_dropout=p)
        (ilora.add_adapter if hasattr(model, "ilora") else ilora.inject)(model, name=name, config=config)
        nn.init.normal_(ilora.adapter_parameters(model)[1])
    x, names = torch.randn(400, 1, 64), ["half", "none", None, "none too"] * 100
    run = partial(model, x, ilora_adapters=names, ilora_gate=torch.ones(400, 1))
    whole = model.eval()(x, ilora_adapters=names, ilora_gate=torch.ones(400, 1))
    first, second = model.train() and run(), run()
    for k in range(4):
        assert torch.equal(first[k::4], second[k::4]) == (k > 0)
        torch.testing.assert_close(first[k::4].mean(), whole[k::4].mean(), rtol=0.3 if k == 0 else 1e-5, atol=1e-1)


def small():
    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=31, pad_token_id=0, **config))


CONFIGS = [ILoRAConfig(r=4 + 4 * (i % 2), num_experts=1, lora_alpha=4 + i, target_modules=["q_proj"]) for i in range(8)]


def with_adapters(numbers):
    """A tiny model with these adapters, and an AdamW for each."""
    model = small()
    for place, i in enumerate(numbers):
        torch.manual_seed(i)
        new = ilora.add_adapter if place else ilora.inject
        new(model, name=f"a{i}", config=CONFIGS[i], gate=ilora.UniformGate(1))
    rates = {i: 1e-2 / (1 + i) for i in numbers}
    return model.train(), [torch.optim.AdamW(ilora.adapter_parameters(model, f"a{i}"), rates[i]) for i in numbers]


def steps(loss, optimizers):
    for _ in range(50):
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_eight_trained_together_equal_eight_trained_alone(tmp_path):
    peft = pytest.importorskip("peft")
    ids, names = torch.randint(1, 31, (16, 6)), [f"a{i}" for i in range(8) for _ in range(2)]
    model, optimizers = with_adapters(range(8))
    run = partial(model, ids, ilora_adapters=names)
    steps(lambda: sum(ilora.adapter_losses(run().logits, ids, names).values()), optimizers)
    for i in range(8):
        rows = ids[2 * i : 2 * i + 2]
        single, optimizers = with_adapters([i])
        steps(lambda single=single, rows=rows: single(rows, labels=rows).loss, optimizers)
        both = [ilora.adapter_parameters(each, f"a{i}") for each in (model, single)]
        assert both[0][1].abs().max() > 0.05
        for ours, wanted in zip(*both, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
        saved = ilora.save_adapter(model, tmp_path / f"a{i}", name=f"a{i}")
        by_peft = peft.PeftModel.from_pretrained(small(), saved).eval()
        torch.testing.assert_close(by_peft(rows).logits, run().logits[2 * i : 2 * i + 2], rtol=0, atol=1e-6)


def call(model, inputs=None, **more):
    return model(**(inputs or batch()), **{"ilora_z": Z, "ilora_gate": {"given": GATE[5:]}, **more})


BAD = {  # words of the error: (its type, arguments)
    "there is no adapter 'other'; the model has 'plain', .*, None .* is the frozen": (ValueError, {5: "other"}),
    "there is no adapter 4": (ValueError, torch.tensor([0, 1, 2, 3, 4, -1])),
    "5 adapters for a batch of 6; give one for each": (ValueError, NAMES[1:]),
    "expected a name or None for each instance, or integers .*, got 'plain'": (TypeError, "plain"),
    "expected a name or None for each instance, .*, got \\[\\]": (TypeError, []),
    r"expected integers \[N\], got torch.float32 \[6\]": (TypeError, torch.zeros(6)),
    "adapter 'network': .* needs ilora_z": (ValueError, {"ilora_z": None}),
    "adapter 'network': z: expected .*z_dim=5": (ValueError, {"ilora_z": torch.randn(6, 4)}),
    "ilora_z: expected a row for each of 6 instances, got .5, 5.": (ValueError, {"ilora_z": Z[1:]}),
    "ilora_z: expected a tensor, or a dict": (TypeError, {"ilora_z": 3}),
    "adapter 'given': .* needs ilora_gate": (ValueError, {"ilora_gate": None}),
    r"adapter 'given': gate: expected \[N, 2\], .* got \[1, 3\]": (
        ValueError,
        {"ilora_gate": {"given": torch.rand(1, 3)}},
    ),
    "adapter 'given': gate: it has 2 rows for 1 instances": (ValueError, {"ilora_gate": {"given": GATE[:2]}}),
    "no instance has the adapter 'other'": (ValueError, {"ilora_gate": {"other": GATE}}),
    "adapter 'network': ilora_gate decides": (ValueError, {"ilora_gate": {"network": torch.rand(1, 3)}}),
    "a row holds several sequences": (ValueError, {"ilora_segments": torch.arange(7)}),
    "no adapter of .* has a gate network that reads it": (
        ValueError,
        {"ilora_adapters": ["plain"] * 6, "ilora_gate": None},
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused_and_changes_nothing(words):
    model, (kind, given) = several(), BAD[words]
    if isinstance(given, dict) and 5 in given:
        given = [*NAMES[:5], given[5]]
    given = given if isinstance(given, dict) else {"ilora_adapters": given}
    before, hooks = dict(model.named_modules()), [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(kind, match=words):
        call(model, **{"ilora_adapters": NAMES, **given})
    assert dict(model.named_modules()) == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert model.ilora.state.current == ilora.current_gate.CurrentGate()


def with_head(model):
    ilora.add_adapter(model, "other", ILoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def with_balance(model):
    gate = ilora.PromptGate(4, balance=0.1)
    ilora.add_adapter(model.train(), "other", ILoRAConfig(target_modules=["q_proj"]), gate)


def disabled(model):
    context = ilora.disable_adapter(model)
    context.__enter__()
    return context


REFUSED = {
    "'other' trains lm_head whole": with_head,
    "gate network of 'other' has a balance term; set it to 0": with_balance,
    "a gate is merged into the weights": lambda model: ilora.merge(model, torch.ones(E) / E),
    "the adapter is disabled": disabled,
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_several_adapters_cannot_do_is_refused(words):
    model = several()
    kept = REFUSED[words](model)
    names = [*NAMES[:5], "other"] if "'other'" in words else NAMES
    with pytest.raises((ValueError, RuntimeError), match=words):
        call(model, ilora_adapters=names, ilora_gate=None if "'other'" in words else {"given": GATE[5:]})
    del kept


def test_what_one_process_or_one_layer_cannot_do_is_refused(monkeypatch):
    model = several().train()
    given = next(iter(model.ilora.others["given"].layers.values()))
    monkeypatch.setattr(given, "split", "by rows")
    with pytest.raises(ValueError, match=f"'given': {given.name} is split over processes"):
        call(model, ilora_adapters=NAMES)
    monkeypatch.undo()
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(RuntimeError, match="several processes would not average the gradients"):
        call(model, ilora_adapters=NAMES)
    call(model.eval(), ilora_adapters=NAMES)


def test_images_under_several_adapters_are_refused():
    model = injected(MAKE["llava"], ilora.UniformGate(E))
    ilora.add_adapter(model, "text", ILoRAConfig(exclude_modules=r"(?!model\.language_model).*"), ilora.UniformGate(E))
    ids = torch.tensor([[3, 60, 60, 60, 60, 4, 5]] * 2)
    pixels = torch.randn(2, 3, 16, 16)
    text = model(ids, pixel_values=pixels, ilora_adapters=["text", None]).logits
    ilora.set_adapter(model, "default")
    torch.testing.assert_close(model(ids, pixel_values=pixels, ilora_adapters=["text", None]).logits, text)
    with pytest.raises(ValueError, match="adapted layers see images, sounds or videos"):
        model(ids, pixel_values=pixels, ilora_adapters=["text", "default"])


def test_fused_experts_are_refused_and_stay_frozen_for_others():
    model = injected(MAKE["mixtral"], ilora.UniformGate(E))
    ilora.add_adapter(model, "attention", ILoRAConfig(target_modules=["q_proj"], exclude_modules=["experts"]))
    randomised(model)
    ids = prompts((5, 5))[0]
    want = model(ids[:1], ilora_gate=torch.ones(1, E)).logits
    ilora.set_adapter(model, "default")
    with pytest.raises(
        ValueError, match="'default' adapts the fused experts .*experts, which have one adapter at a time"
    ):
        model(ids, ilora_adapters=["attention", "default"])
    for update in model.ilora.adapter.expert_updates:
        nn.init.normal_(update.lora_B_experts)
    found = model(ids, ilora_adapters=["attention", None], ilora_gate={"attention": torch.ones(1, E)}).logits
    torch.testing.assert_close(found[:1], want, **EXPECTED)


def test_afterwards_the_model_is_as_before():
    model, inputs = several(), batch()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    want, together = model(**inputs).logits, mixed(model, model, inputs).logits
    assert torch.equal(model(**inputs).logits, want)
    stop = model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mixed(model, model, inputs)
    stop.remove()
    assert torch.equal(model(**inputs).logits, want)
    twin = copy.deepcopy(model)
    assert torch.equal(mixed(twin, twin, inputs).logits, together)
    ilora.set_adapter(model, "given")  # which adapts fewer layers
    torch.testing.assert_close(mixed(model, model, inputs).logits, together, **EXPECTED)
    model.double()  # reaches the others when they are next used
    assert mixed(model, model, inputs).logits.dtype is torch.float64
    ilora.set_adapter(model.float(), "plain")
    assert torch.equal(model(**inputs).logits, want)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    torch.testing.assert_close(mixed(model, model, inputs).logits, together)
    for name in ("prompt", "network", "given"):
        ilora.delete_adapter(model, name)
    assert not any(module._forward_hooks for module in ilora.eject(model).modules())


@pytest.mark.filterwarnings("ignore")
def test_recordings_that_end_early_keep_their_adapters():
    model = whisper(ilora.UniformGate(E))
    ilora.add_adapter(model, "other", ILoRAConfig(target_modules=["q_proj", "fc1"]), ilora.UniformGate(E))
    randomised(model, 7)
    sounds = torch.randn(3, 8, 2 * WINDOW, generator=torch.Generator().manual_seed(1))
    names, windows = ["other", "default", None], (1, 2, 2)
    used = []
    handle = model.model.encoder.register_forward_pre_hook(lambda *_: used.append(model.ilora.state.current.mixture))
    found = transcribe(model, sounds, windows, None, ilora_adapters=names)
    handle.remove()
    assert [mixture.slots for mixture in used][-2:] == [(0, 1, -1), (1, -1)]
    for i, name in enumerate(names):
        alone = transcribe(model, sounds[i : i + 1], windows[i : i + 1], None, ilora_adapters=[name])
        assert found[i] == alone[0]


@pytest.mark.parametrize(
    ("shape", "labels", "names"), [((2, 3, 5), (2, 4), 2), ((2, 3, 5), (2, 3), 3), ((2, 5), (2,), 2)]
)
def test_losses_of_other_shapes_are_refused(shape, labels, names):
    with pytest.raises(ValueError, match=r"expected logits \[N, L, V\], labels \[N, L\] and N adapters"):
        ilora.adapter_losses(torch.randn(shape), torch.ones(labels, dtype=torch.int64), ["a"] * names)


def test_losses_of_one_label_an_instance_and_without_labels():
    logits, labels = torch.randn(4, 5), torch.tensor([1, 4, 2, -100])
    losses = ilora.adapter_losses(logits, labels, torch.tensor([1, 0, 1, 2]), shift=False)
    assert list(losses) == [1, 0, 2]
    assert losses[2] == 0
    torch.testing.assert_close(losses[1], nn.functional.cross_entropy(logits[[0, 2]], labels[[0, 2]]))
