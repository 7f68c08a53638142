"""Several adapters in one batch: each row is what its adapter alone would make of it, in forward, training and generate."""

import copy
from functools import partial

import pytest
import torch
import transformers as hf
from models import MAKE, E, injected, prompts, randomised
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
        model, "prompt", ILoRAConfig(r=6, num_experts=2, target_modules=[a, b], lora_dropout=dropout), ilora.PromptGate(2)
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
