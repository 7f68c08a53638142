"""Quantised bases: bitsandbytes 4- and 8-bit and torchao int8, loaded as a user does, on the CPU."""

from types import SimpleNamespace

import pytest
import torch

import ilora

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="loading quantised models needs accelerate")

import training_worker as worker  # noqa: E402
import transformers as hf  # noqa: E402

PROJECTIONS = 14  # of two Llama blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    worker.tiny_llama().save_pretrained(path)
    return path


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return hf.BitsAndBytesConfig(**options)


def nf4(compute=torch.float32, **options):
    options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    return bitsandbytes(load_in_4bit=True, **options)


def torchao_int8():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return hf.TorchAoConfig(torchao.Int8WeightOnlyConfig())


BASES = {
    "nf4": nf4,
    "nf4 twice": lambda: nf4(bnb_4bit_use_double_quant=True),
    "int8": lambda: bitsandbytes(load_in_8bit=True),
    "torchao int8": torchao_int8,
    "nf4 in bfloat16": lambda: nf4(torch.bfloat16),
}
IN_FLOAT32 = [name for name in BASES if "bfloat16" not in name]


def quantised(folder, name="nf4", gate=True):
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    options = {"quantization_config": BASES[name](), "device_map": {"": "cpu"}, "dtype": dtype}
    model = hf.AutoModelForCausalLM.from_pretrained(folder, **options)
    torch.manual_seed(1)
    config = ilora.ILoRAConfig(r=8, num_experts=4)
    return ilora.inject(model, config, gate=ilora.SequenceGate(6, 4) if gate else None)


def bits(model):
    """Copies of everything frozen, as plain bytes where torch allows it."""
    frozen = {n: p for n, p in model.state_dict().items() if "lora_" not in n and "ilora_gate" not in n}
    return {n: getattr(p, "qdata", p).detach().clone() for n, p in frozen.items() if isinstance(p, torch.Tensor)}


@pytest.mark.parametrize("name", BASES)
def test_trains_and_leaves_the_base_alone(folder, tmp_path, name):
    pytest.importorskip("datasets", reason="datasets is not installed")
    model = quantised(folder, name)
    layers = ilora.ilora_layers(model)
    assert len(layers) == PROJECTIONS
    assert all(layer.lora_A.dtype.is_floating_point for layer in layers.values())
    base, learned = bits(model), worker.trainable(model)
    options = {"bf16": True, "gradient_checkpointing": True} if "bfloat16" in name else {}
    assert worker.fell(worker.trained(model, tmp_path, max_steps=40, **options), to=0.7)
    after = bits(model)
    assert all(torch.equal(after[name], base[name]) for name in base)
    assert all(not torch.equal(p, learned[name]) for name, p in worker.trainable(model).items())


def dequantised(layer):
    """The base's weight as the layer uses it: the product with the unit vectors."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).T


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_layers_equal_the_dequantised_ones_and_are_not_merged(folder, name):
    model = quantised(folder, name, gate=False).eval()
    generator = torch.Generator().manual_seed(2)
    gate = torch.rand(3, 4, generator=generator)
    layer = next(iter(ilora.ilora_layers(model).values()))
    layer.lora_B.data.normal_(generator=generator)
    x = torch.randn(3, 5, 32, generator=generator)
    weight, adapter = dequantised(layer.base_layer), (layer.lora_A, layer.lora_B)
    expected = ilora.reference.ilora_linear(x, weight, None, *adapter, gate, scaling=layer.scaling)
    tolerance = 0.05 if name == "int8" else 1e-4  # int8 rounds the activations as well
    torch.testing.assert_close(layer(x, gate=gate), expected, rtol=tolerance, atol=tolerance)
    frozen = bits(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        ilora.merge(model, torch.full((4,), 0.25))
    assert all(torch.equal(value, frozen[name]) for name, value in bits(model).items())


class Packing(torch.nn.Linear):
    """Stands for bitsandbytes' 4-bit layer on a CPU with AVX512-BF16: packed in eval mode, it passes no gradient."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.support_avx512bf16_for_cpu, self.weight.quant_state = True, SimpleNamespace(packing_format_for_cpu=False)

    def state_dict(self, *args, **kwargs):
        self.weight.quant_state.packing_format_for_cpu = False
        return super().state_dict(*args, **kwargs)

    def forward(self, x):
        if self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad:
            self.weight.quant_state.packing_format_for_cpu = True
        y = super().forward(x)
        return y.detach() if self.weight.quant_state.packing_format_for_cpu else y


def bitsandbytes_own(d_in, d_out):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear4bit(d_in, d_out, compute_dtype=torch.float32, quant_type="nf4")
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16: bitsandbytes packs nothing")
    layer.load_state_dict(torch.nn.Linear(d_in, d_out).state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("make", [Packing, bitsandbytes_own])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["1"]])
def test_gradients_still_pass_after_an_evaluation(make, before, targets):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(make(64, 128), make(128, 64)), torch.randn(3, 1, 64)
    if before:
        model.eval()(x)
    ilora.inject(model, ilora.ILoRAConfig(target_modules=targets))
    gate = torch.full((3, 4), 0.25)
    with torch.no_grad():
        model.eval()(x, ilora_gate=gate)
    leaf = x.clone().requires_grad_()
    model.train()(leaf, ilora_gate=gate).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0
    ilora.eject(model)
    assert all(each.support_avx512bf16_for_cpu for each in model)


def test_a_refused_injection_lets_the_weights_pack():
    model = torch.nn.Sequential(Packing(4, 8))
    with pytest.raises(ValueError, match="no module"):
        ilora.inject(model, ilora.ILoRAConfig(modules_to_save=["head"]))
    assert model[0].support_avx512bf16_for_cpu


def test_a_quantised_model_without_an_adapter_is_still_refused(folder, tmp_path):
    model = ilora.eject(quantised(folder))
    with pytest.raises(ValueError, match="purely quantized"):
        hf.Trainer(model, worker.arguments(tmp_path))
