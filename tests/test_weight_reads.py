"""A weight that is read instead of its layer being called: torch's fused encoder layer, and layers made of others."""

import copy
import pickle

import pytest
import torch
from models import gates, injected, prompts, randomised
from torch import nn
from torch.nn import functional as F

import ilora
from ilora import ILoRAConfig

REPLACED = r"read between two forwards, and now the layer is not called \({} such\)"
LEFT_OUT = ILoRAConfig(r=4, num_experts=4, exclude_modules=["out_proj"])


class Stacked(nn.Module):
    """An encoder of torch under a classifier, as people build them."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, **options)
        self.encoder, self.head = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor="norm_first" not in options),
            nn.Linear(16, 3),
        )

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding))


class Single(nn.TransformerEncoderLayer):
    """The model is an encoder layer itself."""

    def __init__(self):
        super().__init__(16, 2, 32, 0.0, activation="gelu", batch_first=True)


class Both(nn.Module):
    """An encoder and a decoder of torch, of whose layers one stands in two places."""

    def __init__(self):
        super().__init__()
        self.both = nn.Transformer(16, 2, 2, 1, 32, 0.0, batch_first=True)
        self.both.encoder.layers[1].linear1 = self.both.encoder.layers[0].linear1

    def forward(self, x):
        return self.both(x, x)


def encoder(make, config=LEFT_OUT):
    torch.manual_seed(0)
    return randomised(ilora.inject(make(), config)), torch.randn(3, 7, 16), gates(3)


@pytest.mark.parametrize("make", [Stacked, Single, Both, lambda: Stacked(norm_first=True)])
@pytest.mark.parametrize("compiled", [False, True])
def test_evaluation_of_torchs_encoder_equals_training(make, compiled):
    net, x, gate = encoder(make)
    with torch.no_grad():
        want = net(x, ilora_gate=gate)  # dropout is 0, so that both modes compute the same
    with ilora.disable_adapter(net.eval()), torch.no_grad():
        frozen = net(x)
    call = torch.compile(net, backend="eager") if compiled else net
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            got = call(x, ilora_gate=gate)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(got, frozen, atol=1e-2)
    switched = ilora.set_adapter(ilora.add_adapter(encoder(make)[0].eval(), "other", LEFT_OUT), "default")
    switched.load_state_dict(net.state_dict())
    with torch.no_grad():
        for one in (switched, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            torch.testing.assert_close(one(x, ilora_gate=gate), want, atol=1e-6, rtol=1e-5)


def test_padding_reaches_torchs_encoder_as_rows():
    net, x, gate = encoder(Stacked)
    padding = torch.arange(7) >= torch.tensor([[7], [5], [3]])
    with torch.no_grad():
        want = net(x, padding, ilora_gate=gate)
        got = net.eval()(x, padding, ilora_gate=gate)
        torch.testing.assert_close(got[~padding], want[~padding], atol=1e-6, rtol=1e-5)
        for i, length in enumerate((7, 5, 3)):
            alone = net(x[i : i + 1, :length], ilora_gate=gate[i : i + 1])
            torch.testing.assert_close(got[i, :length], alone[0], atol=1e-5, rtol=1e-5)


def test_eject_gives_torchs_encoder_its_fast_path_back():
    net = Stacked().eval()
    assert net.encoder.use_nested_tensor
    ilora.inject(net, LEFT_OUT)
    assert not net.encoder.use_nested_tensor
    ilora.eject(net)
    assert net.encoder.use_nested_tensor
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_bare_layers_in_torchs_encoder_are_refused():
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).eval()
    layer.linear1 = ilora.ILoRALinear(layer.linear1, 4, 4)
    words = "reads this layer's weight and does not call it"
    with torch.no_grad(), pytest.raises(RuntimeError, match=words), ilora.gated(layer, gates(3)):
        layer(torch.randn(3, 7, 16))


class Attention(nn.Module):
    """Three projections, and a fourth made of them on demand: fuse as diffusers does, or replace the three."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.fused = None

    def fuse(self):
        self.fused = nn.Linear(8, 24)
        with torch.no_grad():
            self.fused.weight.copy_(torch.cat([self.q.weight, self.k.weight, self.v.weight]))
            self.fused.bias.copy_(torch.cat([self.q.bias, self.k.bias, self.v.bias]))

    def forward(self, x):
        q, k, v = (self.q(x), self.k(x), self.v(x)) if self.fused is None else self.fused(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.side = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x, side=False):
        for block in self.blocks:
            x = block(x)
        return self.side(x) if side else x


