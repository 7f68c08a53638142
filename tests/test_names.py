"""Names of a config that mean nothing in the model are refused one by one, before anything is changed."""

import pytest
import torch
from models import llama
from torch import nn

import ilora
from ilora import ILoRAConfig

LOST = {
    "target_modules: no module of LlamaForCausalLM matches 'v_porj'; its linear layers end in .*v_proj": {
        "target_modules": ["q_proj", "v_porj"]
    },
    "target_modules: .* matches 'v_porj', 'k_porj'; its": {"target_modules": ["v_porj", "q_proj", "k_porj"]},
    "exclude_modules: .* matches 'zzz'; its": {"exclude_modules": ["zzz", "down_proj"]},
    r"exclude_modules: .* matches '\.\*zzz'; its": {"exclude_modules": ".*zzz"},
    "rank_pattern: 'q_porj' matches none of the adapted layers, which end in .*q_proj": {"rank_pattern": {"q_porj": 8}},
    "rank_pattern: 'v_proj' matches none .* end in q_proj$": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"q_proj": 4, "v_proj": 8},
    },
    "alpha_pattern: 'q_porj' matches none": {"alpha_pattern": {"q_porj": 8}},
    "expert_pattern: 'q_porj' matches none": {"expert_pattern": {"q_porj": 2}},
    "layers_to_transform: there is no block 7, 8; its blocks are 0, 1$": {"layers_to_transform": [0, 7, 8]},
    r"layers_to_transform=\(7,\).*; its blocks are 0, 1$": {"layers_to_transform": [7]},
    r'a string is one regular expression .* give a list .*\["q_proj"\], or "all-linear"': {"target_modules": "q_proj"},
    "'all_linear' .* a string is one regular expression": {"target_modules": "all_linear"},
}


@pytest.mark.parametrize("words", LOST)
def test_a_name_that_matches_nothing_is_refused(words):
    model = llama()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=words):
        ilora.inject(model, ILoRAConfig(**LOST[words]))
    assert dict(model.named_modules()) == before
    assert not hasattr(model, "ilora")


def test_what_matches_anything_is_fine():
    # a container, the head, a module in another block: all of them are there
    names = {"exclude_modules": ["mlp", "lm_head", "norm"], "target_modules": ["q_proj", "lm_head"]}
    model = ilora.inject(llama(), ILoRAConfig(**names, layers_to_transform=[1]))
    assert ilora.targets(model) == ("model.layers.1.self_attn.q_proj",)
    assert len(ilora.targets(ilora.inject(llama(), ILoRAConfig(exclude_modules="")))) == 14


def test_many_blocks_are_listed_as_a_run():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    with pytest.raises(ValueError, match="no block 9; its blocks are 0 to 4"):
        ilora.inject(model, ILoRAConfig(layers_to_transform=[1, 9]))
    with pytest.raises(ValueError, match="it has no blocks"):
        ilora.inject(nn.ModuleDict({"one": nn.Linear(4, 4)}), ILoRAConfig(layers_to_transform=[1]))


class Opaque(nn.Module):
    in_features, out_features = 8, 6

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.ones(6, 8, dtype=torch.int8))


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj"]}, {"target_modules": ".*"}])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 6), Opaque], ids=["Linear", "Opaque"])
def test_a_bare_layer_is_refused(make, options):
    layer = make()
    kind, flags = type(layer), [p.requires_grad for p in layer.parameters()]
    with pytest.raises(ValueError, match=rf"this {kind.__name__} is a linear layer itself.*ilora\.ILoRALinear\(linear"):
        ilora.inject(layer, ILoRAConfig(r=4, num_experts=2, **options))
    assert type(layer) is kind
    assert [p.requires_grad for p in layer.parameters()] == flags
    assert not dict(layer.named_children())
    repr(layer)


def test_a_model_that_says_its_sizes_is_adapted_inside():
    class Block(nn.Module):
        in_features, out_features = 8, 6

        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 6)

        def forward(self, x):
            return self.down(self.up(x))

    block = ilora.inject(Block(), ILoRAConfig(r=4, num_experts=2))
    assert ilora.targets(block) == ("up", "down")
    assert block(torch.randn(3, 5, 8), ilora_gate=torch.rand(3, 2)).shape == (3, 5, 6)
    ilora.eject(block)
    assert type(block) is Block
