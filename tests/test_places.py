"""What is trained whole, what is kept for it, and frozen norms: in every place, in the model's mode, given back."""

import copy

import pytest
import torch
from saved_cases import adapted, assert_same_state, assert_untouched, bits, llama, logits, randomise, uniform
from torch import nn

import ilora
from ilora import ILoRAConfig

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Places(nn.Module):
    """A module in two places, in a block that is there twice as well, and modules within modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), self.a)] * 2)
        self.b, self.q = self.a, nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(self.q(x))
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b"), ("blocks.1.1",)])
def test_a_module_in_several_places_is_trained_in_all(tmp_path, names):
    model = Places()
    want, plain = model(X), copy.deepcopy(model).state_dict()
    adapted(model, target_modules=("q",), modules_to_save=names)
    assert model.a is model.b is model.blocks[0][1] is model.blocks[1][1]
    changed = model(X, ilora_gate=uniform())
    with ilora.disable_adapter(model):
        assert torch.equal(model(X), want)
    assert torch.equal(model(X, ilora_gate=uniform()), changed)
    path = ilora.save_adapter(model, tmp_path / "a")
    again = ilora.load_adapter(Places(), path)
    assert torch.equal(again(X, ilora_gate=uniform()), changed)
    assert torch.equal(ilora.eject(again)(X), want)
    assert_same_state(again.state_dict(), plain)
    assert again.a is again.b is again.blocks[0][1]


def test_modules_within_modules_are_trained_once():
    model = ilora.inject(Places(), ILoRAConfig(target_modules=["q"], modules_to_save=["0", "blocks"]))
    assert list(model.ilora.adapter.saved) == ["blocks"]
    layers = (model.blocks[0][0].weight, model.blocks[0][0].bias)
    assert all(parameter.requires_grad for parameter in layers)
    before = Places()
    with pytest.raises(ValueError, match=r"modules_to_save: blocks\.1 is adapted as well, as blocks\.1\.0"):
        ilora.inject(before, ILoRAConfig(target_modules=["blocks.1.0"], modules_to_save=["blocks.0"]))
    assert type(before) is Places


def test_a_quantised_module_cannot_be_trained_whole():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"modules_to_save: 1 has a quantised weight \(torch.uint8\).*exclude_modules"):
        ilora.inject(model, ILoRAConfig(target_modules=["0"], modules_to_save=["1"]))
    assert type(model) is nn.Sequential


def test_a_disabled_adapter_is_not_changed(tmp_path):
    model = adapted(llama(layers=1), modules_to_save=("lm_head",))
    path, frozen, want = (
        ilora.save_adapter(model, tmp_path),
        logits(llama(layers=1)),
        logits(model, ilora_gate=uniform()),
    )
    ilora.add_adapter(model, "other")
    ilora.set_adapter(model, "default")
    before = bits(model)
    calls = {
        "set_adapter": lambda: ilora.set_adapter(model, "other"),
        "add_adapter": lambda: ilora.add_adapter(model, "third"),
        "load_adapter": lambda: ilora.load_adapter(model, path, name="third"),
        "merge": lambda: ilora.merge(model, uniform()),
        "to_peft": lambda: ilora.to_peft(model, uniform()),
        "eject": lambda: ilora.eject(model),
    }
    with ilora.disable_adapter(model):
        for name, call in calls.items():
            with pytest.raises(ValueError, match=f"{name}: the adapter is disabled; leave the"):
                call()
        assert torch.equal(logits(model), frozen)
    assert_untouched(model, before)
    assert torch.equal(logits(model, ilora_gate=uniform()), want)
    assert torch.equal(logits(ilora.eject(model)), frozen)


def test_a_head_that_was_resized_is_not_ejected():
    model = adapted(llama(layers=1), modules_to_save=("lm_head",))
    model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match=r"eject: lm_head was resized .* from .*48.* to .*60.*: resize it back first"):
        ilora.eject(model)
    model.resize_token_embeddings(48)
    assert torch.equal(logits(ilora.eject(model)), logits(llama(layers=1)))


def normed():
    torch.manual_seed(0)
    head = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 4))
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False), head)


def test_running_statistics_of_the_base_are_frozen(tmp_path):
    model = normed()
    model[2].eval()  # by hand
    plain = copy.deepcopy(model.state_dict())
    ilora.inject(model, ILoRAConfig(target_modules=r"0", modules_to_save=["3"]))
    randomise(model)
    for _ in range(3):
        model.train()(X * 3 + 2, ilora_gate=uniform()).sum().backward()
    for key in ("1.running_mean", "1.num_batches_tracked", "2.running_var"):
        assert torch.equal(model.state_dict()[key], plain[key])
    assert model[3][0].num_batches_tracked == model[3][2].num_batches_tracked == 3  # trained whole
    with ilora.disable_adapter(model):
        model(X)
    want = model.eval()(X, ilora_gate=uniform())
    again = ilora.load_adapter(normed().eval(), ilora.save_adapter(model, tmp_path / "a"))
    assert torch.equal(again(X, ilora_gate=uniform()), want)
    ilora.eject(model.train())
    assert_same_state(model.state_dict(), plain)
    assert [module.training for module in model] == [True, True, False, True]
    assert model[3][0].training


def test_running_statistics_of_a_gate_network_are_its_own():
    class Normed(ilora.GateNetwork):
        def __init__(self):
            super().__init__(4)
            self.norm = nn.BatchNorm1d(4, affine=False)

        def forward(self, z):
            return self.norm(z).softmax(-1)

    model = ilora.inject(Places(), gate=Normed())
    model.train()(X, ilora_z=torch.randn(len(X), 4))
    assert model.ilora_gate.norm.num_batches_tracked == 1


def test_a_train_of_ones_own_keeps_its_arguments():
    class Freezing(nn.Sequential):
        def train(self, mode=True, freeze=True):
            self.asked = (mode, freeze)
            return super().train(mode)

    model = ilora.inject(Freezing(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    assert model.train(True, freeze=False) is model
    assert model.asked == (True, False)
    assert [module.training for module in model] == [True, False]


def test_what_is_kept_beside_follows_the_mode():
    model = ilora.inject(normed().train(), ILoRAConfig(target_modules=r"0", modules_to_save=["3"]))
    ilora.add_adapter(model, "other", ILoRAConfig(target_modules=r"0"))
    model.eval()
    assert not any(part.training for part in ilora.set_adapter(model, "default").modules())
    with ilora.disable_adapter(model):
        model.train()
    assert all(part.training for part in model[3].modules())