class FusedBlock(nn.Module):
    """What a user puts into the place of an Attention."""

    def __init__(self, attention):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.qkv.weight.data = torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]).detach()

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


def by_method(net):
    net.blocks[0].fuse()


def by_deleting(net):
    net.blocks[0].fuse()
    del net.blocks[0].q, net.blocks[0].k, net.blocks[0].v


def by_replacing(net):
    net.blocks[0] = FusedBlock(net.blocks[0])


def in_one_line(net):
    weight = net.blocks[0].v.weight.data
    net.blocks[0].v = nn.Linear(8, 8, bias=False)
    net.blocks[0].v.weight.data = weight


FUSE = {by_method: 3, by_deleting: 3, by_replacing: 3, in_one_line: 1}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return randomised(ilora.inject(Net().eval(), ILoRAConfig(r=4, num_experts=4)))


@pytest.mark.parametrize("when", ["plain", "disabled", "gated", "first", "copied"])
@pytest.mark.parametrize("fuse", FUSE)
def test_a_layer_made_of_others_is_noticed(net, fuse, when):
    x, gate = torch.randn(2, 5, 8), gates(2)
    if when != "first":
        net(x, ilora_gate=gate)
    if when == "disabled":
        with ilora.disable_adapter(net):
            fuse(net)
            net(x)
    elif when == "gated":
        with pytest.raises(RuntimeError, match="reads this layer's weight"), ilora.gated(net, gate):
            fuse(net)
    else:
        fuse(net)
    net = copy.deepcopy(net) if when == "copied" else net
    for _ in range(2):
        with pytest.raises(RuntimeError, match=REPLACED.format(FUSE[fuse])):
            net(x, ilora_gate=gate)


def test_a_layer_that_is_unfused_works_again(net):
    x, gate = torch.randn(2, 5, 8), gates(2)
    want = net(x, ilora_gate=gate)
    by_method(net)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.k: .*"):
        net(x, ilora_gate=gate)
    net.blocks[0].fused = None
    assert torch.equal(net(x, ilora_gate=gate), want)
    assert not net.ilora.state.reads.copied
    assert not any(module._forward_pre_hooks for module in net.blocks.modules())


def test_looking_at_weights_is_no_mistake(net):
    """Statistics of weights, a layer that only some calls reach, a forward that fails."""
    x, gate = torch.randn(2, 5, 8), gates(2)
    want = [net(x, ilora_gate=gate), net(x, side=True, ilora_gate=gate)]
    for i in range(3):
        assert all(torch.isfinite(layer.weight).all() for layer in ilora.ilora_layers(net).values())
        assert torch.equal(net(x, side=bool(i % 2), ilora_gate=gate), want[i % 2])
    with pytest.raises(ValueError, match="gate"):
        net(x[:, :, :7], ilora_gate=gate[:, :3])
    assert torch.equal(net(x, ilora_gate=gate), want[0])
    with ilora.gated(net, gate):
        assert net.side[0].weight.dtype == torch.float32
        assert torch.equal(net(x), want[0])
    assert torch.equal(net(x, ilora_gate=gate), want[0])


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_generation_after_a_look_at_weights(family):
    from models import MODELS

    model = injected(MODELS[family])
    ids, mask = prompts([5, 3])
    batch = {"input_ids": ids, "attention_mask": mask, "ilora_gate": gates(2), "max_new_tokens": 4}
    want = model.generate(**batch)
    assert all(layer.weight is not None for layer in ilora.ilora_layers(model).values())
    assert torch.equal(model.generate(**batch), want)


def unet(diffusers):
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    kinds |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    sizes = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
    return diffusers.UNet2DConditionModel(**sizes, **kinds, cross_attention_dim=16, attention_head_dim=4).eval()


def test_unet_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    targets = r".*attn\d\.to_(q|k|v)"
    model = randomised(ilora.inject(unet(diffusers), ILoRAConfig(r=4, num_experts=4, target_modules=targets)))
    inputs = torch.randn(2, 4, 8, 8), 3, torch.randn(2, 5, 16)
    with torch.no_grad():
        want = model(*inputs, ilora_gate=gates(2)).sample
        model.fuse_qkv_projections()
        with pytest.raises(RuntimeError, match="unfuse_qkv_projections"):
            model(*inputs, ilora_gate=gates(2))
        model.unfuse_qkv_projections()
        assert torch.equal(model(*inputs, ilora_gate=gates(2)).sample, want)
