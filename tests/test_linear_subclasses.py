"""Linear layers with a forward of their own: adapted where that maps [..., d_in] to [..., d_out], else left out."""

import warnings

import pytest
import torch
from models import VOCABULARY, gates, randomised
from torch import nn
from torch.nn import functional as F

import ilora
from ilora import ILoRAConfig

hf = pytest.importorskip("transformers")


class Grouped(nn.Linear):
    """A block-diagonal product of two groups of inputs."""

    def forward(self, x):
        return torch.einsum("...gi,goi->...go", x.unflatten(-1, (2, -1)), self.weight.unflatten(0, (2, -1))).flatten(-2)


class Scored(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias), None


class Conditioned(nn.Linear):
    def forward(self, x, condition):
        return F.linear(x * condition, self.weight, self.bias)


class Reduced(nn.Module):
    """It names its sizes, and means the last of the rows."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.inner = nn.Linear(in_features, out_features)

    def forward(self, x):
        return self.inner(x[..., -1, :])


class Clamped(nn.Linear):
    """Plain enough: it maps [..., d_in] to [..., d_out], and the update is added to what it gives."""

    def forward(self, x):
        return super().forward(x.clamp(-1, 1))


class Flat(nn.Linear):
    """It takes rows alone."""

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight.T)


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.plain, self.other = nn.Linear(8, 8), kind(8, 8)

    def forward(self, x):
        return self.plain(x)


@pytest.mark.parametrize("kind", [Scored, Conditioned, Reduced, lambda a, b: Grouped(a // 2, b)])
def test_what_computes_something_else_is_left_out_by_name(tmp_path, kind):
    with pytest.warns(UserWarning, match=r"^other: left out \(1 such\), because \w+ computes something else") as caught:
        net = ilora.inject(Net(kind), ILoRAConfig(r=4, num_experts=4))
    assert caught[0].filename == __file__
    assert "other" not in ilora.targets(net)
    assert "plain" in ilora.targets(net)
    ilora.save_adapter(net, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ilora.targets(ilora.load_adapter(Net(kind), tmp_path)) == ilora.targets(net)
    with pytest.raises(ValueError, match="^other: target_modules matches it, but .* computes something else"):
        ilora.inject(Net(kind), ILoRAConfig(r=4, num_experts=4, target_modules=["plain", "other"]))


@pytest.mark.parametrize("kind", [Clamped, Flat])
def test_what_maps_rows_to_rows_is_adapted(kind):
    torch.manual_seed(0)
    net = randomised(ilora.inject(Net(kind).double(), ILoRAConfig(r=4, num_experts=4)))
    x, gate, layer = torch.randn(3, 8, dtype=torch.float64), gates(3), net.other
    update = x @ layer.lora_A.T * gate.double().repeat_interleave(1, -1) * layer.scaling @ layer.lora_B.T
    with ilora.gated(net, gate):
        torch.testing.assert_close(layer(x), layer.base_layer(x) + update)


def test_a_trial_leaves_the_module_as_it_was():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            assert not self.training
            self.calls += 1
            self.register_buffer("seen", x)
            return super().forward(x)

    net = Net(Counting).train()
    before = dict(vars(net.other))
    ilora.inject(net, ILoRAConfig(r=4, num_experts=4))
    base = net.other.base_layer
    assert (base.calls, base.training, list(base._buffers)) == (0, True, [])
    assert vars(base).keys() == before.keys()


def test_deepseek_v4():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8, "q_lora_rank": 8}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "qk_rope_head_dim": 4}
    model = hf.DeepseekV4ForCausalLM(
        hf.DeepseekV4Config(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
    ).eval()
    with pytest.warns(UserWarning, match=r"o_a_proj: left out \(1 such\), because DeepseekV4GroupedLinear"):
        randomised(ilora.inject(model, ILoRAConfig(r=8, num_experts=4)))
    ids, gate = torch.randint(3, 60, (2, 6)), gates(2)
    both = model(ids, ilora_gate=gate).logits
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], model(ids[i : i + 1], ilora_gate=gate[i : i + 1]).logits)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_a_proj: target_modules matches it"):
        ilora.inject(ilora.eject(model), ILoRAConfig(target_modules=["o_a_proj", "o_b_proj"]))


def test_idefics_decoupled():
    idefics = pytest.importorskip("transformers.models.idefics.modeling_idefics").IdeficsDecoupledLinear
    with pytest.warns(UserWarning, match="IdeficsDecoupledLinear .* it returns .*10.* for"):
        ilora.inject(Net(lambda a, b: idefics(a, b, out_additional_features=2)), ILoRAConfig(r=4, num_experts=4))
    net = ilora.inject(Net(idefics), ILoRAConfig(r=4, num_experts=4))  # without additional features
    assert ilora.targets(net) == ("plain", "other")


def test_an_error_of_the_update_names_its_layer():
    net = ilora.inject(Net(nn.Linear), ILoRAConfig(r=4, num_experts=4))
    net.plain.base_layer.register_forward_hook(lambda module, inputs, y: y[..., :5])
    with pytest.raises(ValueError, match=r"^plain: base: expected \[2, 3, 8\]"):
        net(torch.randn(2, 3, 8), ilora_gate=gates(2))
