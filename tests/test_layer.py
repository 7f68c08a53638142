"""ILoRALinear."""

import copy
import io
import pickle

import pytest
import torch
from cases import assert_same
from torch import nn

import ilora
from ilora import ILoRALinear


def trained(layer):
    """The layer with a lora_B that is not zero."""
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def test_a_fresh_layer_equals_its_base():
    base = nn.Linear(10, 6)
    layer = ILoRALinear(base, r=8, num_experts=4, lora_alpha=32, lora_dropout=0.05)
    x = torch.randn(2, 3, 10)
    assert torch.equal(layer.lora_B, torch.zeros(6, 8))
    assert layer.lora_A.abs().max() > 0
    torch.testing.assert_close(layer(x, gate=torch.rand(2, 4)), base(x), rtol=0, atol=1e-6)
    assert layer.base_layer is base
    assert layer.scaling == 32 / (8 / 4)


def test_parameters_and_what_is_trained():
    layer = ILoRALinear(nn.Linear(10, 6), r=8, num_experts=4)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A": (8, 10),
        "lora_B": (6, 8),
    }
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert set(layer.state_dict()) == {"lora_A", "lora_B", "base_layer.weight", "base_layer.bias"}


def test_equals_the_definition_and_drops_out_in_training_only():
    layer = trained(ILoRALinear(nn.Linear(10, 6), r=8, num_experts=4, lora_dropout=0.5))
    x, gate = torch.randn(4, 5, 10), torch.rand(4, 4)
    args = (x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, gate, layer.scaling)
    layer.eval()
    torch.testing.assert_close(layer(x, gate=gate), ilora.reference.ilora_linear(*args), rtol=1e-4, atol=1e-4)
    layer.train()
    assert not torch.equal(layer(x, gate=gate), layer(x, gate=gate))
    torch.manual_seed(3)
    got = layer(x, gate=gate)
    torch.manual_seed(3)
    torch.testing.assert_close(got, ilora.reference.ilora_linear(*args, None, 0.5), rtol=1e-4, atol=1e-4)


class Opaque(nn.Module):
    """As a quantised linear: no float weight, only a forward."""

    in_features, out_features = 10, 6

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randint(-3, 4, (6, 10), dtype=torch.int8))

    def forward(self, x):
        return x @ self.codes.to(x.dtype).T


@pytest.mark.parametrize("kind", ["Conv1D", "opaque"])
def test_a_base_that_is_no_linear(kind):
    if kind == "opaque":
        base = Opaque()
        weight, bias = base.codes.float(), None
    else:
        base = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 10)  # 10 -> 6, weight [10, 6]
        weight, bias = base.weight.T, base.bias
    layer = trained(ILoRALinear(base, r=4, num_experts=2))
    x, gate, A, B = torch.randn(2, 3, 10, requires_grad=True), torch.rand(2, 2), layer.lora_A, layer.lora_B
    assert (layer.in_features, layer.out_features, A.dtype) == (10, 6, torch.float32)
    want = ilora.reference.ilora_linear(x, weight, bias, A, B, gate, layer.scaling)
    assert_same(layer(x, gate=gate), want, [x, A, B])


def test_hooks_on_the_base_still_run():
    base = nn.Linear(10, 6)
    layer, calls = ILoRALinear(base, r=4, num_experts=2), []
    handle = base.register_forward_hook(lambda *_: calls.append(1))
    x, gate = torch.randn(2, 10), torch.rand(2, 2)
    with_hook = layer(x, gate=gate)
    handle.remove()
    torch.testing.assert_close(layer(x, gate=gate), with_hook)
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_adapters_follow_the_base(dtype):
    base = nn.Linear(10, 6, dtype=dtype)
    assert ILoRALinear(base, r=4, num_experts=2).lora_A.dtype == dtype
    if dtype != torch.float64:
        mixed = trained(ILoRALinear(base, r=4, num_experts=2, adapter_dtype=torch.float32))
        assert mixed.lora_A.dtype == mixed.lora_B.dtype == torch.float32
        y = mixed(torch.randn(2, 10, dtype=dtype), gate=torch.rand(1, 2))
        assert y.dtype == dtype
        y.float().sum().backward()
        assert mixed.lora_A.grad.dtype == torch.float32


