"""Models that a device map spreads: weights that are brought for each forward, layers away from their gate."""

import copy

import accelerate
import pytest
import torch
from models import DECODERS, E, gates, llama, prompts, randomised
from torch import nn

import ilora
from ilora.current_gate import CurrentGate, GateState

OFFLOADED = {"llama": "model.layers.1", "gpt2": "transformer.h.1"}
IDS, MASK = prompts([5, 3, 7])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def spread(model, folder, *offloaded):
    """The model with the modules at these paths on the disk, as from_pretrained(device_map=...) leaves it."""
    inner = next(iter(dict(model.named_children())))
    blocks = [path for path, _ in model.named_modules() if path.count(".") == 2]
    others = [f"{inner}.{name}" for name, _ in getattr(model, inner).named_children() if name not in ("layers", "h")]
    places = {path: "disk" if path in offloaded else "cpu" for path in [*blocks, *others, "lm_head"]}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def injected(model, **options):
    config = ilora.ILoRAConfig(r=8, num_experts=E, lora_dropout=0.0)
    return randomised(ilora.inject(model, config, **options))


def gated(model):
    return model(**BATCH, ilora_gate=gates(3)).logits


@pytest.fixture(params=sorted(OFFLOADED))
def pair(request, tmp_path):
    """(a model in memory, the same one with a block on the disk)"""
    torch.manual_seed(0)
    whole = DECODERS[request.param]().eval()
    half = spread(copy.deepcopy(whole), tmp_path, OFFLOADED[request.param])
    assert any(parameter.is_meta for parameter in half.parameters())
    return whole, half


def test_an_offloaded_block_computes_and_trains_as_in_memory(pair):
    for seed, model in enumerate(pair):
        torch.manual_seed(seed)
        injected(model, gate=ilora.PromptGate(E))
    adapters = [{key: p for key, p in model.named_parameters() if p.requires_grad} for model in pair]
    pair[1].load_state_dict(adapters[0], strict=False)
    outputs = [model(**BATCH, labels=IDS) for model in pair]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, **CLOSE)
    for output in outputs:
        output.loss.backward()
    assert adapters[0].keys() == adapters[1].keys()
    for key, parameter in adapters[0].items():
        torch.testing.assert_close(adapters[1][key].grad, parameter.grad, atol=1e-5, rtol=1e-4)
    tokens = [model.generate(**BATCH, ilora_gate=gates(3), max_new_tokens=4, do_sample=False) for model in pair]
    assert torch.equal(*tokens)


@torch.no_grad()
def test_saved_loaded_switched_and_taken_out_again(pair, tmp_path):
    whole, half = pair
    plain, wanted = half(**BATCH).logits, gated(injected(whole))
    ilora.save_adapter(whole, tmp_path / "adapter")
    ilora.load_adapter(half, tmp_path / "adapter")
    torch.testing.assert_close(gated(half), wanted, **CLOSE)
    ilora.add_adapter(half, "fresh", ilora.ILoRAConfig(r=4, num_experts=E))
    torch.testing.assert_close(gated(half), plain)
    ilora.set_adapter(half, "default")
    torch.testing.assert_close(gated(half), wanted, **CLOSE)
    assert torch.equal(ilora.eject(half)(**BATCH).logits, plain)


def test_gate_networks_go_where_the_embeddings_are_brought(tmp_path):
    model = spread(llama().eval(), tmp_path, "model.embed_tokens")
    assert next(model.parameters()).is_meta
    for network in (ilora.PromptGate(E), ilora.UniformGate(E)):
        injected(model, gate=network)
        assert not any(parameter.is_meta for parameter in network.parameters())
        assert model(**BATCH).logits.isfinite().all()
        ilora.eject(model)


def test_what_an_offloaded_weight_cannot_do_is_refused(pair):
    _, half = pair
    path = next(path for path in OFFLOADED.values() if any(name == path for name, _ in half.named_modules()))
    before = type(half)
    with pytest.raises(ValueError, match="modules_to_save.*offloaded"):
        ilora.inject(half, ilora.ILoRAConfig(num_experts=E, modules_to_save=[path]))
    assert type(half) is before
    injected(half)
    with pytest.raises(ValueError, match=rf"merge: {path}.*offloaded"):
        ilora.merge(half, gates(1)[0])
    assert not half.ilora.merged


def test_spread_after_inject_it_computes_but_has_nothing_to_save(tmp_path):
    model = injected(llama().eval())
    wanted = gated(model)
    model = spread(model, tmp_path / "offloaded", "model.layers.1")
    torch.testing.assert_close(gated(model), wanted)
    with pytest.raises(ValueError, match=r"layers\.1.*no values"):
        ilora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


class Placed:
    """A tensor of which only the place counts: machines that run tests have no two GPUs."""

    def __init__(self, place, *shape):
        self.device, self.shape, self.dim = torch.device(place), shape, lambda: len(shape)

    def to(self, place):
        return Placed(place, *self.shape)


@pytest.mark.parametrize("shape", [(2, 4), (3, 2, 4)])
def test_a_gate_follows_from_gpu_to_gpu_and_not_from_the_host(shape, monkeypatch):
    monkeypatch.setattr(Placed, "__getitem__", lambda self, _: Placed(self.device, *self.shape[1:]), raising=False)
    state, x = GateState(), Placed("cuda:1", 6, 6)
    state.set_current(CurrentGate(Placed("cuda:0", *shape), Placed("cuda:0", 3)))
    gate, segments = state.gate_for(x, 0, "layer")
    assert (gate.device, gate.shape, segments.device) == (x.device, (2, 4), x.device)
    state.set_current(CurrentGate(Placed("cpu", *shape), None))
    assert state.gate_for(x, 0, "layer")[0].device.type == "cpu"  # which the layer refuses, see below


def test_a_layer_without_values_tells_shapes_and_refuses_a_gate_of_another_device():
    layer = ilora.ILoRALinear(nn.Linear(6, 5, device="meta"), r=4, num_experts=2)
    x = torch.empty(6, 6, device="meta")
    y = layer(x, gate=torch.empty(2, 2, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (6, 5))
    with ilora.gated(layer, torch.rand(2, 2)), pytest.raises(ValueError, match="gate: expected it on x's device meta"):
        layer(x)
