"""A gate network in nn.Sequential and its kin is none of the modules that they run and list."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

import ilora
from ilora import ILoRAConfig, SequenceGate

X, Z = torch.randn(3, 8), torch.randn(3, 6)


def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def test_a_sequential_runs_its_own_modules():
    model = block()
    want = model(X)
    ilora.inject(model, ILoRAConfig(), gate=SequenceGate(6, 4))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(each(X, ilora_z=Z), want)
    assert len(model) == len(list(model)) == 3
    assert model[-1] is model[2] is next(reversed(model[1:]))
    assert "ilora_gate.weight" in model.state_dict()
    assert model.ilora_gate in model.children()
    ilora.add_adapter(model, "plain", ILoRAConfig(r=4))
    torch.testing.assert_close(model(X, ilora_gate=torch.rand(3, 4)), want)
    assert list(model._modules) == ["0", "1", "2"]
    torch.testing.assert_close(ilora.set_adapter(model, "default")(X, ilora_z=Z), want)
    assert list(ilora.eject(model)._modules) == ["0", "1", "2"]
    assert torch.equal(model(X), want)


def test_a_compiled_sequential_runs_its_own_modules():
    model = ilora.inject(block(), ILoRAConfig(), gate=SequenceGate(6, 4))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X, ilora_z=Z), block()(X))


def test_lists_and_dicts():
    class Listed(nn.ModuleList):
        def forward(self, x):
            for module in self:
                x = module(x)
            return x

    class Named(nn.ModuleDict):
        def forward(self, x):
            for name, module in self.items():
                assert module is self[name]
                x = module(x)
            return x

    for model in (Listed([nn.Linear(8, 8)]), Named({"a": nn.Linear(8, 8)})):
        ilora.inject(model, ILoRAConfig(), gate=SequenceGate(6, 4))
        model(X, ilora_z=Z)
        assert len(model) == 1
    assert list(model) == list(model.keys()) == ["a"]
    assert list(model.values()) == [model["a"]]


def test_methods_that_a_container_has_of_itself_stay():
    class Backwards(nn.Sequential):
        def __iter__(self):
            return reversed(list(self._modules.values()))

        def __getitem__(self, name):
            return self._modules[name] if isinstance(name, str) else super().__getitem__(name)

    torch.manual_seed(0)
    model = Backwards(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    want = model(X)
    ilora.inject(model, ILoRAConfig())
    torch.testing.assert_close(model(X, ilora_gate=torch.rand(3, 4)), want)
    assert model["1"] is model[1]


def test_parts_and_places_of_a_sequential():
    model = ilora.inject(block(), ILoRAConfig(), gate=SequenceGate(6, 4))
    assert list(model[1:]._modules) == ["1", "2"]
    model.append(nn.ReLU())
    model[-1] = nn.Sigmoid()
    assert isinstance(model.ilora_gate, SequenceGate)
    assert model(X, ilora_z=Z).min() > 0


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
    model = ilora.inject(block(), ILoRAConfig(), gate=SequenceGate(6, 4))
    before = model.ilora_gate
    with pytest.raises(ValueError, match="num_experts: expected this gate network's 3, got 4"):
        model.ilora_gate = SequenceGate(6, 3)
    assert model.ilora_gate is model.ilora.adapter.gate is before
    model.ilora_gate = SequenceGate(6, 4, per_layer=True)
    assert model.ilora_gate.num_layers == 2