def test_no_gate_is_an_error_that_says_what_to_do():
    layer = ILoRALinear(nn.Linear(10, 6), r=8, num_experts=4)
    with pytest.raises(RuntimeError, match=r"10->6.*no gate.*gate=g.*\[N, 4\].*ilora\.gated"):
        layer(torch.randn(2, 10))
    with pytest.raises(ValueError, match=r"gate: expected \[N, num_experts=4\], got \[2, 2\]"):
        layer(torch.randn(2, 10), gate=torch.rand(2, 2))


@pytest.mark.parametrize(
    ("base", "settings", "error", "message"),
    [
        (nn.Linear(4, 4), {"r": 6}, ValueError, r"r=6, num_experts=4: the experts must divide the rank evenly"),
        (nn.Linear(4, 4), {"r": 0}, ValueError, r"r: must be at least 1, got 0"),
        (nn.Linear(4, 4), {"num_experts": 0}, ValueError, r"num_experts: must be at least 1, got 0"),
        (nn.Linear(4, 4), {"lora_dropout": 1.0}, ValueError, r"lora_dropout.*1\.0"),
        (nn.Embedding(4, 4), {}, TypeError, r"base_layer: expected nn\.Linear.*got Embedding with in_features=None"),
        (ILoRALinear(nn.Linear(4, 4)), {}, TypeError, r"an ILoRALinear already"),
    ],
)
def test_bases_and_settings_that_do_not_fit(base, settings, error, message):
    with pytest.raises(error, match=message):
        ILoRALinear(base, **settings)


def test_gated_reaches_every_layer_nests_and_cleans_up():
    model = nn.Sequential(ILoRALinear(nn.Linear(10, 10)), nn.ReLU(), trained(ILoRALinear(nn.Linear(10, 6))))
    x, g, h = torch.randn(4, 10), torch.rand(2, 4), torch.rand(4, 4)
    want = model[2](torch.relu(model[0](x, gate=g)), gate=g)
    with ilora.gated(model, g):
        assert torch.equal(model(x), want)
        with ilora.gated(model, h):
            assert not torch.equal(model(x), want)
        assert torch.equal(model(x), want)
        segments = torch.tensor([0, 1, 4], dtype=torch.int32)
        with ilora.gated(model, g, segments):
            assert torch.equal(model(x), model[2](torch.relu(model[0](x, g, segments)), g, segments))
    with pytest.raises(KeyError), ilora.gated(model, g):
        raise KeyError
    with pytest.raises(RuntimeError, match="no gate"):
        model(x)
    with pytest.raises(ValueError, match=r"Linear holds no ILoRALinear"), ilora.gated(nn.Linear(1, 1), g):
        pass


def test_copies_and_pickles_leave_the_gate_behind():
    layer = trained(ILoRALinear(nn.Linear(10, 6)))
    gate = torch.rand(2, 4, requires_grad=True) * 1.0  # not a leaf: deepcopy of it would raise
    x = torch.randn(2, 10)
    with ilora.gated(layer, gate):
        twin, other = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for clone in (twin, other):
        assert clone.gate_state.current.gate is None
        assert torch.equal(clone(x, gate=gate), layer(x, gate=gate))


def test_state_dict_round_trip():
    layer, fresh = trained(ILoRALinear(nn.Linear(10, 6))), ILoRALinear(nn.Linear(10, 6))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x, gate = torch.randn(2, 10), torch.rand(2, 4)
    assert torch.equal(fresh(x, gate=gate), layer(x, gate=gate))


def test_training_learns_a_gated_target():
    """Two instances want opposite updates of one base; only the gate tells them apart."""
    torch.manual_seed(1)
    base = nn.Linear(8, 8)
    layer = ILoRALinear(base, r=4, num_experts=2, lora_alpha=4)
    gates, target = torch.eye(2), torch.randn(8, 8) / 8
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(150):
        x = torch.randn(2, 16, 8)
        want = base(x) + torch.stack([x[0] @ target, -x[1] @ target])
        loss = (layer(x, gate=gates) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_gradient_checkpointing_inside_the_block():
    layer = trained(ILoRALinear(nn.Linear(10, 6), lora_dropout=0.3))
    x, gate = torch.randn(4, 10, requires_grad=True), torch.rand(2, 4, requires_grad=True)
    inputs = (x, gate, layer.lora_A, layer.lora_B)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        checkpoint = torch.utils.checkpoint.checkpoint
        y = checkpoint(layer, x, gate, use_reentrant=False) if checkpointed else layer(x, gate)
        grads.append(torch.autograd.grad(y.square().sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
